"""One fleet of `hybrid-cache bench policy --replicas` -> one row of numbers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_cache import __version__
from hybrid_cache.bench.common.processes import spread
from hybrid_cache.bench.fleet.failures import failures_of
from hybrid_cache.bench.fleet.fleet import Fleet, Plan, times
from hybrid_cache.bench.fleet.paper_disk import DiskSpeed
from hybrid_cache.bench.fleet.routers import ROUTERS, make_router
from hybrid_cache.bench.fleet.rows import MEMORY, ONE, AnyFleetRow, FleetRow, Unmeasured
from hybrid_cache.bench.policy.cells import Setting
from hybrid_cache.cache.policies.foreign import described, is_foreign
from hybrid_cache.errors import HybridCacheError


@dataclass(frozen=True, slots=True)
class FleetCell:
    """A fleet that is to be replayed; or, by its router, the one cache or one memory that it is compared with."""

    setting: Setting
    policy: str
    router: str
    num_replicas: int
    capacity_bytes: int
    event_delay_s: float
    failures: str
    disk_bytes: int
    shared: bool
    disk_speed: DiskSpeed
    repeat: int

    def plan(self) -> Plan:
        """Raises ConfigError."""
        if self.router == MEMORY:
            return Plan(1, self.all_disks, self.policy, repeat=self.repeat)
        if self.router == ONE:
            memory = self.num_replicas * self.capacity_bytes
            return Plan(1, memory, self.policy, 0.0, (), self.all_disks, True, self.disk_speed, self.repeat)
        start_s, end_s = times(self.setting.trace, self.repeat)
        failures = tuple(failures_of(self.failures, self.num_replicas, start_s, end_s, self.setting.seed))
        disk = self.disk_bytes, self.shared, self.disk_speed
        return Plan(
            self.num_replicas, self.capacity_bytes, self.policy, self.event_delay_s, failures, *disk, self.repeat
        )

    @property
    def all_disks(self) -> int:
        """Bytes of the disks together."""
        return self.disk_bytes * (1 if self.shared else self.num_replicas)


def attempted(cell: FleetCell) -> AnyFleetRow:
    """The numbers of a fleet, or why there are none. What a router or a policy from elsewhere raises is its affair."""
    try:
        return measured(cell)
    except HybridCacheError as error:
        reason = str(error)
    except Exception as error:
        if not is_foreign(cell.policy) and cell.router in (*ROUTERS, ONE, MEMORY):
            raise
        reason = f"{cell.router} with {cell.policy} raised {described(error)}"
    s = cell.setting
    where = s.trace.name, s.model, cell.policy, cell.router, cell.num_replicas, cell.capacity_bytes
    return Unmeasured(*where, " ".join(reason.split()))


def measured(cell: FleetCell) -> FleetRow:
    began_s, began_cpu_s, s, plan = time.perf_counter(), time.process_time(), cell.setting, cell.plan()
    name = cell.router if cell.router not in (ONE, MEMORY) else next(iter(ROUTERS))  # one cache needs none
    fleet = Fleet(s, plan, make_router(name, plan.num_replicas, s.seed))
    try:
        tally = fleet.run()
    finally:
        fleet.close()
    p50, p95 = np.percentile(fleet.ttft_s, (50, 95)).tolist()
    return FleetRow(
        trace=s.trace.name,
        model=s.model,
        policy=cell.policy,
        router=cell.router,
        num_replicas=cell.num_replicas,
        capacity_bytes=cell.capacity_bytes,
        capacity_share=cell.capacity_bytes / s.unique_bytes,
        token_hit_rate=tally.hit_tokens / tally.prompt_tokens,
        flops_saved=tally.saved / tally.total,
        one_token_hit_rate=None,
        one_flops_saved=None,
        memory_flops_saved=None,
        whole_flops_saved=None,
        imbalance=unevenness(fleet.computed.sum(0, keepdims=True)),
        window_imbalance=unevenness(fleet.computed),
        ttft_p50_s=p50,
        ttft_p95_s=p95,
        num_failures=tally.num_failures,
        lost_bytes=tally.lost_bytes,
        disk_bytes=cell.disk_bytes,
        disk_shared=cell.shared,
        disk_bytes_per_s=cell.disk_speed.bytes_per_s,
        read_bytes=tally.read_bytes,
        written_bytes=tally.written_bytes,
        moved_bytes=tally.moved_bytes,
        event_delay_s=cell.event_delay_s,
        failures=cell.failures,
        repeat=cell.repeat,
        seconds=time.perf_counter() - began_s,
        cpu_seconds=time.process_time() - began_cpu_s,
        num_requests=len(s.trace.requests) * cell.repeat,
        unique_bytes=s.unique_bytes,
        page_tokens=s.trace.page_tokens,
        page_bytes=s.page_bytes,
        slot_bytes=s.slot_bytes,
        ttft_base_s=s.speed.base_s,
        ttft_flops_per_s=s.speed.flops_per_s,
        concurrency=s.concurrency,
        seed=s.seed,
        note=s.trace.note,
        options=s.options,
        version=__version__,
    )


def unevenness(computed: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    """[windows, replicas] FLOPs -> the busiest replica's over the mean, in the mean over windows by their work."""
    work = computed.sum(1)
    if not work.sum():
        return 1.0
    return float(computed.max(1).sum() * computed.shape[1] / work.sum())


def all_attempted(cells: Sequence[FleetCell], jobs: int) -> Iterator[tuple[int, AnyFleetRow]]:
    """Rows as they come, each with the number of its cell."""
    return spread(attempted, cells, jobs)
