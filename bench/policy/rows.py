"""Rows of numbers: what each policy saved on each trace, and how far that is from the others and from the bound."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

BASELINE, BOUND, INFINITE = "lru", "bound", "infinite"
LIMITS = (BOUND, INFINITE)
STATIC, HINDSIGHT, BELADY = "marconi-static", "learned-hindsight", "belady"
CLAIRVOYANT = (STATIC, HINDSIGHT, BELADY)  # no rivals to be compared with: they know the trace
SAME = 0.0005  # shares that differ by less print alike


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy on one trace and model at one capacity. Shares are fractions; None is unknown.

    The gaps are the shares that are closed of the way to the bound, from what another policy saves; negative for what
    saves less than that.
    """

    trace: str
    model: str
    policy: str
    capacity_bytes: int
    capacity_share: float  # of the trace's unique bytes
    token_hit_rate: float
    flops_saved: float  # share of all prefill
    ttft_p50_s: float | None  # predicted
    ttft_p95_s: float | None
    kv_bytes: float | None  # of pages, mean over the replay
    state_bytes: float | None
    admissions: int | None  # of states
    evictions: int | None  # of states
    gap_closed: float | None  # from BASELINE
    seconds: float
    alpha: float | None  # of marconi-static
    seed: int
    concurrency: int
    gap_from_best: float | None = None  # from the best of the other policies
    best_other: str | None = None  # its name; several, with commas, if they print alike
    planned_flops_saved: float | None = None  # of the bound: by a plan that fits, made with knowledge of the future
    num_requests: int = 0
    unique_bytes: int = 0
    page_tokens: int = 0
    page_bytes: int = 0
    slot_bytes: int = 0
    ttft_base_s: float = 0.0
    ttft_flops_per_s: float = 0.0
    note: str = ""  # what was assumed of the trace, such as arrivals that are made up
    options: str = ""  # of the command line, as far as they shape the trace
    version: str = ""
    server_policy: str = ""  # of a trace that a server recorded: what it ran with, and really saved
    server_budget_bytes: int = 0
    server_flops_saved: float | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """A cell without numbers; `policy` is empty for all policies at this capacity."""

    trace: str
    model: str
    policy: str
    capacity_bytes: int
    capacity_share: float
    error: str


AnyRow = PolicyRow | Missing


def with_gaps(rows: Sequence[PolicyRow]) -> list[PolicyRow]:
    """The rows, with the gaps that each closes, where both ends are among them and differ."""
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault(place(row), {})[row.policy] = row.flops_saved
    return [row if row.policy in LIMITS else with_gap(row, cells[place(row)]) for row in rows]


def place(row: AnyRow) -> tuple[str, str, int]:
    return row.trace, row.model, row.capacity_bytes


def with_gap(row: PolicyRow, saved: Mapping[str, float]) -> PolicyRow:
    others = {policy: share for policy, share in saved.items() if policy not in (row.policy, *LIMITS, *CLAIRVOYANT)}
    most, high = max(others.values(), default=None), saved.get(BOUND)

    def closed(low: float | None) -> float | None:
        return None if low is None or high is None or high - low < SAME else (row.flops_saved - low) / (high - low)

    best = None if most is None else ", ".join(best_of(others) or others)
    return replace(row, gap_closed=closed(saved.get(BASELINE)), gap_from_best=closed(most), best_other=best)


def best_of(saved: Mapping[str, float]) -> list[str]:
    """The policies that save most, several if they print alike; none if nothing is saved. Those that know the trace
    count only among themselves.
    """
    policies = {policy: share for policy, share in saved.items() if policy not in LIMITS}
    policies = {policy: share for policy, share in policies.items() if policy not in CLAIRVOYANT} or policies
    most = max(policies.values(), default=0.0)
    return [policy for policy, share in policies.items() if most >= SAME and share > most - SAME]


def by_trace(rows: Iterable[PolicyRow]) -> list[list[PolicyRow]]:
    """The rows of each trace and model, which follow each other."""
    return [list(group) for _, group in groupby(rows, key=lambda row: (row.trace, row.model))]


def short(policy: str) -> str:
    """The name of a policy, without the module of somebody else's."""
    return policy.rpartition(":")[2]


def row_json(row: AnyRow) -> bytes:
    return (json.dumps(asdict(row)) + "\n").encode()


def rows_json(rows: Sequence[AnyRow]) -> bytes:
    return (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode()
