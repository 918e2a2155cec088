"""Which pages and slots of a budget are taken. Integers only; `geometry` shows how the budget is cut.

Small items fill the fullest open slab first; when units are free but scattered, `compact` lists the moves that empty
a slab.

A *fixed* item is in use by a running sequence: it stays where it is. A *loose* item may be moved or evicted.
"""

import itertools

from hybrid_cache.cache.geometry import Geometry, Kind


class Buckets:
    """Numbered slabs, filed by a small key; finds the lowest and the highest key in use without a search."""

    def __init__(self) -> None:
        self._slabs: dict[int, dict[int, None]] = {}  # the inner dictionary is an ordered set
        self._keys = 0  # bit k is set when some slab has key k

    def add(self, slab: int, key: int) -> None:
        self._slabs.setdefault(key, {})[slab] = None
        self._keys |= 1 << key

    def remove(self, slab: int, key: int) -> None:
        slabs = self._slabs[key]
        del slabs[slab]
        if not slabs:
            self._keys ^= 1 << key

    def lowest(self) -> int | None:
        """A slab with the lowest key."""
        return next(iter(self._slabs[(self._keys & -self._keys).bit_length() - 1])) if self._keys else None

    def highest(self) -> tuple[int, int] | None:
        """A slab with the highest key, and that key."""
        key = self._keys.bit_length() - 1
        return (next(iter(self._slabs[key])), key) if self._keys else None


class Units:
    """Units in slabs of `span`: small items take one unit, large items a slab. Every operation takes constant time."""

    def __init__(self, num_units: int, span: int) -> None:
        self.num_units = num_units
        self.span = span
        self.num_slabs = num_units // span
        self.free_units = num_units
        self.fixed_units = 0
        self.num_loose_slabs = self.num_slabs  # slabs without a fixed item: each could be emptied for a large one
        self._fixed = [0] * (self.num_slabs + 1)  # fixed units of each slab
        self._empty = list(range(self.num_slabs - 1, -1, -1))  # a stack, lowest number on top
        self._room: dict[int, list[int]] = {}  # slab of small items -> its free units, a stack
        self._open = Buckets()  # slabs of small items with a free unit, by the number of them
        self._loose = Buckets()  # slabs of loose small items only, by the number of free units
        if num_units % span:  # the last units are too few for a large item, and never listed as loose
            self._room[self.num_slabs] = list(range(num_units - 1, self.num_slabs * span - 1, -1))
            self._list(self.num_slabs)

    def fits(self, num_small: int, num_large: int) -> bool:
        """Whether these numbers of items fit next to the fixed ones once every loose one has gone."""
        units = num_small + num_large * self.span
        return num_large <= self.num_loose_slabs and units <= self.num_units - self.fixed_units

    def take_small(self) -> int | None:
        slab = self._open.lowest()
        if slab is None:
            if not self._empty:
                return None
            slab = self._empty.pop()
            self._room[slab] = list(range((slab + 1) * self.span - 1, slab * self.span - 1, -1))
        else:
            self._unlist(slab)
        self.free_units -= 1
        unit = self._room[slab].pop()
        self._list(slab)
        return unit

    def give_small(self, unit: int) -> None:
        slab = unit // self.span
        self._unlist(slab)
        self.free_units += 1
        self._room[slab].append(unit)
        if len(self._room[slab]) == self.span:
            del self._room[slab]
            self._empty.append(slab)
        else:
            self._list(slab)

    def take_large(self) -> int | None:
        if not self._empty:
            return None
        self.free_units -= self.span
        return self._empty.pop()

    def give_large(self, slab: int) -> None:
        self.free_units += self.span
        self._empty.append(slab)

    def fix(self, slab: int, change: int) -> None:
        """Counts `change` more (or fewer) fixed units in a slab."""
        small = slab in self._room
        if small:
            self._unlist(slab)
        before = self._fixed[slab]
        self._fixed[slab] = before + change
        self.fixed_units += change
        if slab < self.num_slabs:
            self.num_loose_slabs += (before + change == 0) - (before == 0)
        if small:
            self._list(slab)

    def compact(self) -> list[tuple[int, int]]:
        """Empties the emptiest loose slab into the others -> moves (from, to) of small items; none when impossible."""
        emptiest = self._loose.highest()
        if emptiest is None:
            return []
        slab, free = emptiest
        elsewhere = self.free_units - self.span * len(self._empty) - free
        if elsewhere < self.span - free:
            return []
        self._unlist(slab)
        room = set(self._room.pop(slab))
        moves = []
        for unit in range(slab * self.span, (slab + 1) * self.span):
            if unit not in room:
                target = self.take_small()
                assert target is not None
                moves.append((unit, target))
        self.free_units += len(moves)
        self._empty.append(slab)
        return moves

    def check(self, small: set[int], large: set[int], fixed: list[int]) -> None:
        """Proves that exactly these items are taken; `fixed` lists the slab of each fixed unit."""
        tail = {self.num_slabs} if self.num_units % self.span else set()
        assert small.isdisjoint(unit for room in self._room.values() for unit in room)
        assert len(small) + self.span * len(large) + self.free_units == self.num_units
        assert {unit // self.span for unit in small} | tail == set(self._room) | tail
        slabs = sorted([*self._empty, *large, *(self._room.keys() - tail)])
        assert slabs == list(range(self.num_slabs))
        assert all(count == fixed.count(slab) for slab, count in enumerate(self._fixed) if count or slab in fixed)
        assert self.fixed_units == len(fixed)
        assert self.num_loose_slabs == self.num_slabs - len(set(fixed) - {self.num_slabs})

    def _list(self, slab: int) -> None:
        free = len(self._room[slab])
        if free:
            self._open.add(slab, free)
        if not self._fixed[slab] and slab < self.num_slabs:
            self._loose.add(slab, free)

    def _unlist(self, slab: int) -> None:
        free = len(self._room[slab])
        if free:
            self._open.remove(slab, free)
        if not self._fixed[slab] and slab < self.num_slabs:
            self._loose.remove(slab, free)


class Allocator:
    """Which pages and slots are taken, and which of them are fixed. Integers only."""

    def __init__(self, geometry: Geometry) -> None:
        self._span = geometry.span
        self._unit_bytes = geometry.unit_bytes
        self._large = geometry.large if geometry.span > 1 else None
        self._slots = Units(geometry.num_units, geometry.span)
        self._pages = self._slots if geometry.page_bytes else Units(geometry.count(Kind.PAGE), 1)
        self._fixed: dict[Kind, set[int]] = {kind: set() for kind in Kind}

    @property
    def free_bytes(self) -> int:
        return self._slots.free_units * self._unit_bytes

    @property
    def used_bytes(self) -> int:
        return self._slots.num_units * self._unit_bytes - self.free_bytes

    @property
    def fixed_bytes(self) -> int:
        return self._slots.fixed_units * self._unit_bytes

    @property
    def large(self) -> Kind | None:
        """The kind that may need `compact`."""
        return self._large

    def fits(self, num_pages: int, num_slots: int) -> bool:
        """Whether these numbers of items fit next to the fixed ones once every loose one has gone."""
        if self._pages is not self._slots:
            return self._pages.fits(num_pages, 0) and self._slots.fits(num_slots, 0)
        if self._large is Kind.PAGE:
            return self._slots.fits(num_slots, num_pages)
        return self._slots.fits(num_pages, num_slots) if self._large else self._slots.fits(num_pages + num_slots, 0)

    def take(self, kind: Kind) -> int | None:
        """A free item of a kind, now loose; or None."""
        units = self._of(kind)
        return units.take_large() if kind is self._large else units.take_small()

    def give(self, kind: Kind, index: int) -> None:
        """Takes an item back, fixed or loose."""
        self.unfix(kind, index)
        units = self._of(kind)
        if kind is self._large:
            units.give_large(index)
        else:
            units.give_small(index)

    def fix(self, kind: Kind, index: int) -> None:
        """Keeps an item where it is. Fixing it again changes nothing."""
        if index not in self._fixed[kind]:
            self._fixed[kind].add(index)
            self._count_fixed(kind, index, 1)

    def unfix(self, kind: Kind, index: int) -> None:
        """Lets an item move. Nothing happens to a loose one."""
        if index in self._fixed[kind]:
            self._fixed[kind].remove(index)
            self._count_fixed(kind, index, -1)

    def compact(self) -> list[tuple[int, int]]:
        """Makes room for a large item -> moves (from, to) of loose small items; none when that is impossible."""
        return self._slots.compact()

    def check(self, taken: dict[Kind, set[int]], fixed: dict[Kind, set[int]]) -> None:
        """Proves that exactly the items in `taken` are taken, and those in `fixed` fixed."""
        assert self._fixed == fixed
        if self._pages is not self._slots:
            for kind in Kind:
                self._of(kind).check(taken[kind], set(), list(fixed[kind]))
            return
        if self._large is None:
            assert taken[Kind.PAGE].isdisjoint(taken[Kind.SLOT])
        small = {index for kind in Kind if kind is not self._large for index in taken[kind]}
        slabs = [i // self._span for kind in Kind if kind is not self._large for i in fixed[kind]]
        if self._large is not None:
            slabs += [slab for slab in fixed[self._large] for _ in range(self._span)]
        self._slots.check(small, taken[self._large] if self._large else set(), slabs)

    def _of(self, kind: Kind) -> Units:
        return self._pages if kind is Kind.PAGE else self._slots

    def _count_fixed(self, kind: Kind, index: int, sign: int) -> None:
        if kind is self._large:
            self._slots.fix(index, sign * self._span)
        else:
            units = self._of(kind)
            units.fix(index // units.span, sign)


class Ledger:
    """Stands in for `Allocator` where there are no tensors: it counts bytes only, so there are no gaps."""

    large = None

    def __init__(self, budget_bytes: int, item_bytes: dict[Kind, int]) -> None:
        self._budget_bytes = budget_bytes
        self._item_bytes = item_bytes
        self._numbers = itertools.count()
        self._fixed: dict[Kind, set[int]] = {kind: set() for kind in Kind}
        self.used_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self._budget_bytes - self.used_bytes

    @property
    def fixed_bytes(self) -> int:
        return sum(len(self._fixed[kind]) * self._item_bytes[kind] for kind in Kind)

    def fits(self, num_pages: int, num_slots: int) -> bool:
        wanted = num_pages * self._item_bytes[Kind.PAGE] + num_slots * self._item_bytes[Kind.SLOT]
        return self.fixed_bytes + wanted <= self._budget_bytes

    def take(self, kind: Kind) -> int | None:
        if self._item_bytes[kind] > self.free_bytes:
            return None
        self.used_bytes += self._item_bytes[kind]
        return next(self._numbers)

    def give(self, kind: Kind, index: int) -> None:
        self._fixed[kind].discard(index)
        self.used_bytes -= self._item_bytes[kind]

    def fix(self, kind: Kind, index: int) -> None:
        self._fixed[kind].add(index)

    def unfix(self, kind: Kind, index: int) -> None:
        self._fixed[kind].discard(index)

    def compact(self) -> list[tuple[int, int]]:
        return []

    def check(self, taken: dict[Kind, set[int]], fixed: dict[Kind, set[int]]) -> None:
        """Proves that exactly the items in `taken` are taken, and those in `fixed` fixed."""
        assert self._fixed == fixed
        assert self.used_bytes == sum(len(taken[kind]) * self._item_bytes[kind] for kind in Kind)
