"""A trace through many caches behind a router, on the trace's clock: what each request finds, and where it waits.

A replica computes one prompt after the other, at a constant rate; what waits before a prompt is how busy its replica
is. That matters for where routers send requests, and for the predicted time to the first token. When a request comes
does not depend on it: the trace says that.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.bench.fleet.failures import Failure
from hybrid_cache.bench.fleet.paper_disk import DiskSpeed, PaperFolder, PaperStorage
from hybrid_cache.bench.fleet.replica import Replica
from hybrid_cache.bench.fleet.routers import Ask, Router
from hybrid_cache.bench.policy.cells import Setting
from hybrid_cache.bench.policy.replay import prompt_keys
from hybrid_cache.bench.traces.trace import PageIds, Trace, TraceRequest
from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.cache.resumable import Change, Cleared, Stored

Floats = NDArray[np.float64]

OPENING_TOKENS = 1024  # that name a conversation where the trace says no session and no user's message
LATELY_S = 60.0  # after which work of late counts 1/e
WINDOWS = 20  # of a replay, for how uneven it is for a while
NVME = DiskSpeed(3e9)
ALL_NAMES = 1 << 70  # more than there are names of whole prompts
GAP_S = 1.0  # between two repetitions of a trace


@dataclass(frozen=True, slots=True)
class Plan:
    """How a fleet is made. Bytes are of each replica, but those of a disk that all share."""

    num_replicas: int
    capacity_bytes: int
    policy: str
    event_delay_s: float = 0.0
    failures: tuple[Failure, ...] = ()
    disk_bytes: int = 0  # 0 for none
    shared: bool = False  # one disk for all
    disk_speed: DiskSpeed = NVME
    repeat: int = 1


@dataclass(slots=True)
class Tally:
    """What came of a replay."""

    hit_tokens: int = 0
    prompt_tokens: int = 0
    saved: float = 0.0  # FLOPs
    total: float = 0.0
    lost_bytes: int = 0  # of caches, by failures
    num_failures: int = 0
    read_bytes: int = 0  # of disks
    written_bytes: int = 0
    moved_bytes: int = 0  # read by others than who wrote it


class Fleet:
    """To be closed."""

    def __init__(self, setting: Setting, plan: Plan, router: Router) -> None:
        """Raises ConfigError for a budget or a policy that cannot be."""
        self._setting, self._plan, self._router = setting, plan, router
        num_disks = 0 if not plan.disk_bytes else 1 if plan.shared else plan.num_replicas
        self._folders = [PaperFolder(plan.disk_bytes, plan.disk_speed) for _ in range(num_disks)]
        try:
            self._replicas = [self._fresh(i) for i in range(plan.num_replicas)]
        except BaseException:
            self.close()
            raise
        self._failures = deque(plan.failures)
        self._away = [-math.inf] * plan.num_replicas  # until when
        self._up = list(range(plan.num_replicas))
        self._free = np.zeros(plan.num_replicas)  # when the work of each is done
        self._lately, self._done = np.zeros(plan.num_replicas), np.zeros(plan.num_replicas)  # seconds of work
        self._now = 0.0
        self._told = deque[tuple[float, int, Change]]()
        first, last = times(setting.trace, plan.repeat)
        self._first_s, self._window_s = first, max(last - first, 1e-9) / WINDOWS
        self.computed = np.zeros((WINDOWS, plan.num_replicas))  # FLOPs
        self.ttft_s: list[float] = []
        self.tally = Tally()

    def close(self) -> None:
        for folder in self._folders:
            folder.close()

    def run(self) -> Tally:
        for request in repeated(self._setting.trace, self._plan.repeat):
            self._serve(request)
        for folder in self._folders:
            self.tally.read_bytes += folder.read_bytes
            self.tally.written_bytes += folder.written_bytes
            self.tally.moved_bytes += folder.moved_bytes
        return self.tally

    def _serve(self, request: TraceRequest) -> None:
        s, now, tally = self._setting, max(self._now, request.arrival_s), self.tally
        self._pass_until(now)
        keys = prompt_keys(request, s.trace.page_tokens)
        i = self._router.choose(self._ask(request, keys)) if len(self._up) > 1 else self._up[0]
        replica = self._replicas[i]
        loaded_s = replica.storage.loaded_s if replica.storage else 0.0
        replica.keys = keys
        hit = replica.serve(request)
        replica.write()
        loaded_s = replica.storage.loaded_s - loaded_s if replica.storage else 0.0
        flops = s.cost.flops(hit, keys.num_tokens)
        self._work(i, now, flops, loaded_s)
        self._listen(i, now)
        tally.hit_tokens += hit
        tally.prompt_tokens += keys.num_tokens
        tally.total += s.cost.flops(0, keys.num_tokens)
        tally.saved += s.cost.flops(0, hit)

    def _work(self, i: int, now: float, flops: float, loaded_s: float) -> None:
        speed = self._setting.speed
        work_s = flops / speed.flops_per_s
        self._free[i] = done = max(float(self._free[i]), now) + loaded_s + work_s
        self._lately[i] += work_s
        self._done[i] += work_s
        self.ttft_s.append(done - now + speed.base_s)
        self.computed[min(int((now - self._first_s) / self._window_s), WINDOWS - 1), i] += flops

    def _ask(self, request: TraceRequest, keys: Keys) -> Ask:
        s = self._setting
        page_tokens, rate = s.trace.page_tokens, s.speed.flops_per_s
        most = max(keys.num_tokens - 1, 0) // page_tokens
        return Ask(
            names=keys.pages[:most],
            conversation=conversation_of(request, keys, page_tokens),
            up=self._up,
            busy_s=np.maximum(self._free - self._now, 0.0).tolist(),
            lately_s=self._lately.tolist(),
            done_s=self._done.tolist(),
            seconds=lambda pages: s.cost.flops(pages * page_tokens, keys.num_tokens) / rate,
        )

    # Time

    def _pass_until(self, now: float) -> None:
        while self._failures and self._failures[0].at_s <= now:
            self._fail(self._failures.popleft())
        if now > self._now:
            self._lately *= math.exp((self._now - now) / LATELY_S)
            self._now = now
        if self._plan.failures:
            up = [i for i, until in enumerate(self._away) if until <= now]
            self._up = up or [min(range(len(self._away)), key=self._away.__getitem__)]
        while self._told and self._told[0][0] <= now:
            self._tell(*self._told.popleft()[1:])

    def _fail(self, failure: Failure) -> None:
        """It loses its memory; what its disk has stays."""
        i, stats = failure.replica, self._replicas[failure.replica].cache.stats()
        self.tally.num_failures += 1
        self.tally.lost_bytes += stats.kv_bytes + stats.checkpoint_bytes
        self._replicas[i] = self._fresh(i)
        self._away[i] = max(self._away[i], failure.at_s + failure.away_s)
        self._free[i] = 0.0
        self._told.append((failure.at_s + self._plan.event_delay_s, i, Cleared()))

    def _fresh(self, i: int) -> Replica:
        s, plan = self._setting, self._plan
        folder = self._folders[i if len(self._folders) > 1 else 0] if self._folders else None
        return Replica(
            trace=s.trace,
            spec=s.spec,
            cost=s.cost,
            capacity_bytes=plan.capacity_bytes,
            policy=make_policy(plan.policy, s.spec, s.cost, plan.capacity_bytes),
            concurrency=s.concurrency,
            storage=PaperStorage(folder, i) if folder else None,
            disk_bytes=plan.disk_bytes,
            flops_per_s=s.speed.flops_per_s,
            tells=self._router.hears,
        )

    # Events

    def _listen(self, i: int, now: float) -> None:
        if self._router.hears:
            due = now + self._plan.event_delay_s
            self._told.extend((due, i, change) for change in self._replicas[i].changes())

    def _tell(self, i: int, change: Change) -> None:
        if isinstance(change, Cleared):
            self._router.cleared(i)
        elif isinstance(change, Stored):
            self._router.stored(i, change.names)
        else:
            self._router.removed(i, change.names)


def conversation_of(request: TraceRequest, keys: Keys, page_tokens: int) -> bytes:
    """The session; where the trace does not say, the prompt up to the end of the first message of a user, or its first
    tokens.
    """
    if request.session:
        return request.session.encode()
    opening = next((mark.position for mark in request.marks if mark.role == "user"), OPENING_TOKENS)
    num_pages = min(max(opening // page_tokens, 1), len(keys.pages))
    return keys.pages[num_pages - 1] if num_pages else keys.tail


def times(trace: Trace, repeat: int) -> tuple[float, float]:
    """When the first request comes, and the last one."""
    first, last = trace.requests[0].arrival_s, trace.requests[-1].arrival_s
    return first, last + (repeat - 1) * (last - first + GAP_S)


def repeated(trace: Trace, repeat: int) -> Iterator[TraceRequest]:
    """The requests, again and again, each time as other conversations, one time after the other."""
    yield from trace.requests
    if repeat == 1:
        return
    size = 1 + max(int(r.all_pages.max(initial=-1)) for r in trace.requests)
    first, last = times(trace, 1)
    for number in range(1, repeat):
        offset, later_s = number * size, number * (last - first + GAP_S)
        for r in trace.requests:
            session = f"{r.session} {number}" if r.session else ""
            pages: PageIds = r.pages + np.int32(offset)
            yield replace(
                r, arrival_s=r.arrival_s + later_s, session=session, pages=pages, whole=r.whole + number * ALL_NAMES
            )
