"""Replays a trace through the server's own cache, without tensors: what a policy would have saved.

Requests come in order of arrival; the cache's clock is the trace's. A request takes its pages, keeps the states that
the policy agrees to, and is held until `concurrency - 1` later ones have come, so that it pins what it uses. An answer
that the trace knows goes through the prefill path afterwards, as the server does when it is idle.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.bench.traces.trace import Mark, PageIds, Trace, TraceRequest
from hybrid_cache.cache.books import Books
from hybrid_cache.cache.commands import Emit, nowhere
from hybrid_cache.cache.keys import NAME_BYTES, Keys, Name, named_keys
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.rehearsal import CHUNK_TOKENS, publish
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.stats import CacheStats
from hybrid_cache.tokens import Boundary, BoundaryKind

SAMPLES = 200  # moments at which the bytes of a replay are looked at


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay, request by request and in all."""

    hit_tokens: NDArray[np.int64]  # [requests] tokens that were not computed
    flops_saved: float
    flops_total: float
    mean_bytes: dict[str, float]  # by kind of content, over the replay
    stats: CacheStats  # at the end

    @property
    def flops_saved_share(self) -> float:
        return self.flops_saved / self.flops_total


@dataclass(slots=True)
class Simulation:
    """A cache on a simulated clock, fed with the requests of one trace."""

    trace: Trace
    spec: CacheSpec
    cost: PrefillCost
    capacity_bytes: int
    policy: Policy
    concurrency: int = 1
    prompt_ends: bool = False  # keep whole prompts for exact repeats too, as the server does
    chunk_tokens: int = CHUNK_TOKENS  # of a prompt that is computed and published at a time; answers go by the page
    now: float = 0.0
    emit: Emit = nowhere
    cache: Books = field(init=False)
    _held: deque[tuple[Lease, TraceRequest]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.cache = Books(
            self.spec,
            self.cost,
            self.capacity_bytes,
            self.policy,
            emit=self.emit,
            page_tokens=self.trace.page_tokens,
            clock=lambda: self.now,
        )

    def run(self, progress: Callable[[], None] | None = None) -> Replay:
        """Replays all requests; `progress` is called after each."""
        requests, saved, total = self.trace.requests, 0.0, 0.0
        hits = np.zeros(len(requests), np.int64)
        bytes_seen: Counter[str] = Counter()
        every = max(len(requests) // SAMPLES, 1)
        num_samples = 0
        for i, request in enumerate(requests):
            hits[i] = hit = self.serve(request)
            saved += self.cost.flops(0, hit)
            total += self.cost.flops(0, request.num_prompt_tokens)
            if i % every == every - 1:
                stats = self.cache.stats()
                num_samples += 1
                bytes_seen.update(
                    kv=stats.kv_bytes, states=stats.checkpoint_bytes + stats.prompt_end_bytes, free=stats.free_bytes
                )
            if progress is not None:
                progress()
        self.finish()
        means = {kind: total_bytes / max(num_samples, 1) for kind, total_bytes in bytes_seen.items()}
        return Replay(hits, saved, total, means, self.cache.stats())

    def finish(self) -> None:
        """Ends all requests in progress."""
        while self._held:
            self._finish()

    def serve(self, request: TraceRequest) -> int:
        """One request -> the tokens that it could skip."""
        self.now = max(self.now, request.arrival_s)
        while len(self._held) >= self.concurrency:
            self._finish()
        lease = self._acquire(self._prompt_keys(request))
        if lease is None:
            return 0
        self._compute(lease, request, request.marks, generated=False)
        if self.prompt_ends:
            self.cache.publish_end(lease, 0)
        self._held.append((lease, request))
        if self.concurrency == 1:
            self._finish()
        return lease.length

    def _acquire(self, keys: Keys) -> Lease | None:
        """Waits for requests in progress when there is no room. None: it does not fit even by itself."""
        while True:
            lease = self.cache.acquire(self.cache.match("", keys), keys)
            if lease is not None or not self._held:
                return lease
            self._finish()

    def _compute(self, lease: Lease, request: TraceRequest, marks: Sequence[Mark], *, generated: bool) -> None:
        wishes = self.cache.propose(lease, boundaries_of(marks), generated=generated, origin=request.origin)
        page = self.trace.page_tokens
        publish(self.cache, lease, wishes, page, page if generated else self.chunk_tokens)

    def _finish(self) -> None:
        """Ends the oldest request in progress; its answer enters the cache."""
        lease, request = self._held.popleft()
        self.cache.release(lease, request.num_output_tokens, request.finish)
        page = self.trace.page_tokens
        if request.num_known_tokens // page <= request.num_prompt_tokens // page:
            return
        keys = page_keys(request.pages, page)
        commit = self.cache.acquire(self.cache.match("", keys), keys)
        if commit is not None:
            self._compute(commit, request, (), generated=True)
            self.cache.release(commit)

    def _prompt_keys(self, request: TraceRequest) -> Keys:
        return prompt_keys(request, self.trace.page_tokens)


def prompt_keys(request: TraceRequest, page_tokens: int) -> Keys:
    full, rest = divmod(request.num_prompt_tokens, page_tokens)
    tail = _name(request.whole) if rest else b""
    return named_keys("", _names(request.pages[:full]), tail, request.num_prompt_tokens)


def page_keys(pages: PageIds, page_tokens: int) -> Keys:
    """Of whole pages."""
    return named_keys("", _names(pages), b"", len(pages) * page_tokens)


def boundaries_of(marks: Sequence[Mark]) -> list[Boundary]:
    return [
        Boundary(m.position, BoundaryKind.EXPLICIT if m.explicit else BoundaryKind.MESSAGE_END, m.ttl_s, m.role)
        for m in marks
    ]


def _names(pages: PageIds) -> list[Name]:
    return [_name(page) for page in pages.tolist()]


def _name(number: int) -> Name:
    return number.to_bytes(NAME_BYTES, "little", signed=True)
