"""What `hybrid-cache bench policy` tells people: tables, and one sentence for each trace."""

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean
from typing import TypeVar

from rich import box
from rich.table import Table

from hybrid_cache.bench.policy.rows import (
    BASELINE,
    BOUND,
    LIMITS,
    AnyRow,
    Missing,
    PolicyRow,
    best_of,
    short,
)
from hybrid_cache.sizes import format_bytes, format_count

T = TypeVar("T")

HEADINGS = (
    *("hit\n%", "saved\n%", "plan\n%", "TTFT\nms", "p95\nms", "KV", "states", "admit", "evict"),
    *("gap %\nlru", "gap %\nbest"),
)


def table(rows: Sequence[AnyRow], title: str) -> Table:
    """The rows of one trace and model."""
    report = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    report.add_column("", no_wrap=True)
    for heading in HEADINGS:
        report.add_column(heading, justify="right", no_wrap=True)
    for num_bytes, group in groupby(rows, key=lambda row: row.capacity_bytes):
        here = list(group)
        report.add_section()
        report.add_row(f"{format_bytes(num_bytes)} ({100 * here[0].capacity_share:.3g} %)", style="bold")
        best = best_of({row.policy: row.flops_saved for row in here if isinstance(row, PolicyRow)})
        for row in here:
            style = "green" if row.policy in best else "dim" if row.policy in LIMITS else None
            report.add_row(*(texts(row, best) if isinstance(row, PolicyRow) else dashes(row)), style=style)
    return report


def reasons(rows: Sequence[AnyRow]) -> list[str]:
    """Why some rows have no numbers."""
    return list(dict.fromkeys(row.error for row in rows if isinstance(row, Missing)))


def dashes(row: Missing) -> list[str]:
    return [f" {short(row.policy) or 'all'}"] + ["-"] * len(HEADINGS)


def texts(row: PolicyRow, best: Sequence[str]) -> list[str]:
    tied = row.policy in best and len(best) > 1
    return [
        f" {short(row.policy)}" + ("" if row.alpha is None else f" {row.alpha:g}"),
        f"{100 * row.token_hit_rate:.1f}",
        f"{100 * row.flops_saved:.1f}",
        or_dash(row.planned_flops_saved, lambda share: f"{100 * share:.1f}"),
        or_dash(row.ttft_p50_s, lambda s: f"{1e3 * s:,.0f}"),
        or_dash(row.ttft_p95_s, lambda s: f"{1e3 * s:,.0f}"),
        or_dash(row.kv_bytes, format_bytes),
        or_dash(row.state_bytes, format_bytes),
        or_dash(row.admissions, format_count),
        or_dash(row.evictions, format_count),
        or_dash(row.gap_closed, gap),
        "tie" if tied else or_dash(row.gap_from_best, gap),
    ]


def gap(share: float) -> str:
    return f"{round(100 * share)}" if share > -0.995 else "<-99"


def or_dash(value: T | None, text: Callable[[T], str]) -> str:
    return "-" if value is None else text(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def conclusion(rows: Sequence[PolicyRow]) -> str:
    """What the rows of one trace and model say, in one sentence. A policy counts if it has one at every size."""
    sizes = sorted({row.capacity_bytes for row in rows})
    everywhere = [p for p in dict.fromkeys(r.policy for r in rows) if sum(r.policy == p for r in rows) == len(sizes)]
    means = {p: fmean(row.flops_saved for row in rows if row.policy == p) for p in everywhere}
    where = f"{rows[0].trace} on {rows[0].model}"
    best = best_of(means)
    tails = [f"no policy could save more than {percent(means[BOUND])}"] if BOUND in means else []
    if not best:
        return f"{where}: nothing is saved{''.join(f', and {text}' for text in tails)}."
    if BASELINE in means and BASELINE not in best:
        tails.insert(0, f"{BASELINE} saves {percent(means[BASELINE])}")
    at = [best_of({r.policy: r.flops_saved for r in rows if r.capacity_bytes == size}) for size in sizes]
    has_rivals = any(policy not in (*LIMITS, *best) for policy in means)
    most = standing(best[0], at) if has_rivals and len(best) == 1 else ""
    verb = "saves" if len(best) == 1 else "tie at" if all(set(best) <= set(names) for names in at) else "save"
    mean = " on average" if len(sizes) > 1 else ""
    tail = "; " * bool(tails) + " and ".join(tails)
    names = " and ".join(short(policy) for policy in best)
    return f"{where}: {names} {verb} {percent(means[best[0]])} of prefill FLOPs{mean}{most}{tail}."


def standing(policy: str, at: Sequence[Sequence[str]]) -> str:
    """Where a policy that saves most on average stands at each size, given the best of each."""
    if len(at) == 1:
        return ", the most"
    alone = sum(list(names) == [policy] for names in at)
    tied = dict.fromkeys(short(name) for names in at if policy in names for name in names if name != policy)
    num_tied = sum(policy in names for names in at) - alone
    if alone == len(at):
        return ", the most at every size"
    ties = f", ties with {' or '.join(tied)} at {num_tied}" if num_tied else ""
    return f", the most at {alone} of {len(at)} sizes{ties}"
