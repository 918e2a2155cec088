"""Tasks in the engine: which one a request belongs to, its place among those who wait, and what is kept for it.

Orders decide (`scheduling`); here they are asked, and told what runs.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.claims import Spare
from hybrid_cache.engine.line import Line, Rank
from hybrid_cache.engine.pace import Pace
from hybrid_cache.engine.sequence import Phase, Sequence
from hybrid_cache.engine.shares import Shares
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import FinishReason
from hybrid_cache.scheduling.base import Job, Load, Order, Pause, Task
from hybrid_cache.scheduling.pauses import Pauses
from hybrid_cache.spec import PrefillCost
from hybrid_cache.tokens import Prompt

HOST_BYTES_PER_S = 20e9  # a guess, for a GPU on PCIe
MOST_CHOICES = 1 << 20  # more than a request has
OVERDUE_WAITS, LEAST_OVERDUE_S = 16.0, 60.0  # present waits, and seconds, after which the oldest goes before all others
NEWEST = 0.02  # weight of the newest task in the mean time between two that begin


class Tasks:
    """Owns those who wait, and the pauses. The scheduler owns those who run."""

    def __init__(self, order: Order, cache: Books, cost: PrefillCost, pace: Pace, clock: Callable[[], float]) -> None:
        host_bytes_per_s = HOST_BYTES_PER_S if cache.has_host else 0.0
        self.load = Load(cache.budget_bytes, *cache.context_bytes, cost, host_bytes_per_s)
        self.pauses = Pauses(cache.claims, order, self.load)
        self.waiting = Line(self._place)
        self._order = order
        self._cache = cache
        self._pace = pace
        self._clock = clock
        self._jobs: dict[Sequence, Job] = {}  # of those who wait and have not run yet
        self._impatient: list[tuple[float, int, Sequence]] = []  # when each becomes late, a heap
        self._late: set[Sequence] = set()
        self._overdue: Sequence | None = None
        self._since_s = 0.0  # when a task last began to run, or to wait where none did
        self._between_s = 0.0  # time between two that begin to run, in the mean, while any wait

    def look(self) -> None:
        """Notes how things are."""
        load, pace = self.load, self._pace
        load.now, load.running_bytes = self._clock(), self._cache.fixed_bytes
        load.s_per_flop, load.step_s, load.row_s = pace.s_per_flop, pace.step_s, pace.row_s
        load.wait_s = self.waiting.num_tasks * self._between_s
        while self._impatient and self._impatient[0][0] <= load.now:
            sequence = heapq.heappop(self._impatient)[2]
            if sequence in self._jobs:
                self._late.add(sequence)
                self.waiting.place_again((sequence,))
        self.pauses.forget_old()
        self._look_for_overdue()
        if self._jobs and self._order.turns(load):
            self.waiting.place_again(self._jobs)

    def _look_for_overdue(self) -> None:
        """Tasks that return at once, again and again, are not to keep others out for ever."""
        oldest = next(iter(self._jobs), None)
        if oldest is None or oldest is self._overdue or not self._order.resumes:
            return
        if self.load.now - self._jobs[oldest].submitted_s > max(OVERDUE_WAITS * self.load.wait_s, LEAST_OVERDUE_S):
            self._overdue = oldest
            self.waiting.place_again((oldest,))

    # Those who wait

    def enter(self, sequence: Sequence, num_cached: int) -> None:
        """A sequence begins to wait. num_cached: tokens of its prompt that the cache has"""
        if sequence.task is None:
            self.look()
            sequence.task = self._task(sequence)
        max_tokens, num_tokens = sequence.request.sampling.max_tokens, len(sequence.prefill.tokens)
        job = Job(sequence.task, sequence.submitted_s, num_tokens, num_cached, max_tokens)
        self._jobs[sequence] = job
        self._order.came(job, self.load)
        if self._order.patience_s < math.inf:
            self._impatient = [entry for entry in self._impatient if entry[2] in self._jobs]  # a heap still
            due_s = sequence.submitted_s + self._order.patience_s
            heapq.heappush(self._impatient, (due_s, sequence.arrival * MOST_CHOICES + sequence.index, sequence))
        if not (sequence.task.num_calls or self.waiting.num_tasks):
            self._since_s = self.load.now
        self.waiting.add(sequence)

    def _task(self, sequence: Sequence) -> Task:
        """The one that a new request belongs to."""
        request, prefill = sequence.request, sequence.prefill
        if resumable(sequence):
            sequence.claim = self.pauses.resumed(
                request.tenant,
                request.session,
                prefill.text,
                kind=request.kind,
                answers=_answers(request.prompt),
                request_id=sequence.continues,
            )
        if sequence.claim is None:
            return Task(self.load.now, request.tenant, request.kind)
        task = sequence.claim.task
        new = len(prefill.tokens) - sequence.claim.num_tokens
        self.load.outlook.grown(task.tenant, task.kind, max(new, 0))
        return task

    def gave_way(self, sequence: Sequence) -> None:
        """A running sequence waits again; it still has its lease."""
        lease = sequence.prefill.lease
        self._drop_claim(sequence)
        if resumable(sequence) and lease is not None and sequence.task is not None:
            sequence.claim = Pause(task=sequence.task, returned=True)
            self._cache.claims.place(sequence.claim, lease.tip, sequence.num_tokens)

    def in_turn(self, running: Iterable[Sequence], shares: Shares) -> Iterator[Sequence]:
        """As `Line.in_turn`."""
        self.look()
        return self.waiting.in_turn(running, shares)

    def gone(self, sequence: Sequence) -> None:
        """A sequence that waits or runs has ended."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
            self._no_longer_new(sequence)
        self._drop_claim(sequence)

    def _place(self, sequence: Sequence) -> tuple[Rank, float]:
        job = self._jobs.get(sequence)
        if job is None:
            return Rank.GAVE_WAY, 0.0
        if sequence is self._overdue:
            return Rank.OVERDUE, sequence.submitted_s
        claim = sequence.claim
        if claim is not None and self._order.resumes and 2 * claim.num_resumed >= claim.num_tokens > 0:
            return Rank.HELD, sequence.submitted_s
        if sequence in self._late:
            return Rank.LATE, sequence.submitted_s
        return Rank.NEW, self._order.key(job, self.load)

    # Those who run

    def spare(self, *, busy: bool) -> Spare | None:
        """What is not to go for a request that is to be admitted. busy: while others run"""
        return self.pauses.keeps if busy else None

    def reserves(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether a request that is to be admitted takes room for what its task will return to."""
        job = self._jobs.get(sequence)
        if job is None or not resumable(sequence) or sequence.prefill.only_marked:
            sequence.reserves = False
        else:
            sequence.reserves = self._order.reserves(job, self.load)
        return sequence.reserves

    def admitted(self, sequence: Sequence) -> None:
        """A sequence runs from now on, and holds what it needs."""
        self._drop_claim(sequence)
        overdue = sequence is self._overdue
        self._no_longer_new(sequence)
        lease = sequence.prefill.lease
        if lease is not None and len(sequence.prefill.tokens) - lease.length < TILE:
            self.began(sequence)  # its task returns to what the prompt starts from
        if sequence.task is not None and not sequence.task.num_calls and not sequence.started_s:
            between_s = self.load.now - self._since_s
            if overdue:  # or those who were kept out would make others wait longer before these are overdue
                between_s = min(between_s, max(self._between_s, LEAST_OVERDUE_S / OVERDUE_WAITS))
            self._between_s += NEWEST * (between_s - self._between_s) if self._between_s else between_s
            self._since_s = self.load.now

    def began(self, sequence: Sequence) -> None:
        """The prompt of a sequence is computed: its task may return to it."""
        task, lease = sequence.task, sequence.prefill.lease
        if sequence.reserves and sequence.claim is None and task is not None and lease is not None:
            sequence.claim = Pause(task=task, running=True)
            self._cache.claims.place(sequence.claim, lease.stem_tip, len(sequence.prefill.tokens))

    def end_turn(self, sequence: Sequence, finish: FinishReason) -> None:
        """A sequence has got its last token; it still has its lease."""
        task, prefill, request = sequence.task, sequence.prefill, sequence.request
        if task is None or not resumable(sequence):
            return
        self.look()
        self.load.outlook.answered(task.tenant, task.kind, task.num_calls, len(sequence.generated))
        num_tokens = len(prefill.tokens)
        task.spent_s += self.load.call_s(prefill.cached or 0, num_tokens, len(sequence.generated))
        task.num_calls += 1
        last = max((b.position for b in request.prompt.boundaries), default=0)
        said = last if last > num_tokens - TILE else num_tokens  # behind the last message comes a header at most
        tip = prefill.lease.stem_tip if prefill.lease is not None else None
        self.pauses.ended(request.id, task, request.session, prefill.text, said, tip, len(sequence.generated))
        if finish is FinishReason.TOOL_CALL:
            self.pauses.called(request.id, "", None)

    def _no_longer_new(self, sequence: Sequence) -> None:
        self._jobs.pop(sequence, None)
        self._late.discard(sequence)
        if sequence is self._overdue:
            self._overdue = None

    def _drop_claim(self, sequence: Sequence) -> None:
        if sequence.claim is not None:
            self._cache.claims.drop(sequence.claim)
            sequence.claim = None


def resumable(sequence: Sequence) -> bool:
    """Whether another request may go on from where this one ends."""
    return sequence.request.n == 1 and sequence.prefill.publish and sequence.prefill.reuse


def _answers(prompt: Prompt) -> bool | None:
    """Whether a prompt brings a tool's result behind the last answer in it; None where it does not say whose words
    are whose.
    """
    roles = [boundary.role for boundary in prompt.boundaries]
    if not any(roles):
        return None
    since = len(roles) - roles[::-1].index("assistant") if "assistant" in roles else 0
    return "tool" in roles[since:]
