"""The second tier: copies of pages and states that had to leave, in host memory under a budget of its own.

Integers only; `device.host_memory` holds the bytes. What goes from the device is copied, and found again by its name;
what is used least recently goes from here. A state is of use with all pages before it, so pages are only copied where
a state behind them is here already, and of one prefix the deepest go first. Without recurrent states pages are enough.
"""

from collections import OrderedDict
from collections.abc import Iterable

from hybrid_cache.cache.allocator import Allocator
from hybrid_cache.cache.commands import Emit, Load, MoveHost, Store
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.keys import Keys, Name
from hybrid_cache.cache.tree import Checkpoint, Node

Entry = tuple[Kind, Name]
ROOMY = 16  # there is room where more than this part of it is free


class HostTier:
    """See the module docstring."""

    def __init__(self, geometry: Geometry, budget_bytes: int, emit: Emit, *, stateless: bool) -> None:
        """geometry: of the host's memory"""
        self.budget_bytes = budget_bytes
        self.num_stored = self.num_loaded = self.num_dropped = 0
        self._stateless = stateless
        self._emit = emit
        self._allocator = Allocator(geometry)
        self._items: OrderedDict[Entry, int] = OrderedDict()  # least recently used first
        self._owners: dict[tuple[Kind, int], Entry] = {}
        self._namespaces: dict[Entry, str] = {}
        self._held: set[Entry] = set()

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    @property
    def namespaces(self) -> set[str]:
        """Of what is here."""
        return set(self._namespaces.values())

    def __len__(self) -> int:
        return len(self._items)

    # What goes from the device

    def keep_state(self, state: Checkpoint, *, claimed: bool) -> None:
        """A state is about to go: it is copied, and the pages before it will be when they go.

        claimed: somebody counts on it; nothing makes room for others
        """
        if not (claimed or self._stateless or self._has_room):
            return
        if not self._keep(Kind.SLOT, state.name, state.slot, state.node.namespace):
            return
        node: Node | None = state.node
        while node is not None and not node.wanted:
            node.wanted = True
            node = node.parent

    @property
    def _has_room(self) -> bool:
        """Whether a large item finds a place without others being dropped."""
        return self._allocator.free_bytes * ROOMY > self.budget_bytes

    def keep_page(self, node: Node) -> None:
        """A page is about to go."""
        if node.wanted or self._stateless:
            self._keep(Kind.PAGE, node.name, node.page, node.namespace)

    def _keep(self, kind: Kind, name: Name, item: int, namespace: str) -> bool:
        """Copies an item unless it is here -> whether it is here now."""
        entry = kind, name
        if entry in self._items:
            self._items.move_to_end(entry)
            return True
        place = self._take(kind)
        if place is None:
            return False
        self._items[entry] = place
        self._owners[kind, place] = entry
        self._namespaces[entry] = namespace
        self._emit(Store(kind, item, place))
        self.num_stored += 1
        return True

    def _take(self, kind: Kind) -> int | None:
        while (place := self._allocator.take(kind)) is None:
            if not ((kind is self._allocator.large and self._compact()) or self._drop_oldest()):
                return None
        return place

    def _drop_oldest(self) -> bool:
        oldest = next((entry for entry in self._items if entry not in self._held), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, entry: Entry) -> None:
        place = self._items.pop(entry)
        del self._owners[entry[0], place], self._namespaces[entry]
        self._allocator.give(entry[0], place)
        self.num_dropped += 1

    def _compact(self) -> bool:
        moves = self._allocator.compact()
        if not moves:
            return False
        kind = Kind.PAGE if self._allocator.large is Kind.SLOT else Kind.SLOT
        self._emit(MoveHost(kind, tuple(moves)))
        for source, target in moves:
            entry = self._owners[kind, target] = self._owners.pop((kind, source))
            self._items[entry] = target
        return True

    def drop(self, namespace: str | None) -> int:
        """Drops all of a namespace, or everything -> bytes freed."""
        before = self.used_bytes
        for entry in [entry for entry, owner in self._namespaces.items() if namespace in (None, owner)]:
            self._drop(entry)
        return before - self.used_bytes

    # What comes back

    def resumes_at(self, keys: Keys, num_pages: int, least: int, most: int) -> int:
        """Where a prompt can resume from, in pages, with what is here; `least` if there is nothing better.

        num_pages: of the prompt, that the device has   least: where it resumes from without this tier
        most: where it may resume from at the latest
        """
        if not self._items:
            return least
        names = keys.names
        while num_pages < most and (Kind.PAGE, names[num_pages + 1]) in self._items:
            num_pages += 1
        deepest = min(num_pages, most)
        if self._stateless:
            return max(deepest, least)
        found = (n for n in range(deepest, least, -1) if (Kind.SLOT, names[n]) in self._items)
        return next(found, least)

    def hold(self, keys: Keys, first: int, end: int) -> None:
        """Pages first + 1 to `end` of a prompt, and the state there, stay until they are loaded."""
        self._held = self._entries(keys, first, end)

    def _entries(self, keys: Keys, first: int, end: int) -> set[Entry]:
        entries = {(Kind.PAGE, keys.names[n]) for n in range(first + 1, end + 1)}
        return entries if self._stateless else {*entries, (Kind.SLOT, keys.names[end])}

    def let_go(self) -> None:
        """Nothing is held any more."""
        self._held = set()

    def load(self, keys: Keys, first: int, end: int, pages: Iterable[int], slot: int) -> None:
        """Copies what is held to these pages and this slot of the device."""
        for n, page in zip(range(first + 1, end + 1), pages, strict=True):
            self._emit(Load(Kind.PAGE, self._items[Kind.PAGE, keys.names[n]], page))
        if not self._stateless:
            self._emit(Load(Kind.SLOT, self._items[Kind.SLOT, keys.names[end]], slot))
        self.num_loaded += max(end - first, 0)
        for n in range(end, 0, -1):  # the deepest go first
            if (Kind.PAGE, keys.names[n]) in self._items:
                self._items.move_to_end((Kind.PAGE, keys.names[n]))
        if not self._stateless:
            self._items.move_to_end((Kind.SLOT, keys.names[end]))
        self.let_go()

    def check(self) -> None:
        """Proves that every copy has one place."""
        assert {(entry[0], place): entry for entry, place in self._items.items()} == self._owners
        assert self._namespaces.keys() == self._items.keys()
        assert not self._held
        taken: dict[Kind, set[int]] = {kind: set() for kind in Kind}
        for kind, place in self._owners:
            taken[kind].add(place)
        self._allocator.check(taken, {kind: set() for kind in Kind})
