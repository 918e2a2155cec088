"""Replays what a server has recorded as the server did it, maybe with another policy or in another budget.

What the cache is asked comes at the times of the record: a request takes its room when it was admitted, leaves pages
and states when its prompt was computed, and holds them, with pages for its answers, until these ended. Choices of one
prompt are forks; one that found no room, or gave its room to others, begins again when it did. Turns are computed when
the server computed them. The ends of prompts are kept, too.

Where there is less room than the server had, what is in progress ends early. A request that finds more, or less, than
it did in the server takes as long as it took there.

Not replayed: what is kept for tasks whose tools run, a second tier, and what models take from each other.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from hybrid_cache.bench.policy.replay import Simulation, boundaries_of, page_keys, prompt_keys
from hybrid_cache.bench.traces.trace import RecordedServer, Trace, TraceRequest, Turn
from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Policy, Wish
from hybrid_cache.cache.policies.signals import Origin
from hybrid_cache.spec import CacheSpec, PrefillCost

Act = Callable[[], object]


def server_replay(
    trace: Trace, server: RecordedServer, spec: CacheSpec, cost: PrefillCost, capacity_bytes: int, policy: Policy
) -> "ServerReplay":
    replay = ServerReplay(trace, spec, cost, capacity_bytes, policy, prompt_ends=True, chunk_tokens=server.chunk_tokens)
    if server.spare_state:
        replay.cache.scratch_slot()
    return replay


@dataclass(slots=True)
class ServerReplay(Simulation):
    """A cache on the clock of a record; all requests of the trace have a `stay`."""

    _due: list[tuple[float, int, Act]] = field(default_factory=list)  # a heap, by time
    _count: int = 0  # of what was ever due: breaks ties
    _run: int = 0

    def serve(self, request: TraceRequest) -> int:
        """One request -> the tokens that it could skip."""
        stay = request.stay
        assert stay is not None
        if stay.run != self._run:
            self.finish()
            self.cache.drop()
            self._run = stay.run
        self._pass_until(stay.start_s)
        self.now = max(self.now, stay.start_s)
        for turn in request.turns:
            self._later(turn.at_s, lambda turn=turn: self._begin_turn(turn))  # type: ignore[misc]
        meant = stay.meant or request
        lease = self._acquire(prompt_keys(meant, self.trace.page_tokens))
        if lease is None:
            return 0
        parts = [*stay.parts, (request.num_prompt_tokens, stay.prompted_s)]
        wishes, then = self._wishes(lease, meant), partial(self._end_prompt, lease, request)
        self._in_pieces(lease, wishes, parts, then)
        return min(lease.length, request.num_prompt_tokens)

    def finish(self) -> None:
        """Ends all that is in progress."""
        while self._due:
            self._next()

    def _acquire(self, keys: Keys) -> Lease | None:
        """Has things end when there is no room. None: it does not fit even by itself."""
        while True:
            lease = self.cache.acquire(self.cache.match("", keys), keys)
            if lease is not None or not self._due:
                return lease
            self._next()

    def _end_prompt(self, lease: Lease, request: TraceRequest) -> None:
        stay, num_tokens = request.stay, request.num_prompt_tokens
        assert stay is not None
        self._keep_end(lease, request)
        waits = {index for index, gave_s, _ in stay.again if index and gave_s <= stay.prompted_s}
        forks = [None if i in waits else self.cache.fork(lease, num_tokens) for i in range(1, len(stay.choices))]
        for index, own in enumerate((lease, *forks)):
            self._answer(own, request, index)

    def _answer(self, lease: Lease | None, request: TraceRequest, index: int, done: int = 0) -> None:
        """A choice from when it has room; none if it found none. done: of the gaps in which it held nothing"""
        stay = request.stay
        assert stay is not None
        end_s, num_generated, finish = stay.choices[index]
        gaps = [(gave_s, back_s) for each, gave_s, back_s in stay.again if each == index][done:]
        if gaps:
            self._later(gaps[0][0], lambda: self._give_way(lease))
            if gaps[0][1] < end_s:
                self._later(gaps[0][1], lambda: self._again(request, index, done))
        elif lease is not None:
            self.cache.extend(lease, request.num_prompt_tokens + max(num_generated - 1, 0))  # nobody reads the last
            self._later(end_s, lambda: self.cache.release(lease, num_generated, finish))

    def _give_way(self, lease: Lease | None) -> None:
        if lease is not None:
            self.cache.release(lease)

    def _again(self, request: TraceRequest, index: int, done: int) -> None:
        """Computes a prompt once more, for a choice that gave its room or found none."""
        lease = self._acquire(prompt_keys(request, self.trace.page_tokens))
        if lease is None:
            return self._answer(None, request, index, done + 1)
        known = not index or done > 0  # to the policy, as a prompt of its own

        def then() -> None:
            self._keep_end(lease, request)
            self._answer(lease, request, index, done + 1)

        parts = [(request.num_prompt_tokens, self.now)]
        self._in_pieces(lease, self._wishes(lease, request, again=known), parts, then)

    def _wishes(self, lease: Lease, request: TraceRequest, again: bool = False) -> list[Wish]:
        marks = boundaries_of(request.marks)
        return self.cache.propose(lease, marks, only_marked=request.only_marked, again=again, origin=request.origin)

    def _keep_end(self, lease: Lease, request: TraceRequest) -> None:
        """The state at the end of a prompt, unless it was there as a whole."""
        complete = request.stay is not None and request.stay.complete
        if complete and not request.only_marked and lease.length < request.num_prompt_tokens:
            self.cache.publish_end(lease, 0)

    def _in_pieces(
        self, lease: Lease, wishes: Iterable[Wish], parts: Iterable[tuple[int, float]], then: Act, *, idle: bool = False
    ) -> None:
        """Computes a prompt in the pieces in which the server did. What it did not compute is cut as usual, at the time
        of what follows.

        then: once it is computed   idle: others are served between its pieces, and it takes room for the states in one
        when that has its turn; else as soon as the one before has ended
        """
        most = self.trace.page_tokens if idle else self.chunk_tokens
        before, pieces = lease.length, deque[tuple[int, float]]()
        for end, at_s in parts:
            pieces += [(cut, at_s) for cut in range(before + most, end, most)]
            pieces.append((max(end, before), at_s))
            before = max(end, before)
        waiting = deque(wishes)

        def begin() -> None:
            if not idle:
                self._reserve(lease, waiting, pieces[0][0])
            self._later(pieces[0][1], end_piece)

        def end_piece() -> None:
            end, _ = pieces.popleft()
            self._reserve(lease, waiting, end)
            if end > lease.length:
                self.cache.publish(lease, end // self.trace.page_tokens * self.trace.page_tokens)
            (begin if pieces else then)()

        begin()

    def _reserve(self, lease: Lease, waiting: deque[Wish], end: int) -> None:
        """Takes room for the states up to a position that are still wished for."""
        while waiting and waiting[0].position <= end:
            wish = waiting.popleft()
            self.cache.reserve_checkpoint(lease, wish.position, wish.kind, ttl_s=wish.ttl_s)

    def _begin_turn(self, turn: Turn) -> None:
        keys = page_keys(turn.pages, self.trace.page_tokens)
        known = self.cache.match("", keys.beginning(keys.num_tokens))
        lease = None if known.length >= keys.num_tokens else self.cache.acquire(known, keys)
        if lease is not None:
            wishes = self.cache.propose(lease, boundaries_of(turn.marks), generated=True, origin=Origin(turn.session))
            parts, then = [*turn.parts, (turn.computed, turn.end_s)], partial(self.cache.release, lease)
            self._in_pieces(lease, wishes, parts, then, idle=True)

    def _later(self, at_s: float, act: Act) -> None:
        self._count += 1
        heapq.heappush(self._due, (at_s, self._count, act))

    def _pass_until(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            self._next()

    def _next(self) -> None:
        at_s, _, act = heapq.heappop(self._due)
        self.now = max(self.now, at_s)
        act()
