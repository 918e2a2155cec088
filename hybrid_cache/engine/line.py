"""Those who wait, in the order in which they are looked at.

    gave way   who has run before and had to make room
    overdue    the one that has waited longest, once that is many times as long as others wait
    held       tasks that return to what the cache still has
    late       who has waited for as long as the order lets anybody wait, longest wait first
    new        all others, by the order's key

Tenants take turns: the one goes first for whom least is computed and under way.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum

from hybrid_cache.engine.sequence import Phase, Sequence
from hybrid_cache.engine.shares import Shares


class Rank(IntEnum):
    """See the module docstring."""

    GAVE_WAY = 0
    OVERDUE = 1
    HELD = 2
    LATE = 3
    NEW = 4


FEW = 64
Place = tuple[Rank, float, int, int]  # rank, key, arrival, choice


class Line:
    """See the module docstring. Adding, removing and taking the first take O(log n) each."""

    def __init__(self, place_of: Callable[[Sequence], tuple[Rank, float]]) -> None:
        """place_of: the rank and the key of a sequence now; within a rank the lowest key goes first"""
        self._place_of = place_of
        self._tickets: dict[Sequence, int] = {}  # of the one valid entry of each
        self._numbers = itertools.count()
        self._queues: dict[str, list[tuple[Place, int, Sequence]]] = {}  # by tenant, heaps
        self.num_requests = 0  # further choices of one that has begun are not counted
        self.num_tasks = 0  # requests that begin one
        self._beginners: set[Sequence] = set()  # these, as they were when they came

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._tickets))

    def add(self, sequence: Sequence) -> None:
        self._count(sequence, 1)
        self._file(sequence)

    def remove(self, sequence: Sequence) -> None:
        del self._tickets[sequence]
        self._count(sequence, -1)

    def place_again(self, sequences: Iterable[Sequence]) -> None:
        """To be called for those whose rank or key has fallen. A higher one is noticed when it is first."""
        for sequence in sequences:
            self._file(sequence)

    def in_turn(self, running: Iterable[Sequence], shares: Shares) -> Iterator[Sequence]:
        """Takes sequences out, one after the other; those that go on waiting are to be put back with `add`."""
        under_way: Counter[str] = Counter()
        if shares.compares:
            under_way.update({tenant: shares.served(tenant) for tenant in self._queues})
            for sequence in running:
                under_way[sequence.request.tenant] += sequence.prefill.num_left
        while self._tickets:
            sequence = self._first(under_way)
            self.remove(sequence)
            yield sequence
            if sequence.phase is not Phase.WAITING:
                under_way[sequence.request.tenant] += sequence.prefill.num_left

    def _first(self, under_way: Counter[str]) -> Sequence:
        while True:
            for tenant in [tenant for tenant, queue in self._queues.items() if not self._clean(queue)]:
                del self._queues[tenant]
            tenant = min(self._queues, key=lambda each: (under_way[each], self._queues[each][0][0]))
            place, _, sequence = self._queues[tenant][0]
            if self._place(sequence) <= place:
                return sequence
            self._file(sequence)

    def _clean(self, queue: list[tuple[Place, int, Sequence]]) -> bool:
        """Drops entries at the head of a queue that are no longer valid -> whether any are left."""
        while queue and self._tickets.get(queue[0][2]) != queue[0][1]:
            heapq.heappop(queue)
        return bool(queue)

    def _place(self, sequence: Sequence) -> Place:
        return (*self._place_of(sequence), *sequence.rank)

    def _file(self, sequence: Sequence) -> None:
        ticket = self._tickets[sequence] = next(self._numbers)
        queue = self._queues.setdefault(sequence.request.tenant, [])
        if len(queue) > FEW + 2 * len(self._tickets):  # most are no longer valid
            queue[:] = [entry for entry in queue if self._tickets.get(entry[2]) == entry[1] != ticket]
            heapq.heapify(queue)
        heapq.heappush(queue, (self._place(sequence), ticket, sequence))

    def _count(self, sequence: Sequence, change: int) -> None:
        self.num_requests += change * (sequence.index == 0)
        if change < 0:
            self._beginners.discard(sequence)
        elif sequence.index == 0 and sequence.task is not None and not sequence.task.num_calls:
            self._beginners.add(sequence)
        self.num_tasks = len(self._beginners)
