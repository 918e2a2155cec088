"""What is evicted next when room is needed, without walking the tree.

Four queues, emptied in this order:

    dead         pages that no kept state needs, least recently used first
    scored       states, in the policy's order
    spared       pages and states that were passed over for the sake of a claim on them
    guaranteed   states within the minimum life that a client asked for, those that run out first go first
"""

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Protocol, TypeVar

from hybrid_cache.cache.tree import Kept, Node

T = TypeVar("T", bound=Hashable)

FIRST_SPARED_S, MOST_SPARED_S = 0.25, 8.0  # until it is asked again whether a page or a state is still spared


class LazyHeap(Generic[T]):
    """Lowest score first, O(log n). A risen score need not be reported: it is noticed once its item is lowest."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._valid: dict[T, int] = {}  # the ticket of an item's one valid entry
        self._entries: list[tuple[float, int, T]] = []
        self._limit = 64

    def __contains__(self, item: T) -> bool:
        return item in self._valid

    def push(self, item: T, score: float) -> None:
        """Files an item under a score, in place of its earlier one."""
        ticket = self._valid[item] = next(self._tickets)
        heapq.heappush(self._entries, (score, ticket, item))
        if len(self._entries) > self._limit:
            self._entries = [entry for entry in self._entries if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)
            self._limit = 64 + 2 * len(self._entries)

    def discard(self, item: T) -> None:
        """Nothing happens to an item that is not there."""
        self._valid.pop(item, None)

    def peek(self, score_of: Callable[[T], float]) -> tuple[float, T] | None:
        """The item with the lowest score, and that score; it stays in the queue."""
        while self._entries:
            score, ticket, item = self._entries[0]
            if self._valid.get(item) != ticket:
                heapq.heappop(self._entries)
                continue
            fresh = score_of(item)
            if not fresh > score:  # also of what is no number
                return fresh, item
            heapq.heapreplace(self._entries, (fresh, ticket, item))
        return None

    def first(self) -> tuple[float, T] | None:
        """The item that was filed under the lowest score, and that score."""
        while self._entries and self._valid.get(self._entries[0][2]) != self._entries[0][1]:
            heapq.heappop(self._entries)
        return (self._entries[0][0], self._entries[0][2]) if self._entries else None

    def items(self) -> dict[T, float]:
        """What is queued, and the score it was filed under."""
        return {item: score for score, ticket, item in self._entries if self._valid.get(item) == ticket}


class Order(Protocol):
    """The part of a policy that orders states."""

    def add(self, kept: Kept) -> None: ...
    def remove(self, kept: Kept) -> None: ...
    def lowest(self) -> tuple[float, Kept] | None: ...
    def items(self) -> Iterable[Kept]: ...


class EvictionQueues:
    """See the module docstring. Only orders things; the cache evicts them."""

    def __init__(self, order: Order, clock: Callable[[], float]) -> None:
        self._scored = order
        self._clock = clock
        self._dead: LazyHeap[Node] = LazyHeap()
        self._guaranteed: LazyHeap[Kept] = LazyHeap()
        self._spared: LazyHeap[Kept | Node] = LazyHeap()  # by when to ask again
        self._patience: dict[Kept | Node, float] = {}  # of these: for how long each was passed over the last time
        self._waiting: set[Kept] = set()  # states that were filed and not withdrawn

    def add_dead(self, node: Node) -> None:
        if node not in self._dead and node not in self._spared:
            self._dead.push(node, node.last_used)

    def withdraw_dead(self, node: Node) -> None:
        """Nothing happens to a node that is not queued."""
        self._dead.discard(node)
        self._forget_spared(node)

    def add(self, kept: Kept) -> None:
        """Files a state that was just made or used, or whose worth may have fallen."""
        self._waiting.add(kept)
        if kept in self._spared:
            return
        if kept.keep_until > self._clock():
            self._guaranteed.push(kept, kept.keep_until)
            self._scored.remove(kept)
        else:
            self._scored.add(kept)
            self._guaranteed.discard(kept)

    def __contains__(self, kept: Kept) -> bool:
        return kept in self._waiting

    def withdraw(self, kept: Kept) -> None:
        """Nothing happens to a state that is not queued."""
        if kept in self._waiting:
            self._waiting.remove(kept)
            self._guaranteed.discard(kept)
            self._scored.remove(kept)
            self._forget_spared(kept)

    def spare(self, item: Kept | Node) -> None:
        """Takes the next dead page or scored state out of the way, for a time that doubles with each call in a row."""
        seconds = self._patience[item] = min(2 * self._patience.get(item, FIRST_SPARED_S / 2), MOST_SPARED_S)
        self._spared.push(item, self._clock() + seconds)
        if isinstance(item, Node):
            self._dead.discard(item)
        else:
            self._scored.remove(item)

    def spared(self, *, due: bool) -> Kept | Node | None:
        """One that was passed over; due: and is to be asked about again."""
        entry = self._spared.first()
        return None if entry is None or (due and entry[0] > self._clock()) else entry[1]

    def expose(self, item: Kept | Node) -> None:
        """One that was passed over is no longer. Nothing happens to others."""
        if item not in self._spared:
            return
        self._forget_spared(item)
        if isinstance(item, Node):
            self.add_dead(item)
        else:
            self.add(item)

    def _forget_spared(self, item: Kept | Node) -> None:
        self._spared.discard(item)
        self._patience.pop(item, None)

    def next_dead(self) -> Node | None:
        entry = self._dead.peek(lambda node: node.last_used)
        return entry[1] if entry else None

    def next_scored(self) -> tuple[float, Kept] | None:
        """The state that the policy evicts next, and its score."""
        while (first := self.next_guaranteed()) and first.keep_until <= self._clock():
            self.add(first)
        return self._scored.lowest()

    def next_guaranteed(self) -> Kept | None:
        entry = self._guaranteed.peek(lambda kept: kept.keep_until)
        return entry[1] if entry else None

    def check(self, dead: set[Node], kept: set[Kept]) -> None:
        """Proves that exactly these are queued."""
        scored, guaranteed, spared = set(self._scored.items()), self._guaranteed.items(), self._spared.items().keys()
        assert self._patience.keys() == spared
        nodes = {item for item in spared if isinstance(item, Node)}
        assert self._dead.items().keys().isdisjoint(nodes)
        assert self._dead.items().keys() | nodes == dead
        assert scored.isdisjoint(guaranteed)
        assert (scored | guaranteed.keys()).isdisjoint(spared)
        assert scored | guaranteed.keys() | (spared - nodes) == kept == self._waiting
