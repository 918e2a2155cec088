"""One budget of bytes that holds KV pages and state slots side by side, with no fixed split.

The budget is cut in units as large as the smaller kind of item; the larger kind spans a whole slab of units:

    unit    | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |10 |11 |12 |      here a slot is as large as 4 pages
    slab    |       0       |       1       |       2       |tail
    holds   | one slot      | page page  -   - | nothing yet   |page    small items in one slab, or one large item

Small items are numbered by unit, large items by slab, so both kinds are plain strided views of one buffer. Small items
fill the fullest open slab first; when units are free but scattered, the cache moves small items to empty a slab.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from hybrid_cache.batch import CacheTensors
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.spec import AttentionSpec, CacheSpec, StateSpec, align64


class Kind(Enum):
    """What an item of the arena holds."""

    PAGE = "page"
    SLOT = "slot"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a budget is cut for one model."""

    page_bytes: int
    slot_bytes: int  # states, convolution windows and room for one hidden row
    unit_bytes: int
    span: int  # units in a slab
    num_units: int
    large: Kind  # the kind that takes a whole slab

    @classmethod
    def of(cls, spec: CacheSpec, budget_bytes: int) -> "Geometry":
        """Raises ConfigError for a budget that cannot hold one slot and one page."""
        page_bytes = max(align64(spec.page_bytes), 64)
        slot_bytes = spec.slot_bytes + align64(spec.hidden_size * spec.hidden_dtype.itemsize)
        unit_bytes = min(page_bytes, slot_bytes)
        span = -(-max(page_bytes, slot_bytes) // unit_bytes)
        large = Kind.SLOT if slot_bytes > page_bytes else Kind.PAGE
        num_units = budget_bytes // unit_bytes
        if num_units < span + 1:
            need = (span + 1) * unit_bytes
            raise ConfigError(f"a cache budget of {budget_bytes} bytes holds no sequence, needs at least {need}")
        return cls(page_bytes, slot_bytes, unit_bytes, span, num_units, large)

    @property
    def num_slabs(self) -> int:
        return self.num_units // self.span

    def units(self, kind: Kind) -> int:
        """Units that one item of a kind takes."""
        return self.span if kind is self.large else 1

    def stride_bytes(self, kind: Kind) -> int:
        """Bytes from one item of a kind to the next, and the bytes it takes from the budget."""
        return self.units(kind) * self.unit_bytes

    def count(self, kind: Kind) -> int:
        """Highest number of items of one kind."""
        return self.num_units // self.units(kind)


class Allocator:
    """Which units are taken. Integers only."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._span = geometry.span
        self._empty = list(range(geometry.num_slabs - 1, -1, -1))  # slabs; a stack, lowest number on top
        self._items: dict[int, set[int]] = {}  # slab of small items -> units taken
        self._open: list[set[int]] = [set() for _ in range(self._span + 1)]  # by number of free units
        self._large: set[int] = set()
        self.free_units = geometry.num_units
        tail = geometry.num_units % geometry.span
        self._tail_slab = geometry.num_slabs
        if tail:  # the last units are too few for a large item
            self._items[self._tail_slab] = set()
            self._open[tail].add(self._tail_slab)

    def take(self, kind: Kind) -> int | None:
        """A free item of a kind, or None."""
        return self._take_large() if kind is self._geometry.large and self._span > 1 else self._take_small()

    def give(self, kind: Kind, index: int) -> None:
        """Takes an item back."""
        if kind is self._geometry.large and self._span > 1:
            self._large.remove(index)
            self._empty.append(index)
            self.free_units += self._span
            return
        slab = index // self._span
        self._move(slab, index, taken=False)
        if not self._items[slab] and slab != self._tail_slab:
            self._open[self._span].discard(slab)
            del self._items[slab]
            self._empty.append(slab)

    def scattered(self) -> Iterator[tuple[int, list[int]]]:
        """Slabs of small items that would fit into the free units of the others, emptiest first: (slab, its units)."""
        if self.free_units < self._span:
            return
        for free in range(self._span, 0, -1):
            for slab in sorted(self._open[free] - {self._tail_slab}):
                elsewhere = self.free_units - free - self._span * len(self._empty)
                if elsewhere >= len(self._items[slab]):
                    yield slab, sorted(self._items[slab])

    def take_outside(self, slab: int) -> int:
        """A unit for a small item in an open slab other than `slab`."""
        for slabs in self._open[1:]:
            for other in slabs - {slab}:
                return self._take_unit(other)
        raise AssertionError("no unit free outside the slab")

    def check(self, taken: dict[Kind, set[int]]) -> None:
        """Proves that exactly the items in `taken` are taken."""
        small = Kind.PAGE if self._geometry.large is Kind.SLOT else Kind.SLOT
        if self._span == 1:  # both kinds are numbered by unit
            assert sorted(taken[Kind.PAGE] | taken[Kind.SLOT]) == sorted(u for s in self._items.values() for u in s)
            assert not taken[Kind.PAGE] & taken[Kind.SLOT]
        else:
            assert taken[self._geometry.large] == self._large
            assert taken[small] == {u for units in self._items.values() for u in units}
            assert not self._large & self._items.keys()
        used = self._span * len(self._large) + sum(len(units) for units in self._items.values())
        assert self.free_units + used == self._geometry.num_units
        slabs = sorted([*self._empty, *self._large, *(s for s in self._items if s != self._tail_slab)])
        assert slabs == list(range(self._geometry.num_slabs))

    def _take_large(self) -> int | None:
        if not self._empty:
            return None
        slab = self._empty.pop()
        self._large.add(slab)
        self.free_units -= self._span
        return slab

    def _take_small(self) -> int | None:
        for slabs in self._open[1:]:
            for slab in slabs:
                return self._take_unit(slab)
        if not self._empty:
            return None
        slab = self._empty.pop()
        self._items[slab] = set()
        self._open[self._span].add(slab)
        return self._take_unit(slab)

    def _take_unit(self, slab: int) -> int:
        first, size = slab * self._span, self._span
        if slab == self._tail_slab:
            size = self._geometry.num_units % self._span
        unit = next(u for u in range(first, first + size) if u not in self._items[slab])
        self._move(slab, unit, taken=True)
        return unit

    def _move(self, slab: int, unit: int, *, taken: bool) -> None:
        """Marks a unit taken or free, and files its slab under the new number of free units."""
        items = self._items[slab]
        size = self._geometry.num_units % self._span if slab == self._tail_slab else self._span
        self._open[size - len(items)].discard(slab)
        if taken:
            items.add(unit)
            self.free_units -= 1
        else:
            items.remove(unit)
            self.free_units += 1
        self._open[size - len(items)].add(slab)


class Arena:
    """The buffer, and its views as pages and slots. Memory is touched only when an item is written."""

    def __init__(self, spec: CacheSpec, geometry: Geometry, device: str) -> None:
        self._geometry = geometry
        self._buffer = torch.empty(geometry.num_units * geometry.unit_bytes, dtype=torch.uint8, device=device)
        self._bytes = {kind: self._view(kind, torch.uint8, 0, (geometry.stride_bytes(kind),)) for kind in Kind}
        self.tensors = self._layers(spec)
        self.hidden = self._view(Kind.SLOT, spec.hidden_dtype, spec.slot_bytes, (spec.hidden_size,))

    def copy(self, kind: Kind, source: int, target: int) -> None:
        """Copies a whole item."""
        self._bytes[kind][target].copy_(self._bytes[kind][source])

    def _layers(self, spec: CacheSpec) -> CacheTensors:
        """Views [pages, TILE, kv_heads, head_dim] and [slots, ...] of every layer, side by side inside an item."""
        layers: list[KVTensors | StateTensors] = []
        page_offset = slot_offset = 0
        for layer in spec.layers:
            if isinstance(layer, AttentionSpec):
                shape = (TILE, layer.num_kv_heads, layer.head_dim)
                half = TILE * layer.bytes_per_token // 2
                k = self._view(Kind.PAGE, layer.dtype, page_offset, shape)
                v = self._view(Kind.PAGE, layer.dtype, page_offset + half, shape)
                layers.append(KVTensors(k, v))
                page_offset += 2 * half
            else:
                assert isinstance(layer, StateSpec)
                conv = self._view(Kind.SLOT, layer.conv_dtype, slot_offset, layer.conv_shape)
                slot_offset += align64(layer.conv_bytes)
                state = self._view(Kind.SLOT, torch.float32, slot_offset, layer.state_shape)
                slot_offset += align64(layer.state_bytes)
                layers.append(StateTensors(conv, state))
        return tuple(layers)

    def _view(self, kind: Kind, dtype: torch.dtype, offset_bytes: int, shape: tuple[int, ...]) -> Tensor:
        """All items of a kind as [items, *shape] of a dtype, starting `offset_bytes` into each item."""
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        step = self._geometry.stride_bytes(kind) // dtype.itemsize
        size = (self._geometry.count(kind), *shape)
        return self._buffer.view(dtype).as_strided(size, (step, *strides), offset_bytes // dtype.itemsize)
