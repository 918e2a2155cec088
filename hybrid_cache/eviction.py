"""What goes next when room is needed, in O(log n) and without walking the tree.

Three queues, emptied in this order:

    dead         pages that no kept state needs, least recently used first
    scored       states, lowest score of the policy first
    guaranteed   states within the minimum life that a client asked for, the first to run out first
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from hybrid_cache.tree import Kept, Node


class Queued(Protocol):
    ticket: int  # names the one valid entry in a queue; 0 when there is none


T = TypeVar("T", bound=Queued)


class LazyHeap(Generic[T]):
    """Lowest score first. A score that rises is noticed when its item's turn comes, so that nobody has to report it."""

    def __init__(self, tickets: Iterator[int]) -> None:
        self._tickets = tickets
        self._entries: list[tuple[float, int, T]] = []
        self._limit = 64

    def push(self, item: T, score: float) -> None:
        """Files an item; its entry in any other queue becomes void."""
        item.ticket = next(self._tickets)
        heapq.heappush(self._entries, (score, item.ticket, item))
        if len(self._entries) > self._limit:
            self._entries = [entry for entry in self._entries if entry[2].ticket == entry[1]]
            heapq.heapify(self._entries)
            self._limit = 64 + 2 * len(self._entries)

    def peek(self, score_of: Callable[[T], float]) -> tuple[float, T] | None:
        """The item with the lowest score, and that score; it stays in the queue."""
        while self._entries:
            score, ticket, item = self._entries[0]
            if item.ticket != ticket:
                heapq.heappop(self._entries)
                continue
            fresh = score_of(item)
            if fresh <= score:
                return fresh, item
            heapq.heapreplace(self._entries, (fresh, ticket, item))
        return None

    def items(self) -> dict[T, float]:
        """What is queued, and the score it was filed under."""
        return {item: score for score, ticket, item in self._entries if item.ticket == ticket}


class EvictionQueues:
    """See the module docstring. Only orders things; the cache evicts them."""

    def __init__(self, score: Callable[[Kept], float], clock: Callable[[], float]) -> None:
        self._score = score
        self._clock = clock
        tickets = itertools.count(1)
        self._dead: LazyHeap[Node] = LazyHeap(tickets)
        self._scored: LazyHeap[Kept] = LazyHeap(tickets)
        self._guaranteed: LazyHeap[Kept] = LazyHeap(tickets)

    def add_dead(self, node: Node) -> None:
        if not node.ticket:
            self._dead.push(node, node.last_used)

    def add(self, kept: Kept) -> None:
        """Files a state that was just made or used."""
        if kept.keep_until > self._clock():
            self._guaranteed.push(kept, kept.keep_until)
        else:
            self._scored.push(kept, self._score(kept))

    def withdraw(self, item: Node | Kept) -> None:
        """Nothing happens to an item that is not queued."""
        item.ticket = 0

    def next_dead(self) -> Node | None:
        entry = self._dead.peek(lambda node: node.last_used)
        return entry[1] if entry else None

    def next_scored(self) -> tuple[float, Kept] | None:
        """The state with the lowest score, and that score."""
        while (first := self.next_guaranteed()) and first.keep_until <= self._clock():
            self._scored.push(first, self._score(first))
        return self._scored.peek(self._score)

    def next_guaranteed(self) -> Kept | None:
        entry = self._guaranteed.peek(lambda kept: kept.keep_until)
        return entry[1] if entry else None

    def check(self, dead: set[Node], kept: set[Kept]) -> None:
        """Proves that exactly these are queued."""
        scored, guaranteed = self._scored.items(), self._guaranteed.items()
        assert self._dead.items().keys() == dead
        assert scored.keys().isdisjoint(guaranteed)
        assert scored.keys() | guaranteed.keys() == kept
        assert all(score <= self._score(state) for state, score in scored.items()), "a fall that nobody reported"
