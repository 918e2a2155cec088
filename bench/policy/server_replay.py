"""Replays what a server has recorded as the server did it, maybe with another policy or in another budget.

Requests hold what they need from when they were admitted until they ended, with pages for their answers; choices of one
prompt are forks; turns are computed when the server computed them; the ends of prompts are kept, and a state stands
aside for rows that pad a batch. Where there is less room than the server had, requests in progress end early.

Not replayed: what is kept for tasks whose tools run, a second tier, and what models take from each other.
"""

import heapq
from dataclasses import dataclass, field

from hybrid_cache.bench.policy.replay import Simulation, boundaries_of, page_keys, prompt_keys
from hybrid_cache.bench.traces.trace import Stay, TraceRequest, Turn
from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.rehearsal import publish


@dataclass(frozen=True, slots=True)
class Choice:
    """One in progress."""

    lease: Lease
    num_tokens: int


@dataclass(slots=True)
class ServerReplay(Simulation):
    """A cache on the clock of a record; all requests of the trace have a `stay`."""

    _due: list[tuple[float, int, Choice | Turn]] = field(default_factory=list)  # a heap, by time
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
        self.cache.scratch_slot()
        for turn in request.turns:
            self._later(turn.at_s, turn)
        lease = self._acquire(prompt_keys(request, self.trace.page_tokens))
        if lease is None:
            return 0
        self._compute_prompt(lease, request)
        if stay.complete and not request.only_marked:
            self.cache.publish_end(lease, 0)
        self._answer(lease, request, stay)
        return lease.length

    def finish(self) -> None:
        """Ends all requests in progress, and computes all turns."""
        while self._due:
            self._next()

    def _acquire(self, keys: Keys) -> Lease | None:
        """Waits for requests in progress when there is no room. None: it does not fit even by itself."""
        while True:
            lease = self.cache.acquire(self.cache.match("", keys), keys)
            if lease is not None or not any(isinstance(due, Choice) for *_, due in self._due):
                return lease
            self._next()

    def _compute_prompt(self, lease: Lease, request: TraceRequest) -> None:
        wishes = self.cache.propose(
            lease, boundaries_of(request.marks), only_marked=request.only_marked, session=request.session
        )
        publish(self.cache, lease, wishes, self.trace.page_tokens, self.chunk_tokens)

    def _answer(self, lease: Lease, request: TraceRequest, stay: Stay) -> None:
        """Holds what the answers take until they end."""
        forks = [self.cache.fork(lease, request.num_prompt_tokens) for _ in stay.choices[1:]]
        for (end_s, num_tokens), own in zip(stay.choices, (lease, *forks), strict=True):
            if own is not None:
                self.cache.extend(own, request.num_prompt_tokens + num_tokens)
                self._later(end_s, Choice(own, num_tokens))

    def _later(self, at_s: float, due: Choice | Turn) -> None:
        self._count += 1
        heapq.heappush(self._due, (at_s, self._count, due))

    def _pass_until(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            self._next()

    def _next(self) -> None:
        at_s, _, due = heapq.heappop(self._due)
        self.now = max(self.now, at_s)
        if isinstance(due, Choice):
            self.cache.release(due.lease, due.num_tokens)
        else:
            self._compute_turn(due)

    def _compute_turn(self, turn: Turn) -> None:
        keys = page_keys(turn.pages, self.trace.page_tokens)
        known = self.cache.match("", keys.beginning(keys.num_tokens))
        if known.length >= keys.num_tokens:
            return
        lease = self.cache.acquire(known, keys)
        if lease is None:
            return
        wishes = self.cache.propose(lease, boundaries_of(turn.marks), generated=True, session=turn.session)
        publish(self.cache, lease, wishes, self.trace.page_tokens, self.trace.page_tokens)
        self.cache.release(lease)
