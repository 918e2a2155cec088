"""What `hybrid-cache bench policy` reports: rows of numbers, tables, one sentence for each trace, a picture."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from rich import box
from rich.table import Table

from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE, BOUND, INFINITE = "lru", "bound", "infinite"
LIMITS = (BOUND, INFINITE)
SAME = 0.0005  # shares that differ by less print alike

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy on one trace and model at one capacity. Shares are fractions; None is unknown."""

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
    gap_closed: float | None  # share of the way from BASELINE to the bound; negative for what saves less
    seconds: float
    alpha: float | None  # of marconi-static
    seed: int
    concurrency: int


def with_gaps(rows: Sequence[PolicyRow]) -> list[PolicyRow]:
    """The rows, with the share of the gap that each closes, where both ends are among them and differ."""
    saved = {(r.trace, r.model, r.capacity_bytes, r.policy): r.flops_saved for r in rows}

    def gap_closed(row: PolicyRow) -> float | None:
        at = row.trace, row.model, row.capacity_bytes
        low, high = saved.get((*at, BASELINE)), saved.get((*at, BOUND))
        if row.policy in LIMITS or low is None or high is None or high - low < SAME:
            return None
        return (row.flops_saved - low) / (high - low)

    return [replace(row, gap_closed=gap_closed(row)) for row in rows]


def by_trace(rows: Iterable[PolicyRow]) -> list[list[PolicyRow]]:
    """The rows of each trace and model, which follow each other."""
    return [list(group) for _, group in groupby(rows, key=lambda row: (row.trace, row.model))]


# For people


def table(rows: Sequence[PolicyRow], title: str) -> Table:
    """The rows of one trace and model."""
    report = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    report.add_column("", no_wrap=True)
    for heading in ("hit\n%", "saved\n%", "TTFT\nms", "p95\nms", "KV", "states", "admit", "evict", "gap\n%"):
        report.add_column(heading, justify="right", no_wrap=True)
    for num_bytes, group in groupby(rows, key=lambda row: row.capacity_bytes):
        here = list(group)
        report.add_section()
        report.add_row(f"{format_bytes(num_bytes)} ({100 * here[0].capacity_share:.3g} %)", style="bold")
        best = best_of({row.policy: row.flops_saved for row in here})
        for row in here:
            style = "green" if row.policy in best else "dim" if row.policy in LIMITS else None
            report.add_row(*texts(row), style=style)
    return report


def texts(row: PolicyRow) -> list[str]:
    return [
        f" {row.policy}" + ("" if row.alpha is None else f" {row.alpha:g}"),
        f"{100 * row.token_hit_rate:.1f}",
        f"{100 * row.flops_saved:.1f}",
        or_dash(row.ttft_p50_s, lambda s: f"{1e3 * s:,.0f}"),
        or_dash(row.ttft_p95_s, lambda s: f"{1e3 * s:,.0f}"),
        or_dash(row.kv_bytes, format_bytes),
        or_dash(row.state_bytes, format_bytes),
        or_dash(row.admissions, format_count),
        or_dash(row.evictions, format_count),
        or_dash(row.gap_closed, lambda share: f"{round(100 * share)}" if share > -0.995 else "<-99"),
    ]


def or_dash(value: T | None, text: Callable[[T], str]) -> str:
    return "-" if value is None else text(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def best_of(saved: Mapping[str, float]) -> list[str]:
    """The policies that save most, several if they print alike; none if nothing is saved."""
    policies = {policy: share for policy, share in saved.items() if policy not in LIMITS}
    most = max(policies.values(), default=0.0)
    return [policy for policy, share in policies.items() if most >= SAME and share > most - SAME]


def conclusion(rows: Sequence[PolicyRow]) -> str:
    """What the rows of one trace and model say, in one sentence."""
    sizes = sorted({row.capacity_bytes for row in rows})
    means = {
        p: fmean(row.flops_saved for row in rows if row.policy == p) for p in dict.fromkeys(r.policy for r in rows)
    }
    where = f"{rows[0].trace} on {rows[0].model}"
    best = best_of(means)
    tails = [f"no policy could save more than {percent(means[BOUND])}"] if BOUND in means else []
    if not best:
        return f"{where}: nothing is saved{''.join(f', and {text}' for text in tails)}."
    if BASELINE in means and BASELINE not in best:
        tails.insert(0, f"{BASELINE} saves {percent(means[BASELINE])}")
    most = ""
    if any(policy not in (*LIMITS, *best) for policy in means):
        here = [best_of({r.policy: r.flops_saved for r in rows if r.capacity_bytes == size}) for size in sizes]
        always = len(sizes) > 1 and all(set(best) <= set(names) for names in here)
        most = ", the most at every size" if always else ", the most"
    verb = "saves" if len(best) == 1 else "save"
    mean = " on average" if len(sizes) > 1 else ""
    tail = "; " * bool(tails) + " and ".join(tails)
    return f"{where}: {' and '.join(best)} {verb} {percent(means[best[0]])} of prefill FLOPs{mean}{most}{tail}."


# Files


def rows_json(rows: Sequence[PolicyRow]) -> bytes:
    return (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode()


# Picture

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#6a3d9a", "#a0a000")
MARKERS = "sD^vPXd"
PANELS_A_ROW = 3
MOST_TICKS = 8


def plot_png(rows: Sequence[PolicyRow]) -> bytes:
    """FLOPs saved by capacity, a panel for each trace and model, a line for each policy."""
    from matplotlib.figure import Figure

    panels = by_trace(rows)
    across = min(len(panels), PANELS_A_ROW)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.9 * across + 1.7, 3.6 * down), dpi=150, layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, panel in zip(grid, panels, strict=False):
        draw(axes, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("capacity, % of the trace's unique bytes", fontsize=10)
    figure.supylabel("prefill FLOPs saved, %", fontsize=10)
    legend = dict(
        item for axes in figure.axes for item in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", frameon=False, fontsize=9)
    image = BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def draw(axes: "Axes", rows: Sequence[PolicyRow]) -> None:
    lines = {policy: points(rows, policy) for policy in dict.fromkeys(row.policy for row in rows)}
    sizes = sorted({100 * row.capacity_share for row in rows})
    axes.set_xscale("log")
    others = [policy for policy in lines if policy not in (*LIMITS, BASELINE, Learned.name, "none")]
    for policy, line in lines.items():
        if policy == Learned.name:
            axes.plot(*line, "o-", color="#d62728", linewidth=2.6, markersize=5, label=policy, zorder=6)
        elif policy == BASELINE:
            axes.plot(*line, "o-", color="black", linewidth=1.6, markersize=3.5, label=policy, zorder=5)
        elif policy in others:
            number = others.index(policy)
            style = MARKERS[number % len(MARKERS)] + ("-" if number < len(COLORS) else "--")
            color = COLORS[number % len(COLORS)]
            axes.plot(*line, style, color=color, linewidth=1.2, markersize=3.5, label=policy, zorder=4)
    if BOUND in lines:
        axes.plot(*lines[BOUND], color="0.55", linewidth=1.6, label=BOUND, zorder=3)
        axes.fill_between(*lines[BOUND], 100, color="0.93", linewidth=0, zorder=1)
    if INFINITE in lines:
        axes.plot(*lines[INFINITE], ":", color="0.35", linewidth=1.2, label=INFINITE, zorder=3)
    if len(sizes) <= MOST_TICKS:
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        axes.set_xticks([], minor=True)
    axes.set_ylim(0, 100)
    axes.set_title(f"{rows[0].trace}, {rows[0].model}", fontsize=10)
    axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def points(rows: Sequence[PolicyRow], policy: str) -> tuple[list[float], list[float]]:
    mine = sorted((100 * row.capacity_share, 100 * row.flops_saved) for row in rows if row.policy == policy)
    return [x for x, _ in mine], [y for _, y in mine]
