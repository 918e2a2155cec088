"""Rows of numbers: what a fleet saved, and how far that is from one cache that is as large as all together."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

ONE = "one cache"  # in place of a router
MEMORY = "one memory"  # the same, with memory as large as the disks and without these


@dataclass(frozen=True, slots=True)
class FleetRow:
    """One fleet on one trace and model. Shares are fractions of all prefill; bytes are of each replica, but those of a
    shared disk. None is unknown, or does not apply.
    """

    trace: str
    model: str
    policy: str
    router: str  # or ONE, MEMORY
    num_replicas: int
    capacity_bytes: int
    capacity_share: float  # of the trace's unique bytes
    token_hit_rate: float
    flops_saved: float
    one_token_hit_rate: float | None  # of one cache as large as all together
    one_flops_saved: float | None
    memory_flops_saved: float | None  # of one memory as large as the disks
    whole_flops_saved: float | None  # of the same fleet without failures
    imbalance: float  # FLOPs that the busiest replica computed, over the mean
    window_imbalance: float  # the same in a twentieth of the time, mean by work
    ttft_p50_s: float  # predicted, with what waits
    ttft_p95_s: float
    num_failures: int
    lost_bytes: int  # by failures
    disk_bytes: int
    disk_shared: bool
    disk_bytes_per_s: float
    read_bytes: int
    written_bytes: int
    moved_bytes: int  # read by another replica than wrote them
    event_delay_s: float
    failures: str
    repeat: int
    seconds: float
    cpu_seconds: float
    num_requests: int
    unique_bytes: int
    page_tokens: int
    page_bytes: int
    slot_bytes: int
    ttft_base_s: float
    ttft_flops_per_s: float
    concurrency: int
    seed: int
    note: str
    options: str
    version: str

    @property
    def lost(self) -> float | None:
        """What routing loses against one cache, of the tokens that are found."""
        return None if self.one_token_hit_rate is None else self.one_token_hit_rate - self.token_hit_rate


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A fleet without numbers."""

    trace: str
    model: str
    policy: str
    router: str
    num_replicas: int
    capacity_bytes: int
    error: str


AnyFleetRow = FleetRow | Unmeasured


def size_of(row: FleetRow) -> tuple[str, str, str, int, int]:
    """What one fleet has in common with its references: all but the router."""
    return row.trace, row.model, row.policy, row.num_replicas, row.capacity_bytes


def with_references(rows: Sequence[FleetRow]) -> list[FleetRow]:
    """The rows, each with what one cache and one memory of its size saved, and it without failures, as far as these are
    among them. Those without failures go where others are there with them.
    """
    failing = any(row.failures for row in rows)
    ones = {size_of(row): row for row in rows if row.router == ONE}
    memories = {size_of(row): row for row in rows if row.router == MEMORY}
    whole = {(*size_of(row), row.router): row for row in rows if not row.failures}
    found = list[FleetRow]()
    for row in rows:
        if failing and not row.failures and row.router not in (ONE, MEMORY):
            continue
        one, memory = ones.get(size_of(row)), memories.get(size_of(row))
        same = whole.get((*size_of(row), row.router)) if row.failures else None
        found.append(
            replace(
                row,
                one_token_hit_rate=one.token_hit_rate if one else None,
                one_flops_saved=one.flops_saved if one else None,
                memory_flops_saved=memory.flops_saved if memory else None,
                whole_flops_saved=same.flops_saved if same else None,
            )
        )
    return found


def fleet_json(rows: Sequence[AnyFleetRow]) -> bytes:
    return (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode()


def fleet_line(row: AnyFleetRow) -> bytes:
    return (json.dumps(asdict(row)) + "\n").encode()
