"""The picture of `hybrid-cache bench policy`."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hybrid_cache.bench.common.panels import COLORS, panels_of, png_of
from hybrid_cache.bench.policy.rows import BASELINE, BOUND, INFINITE, LIMITS, SAME, PolicyRow, by_trace, short
from hybrid_cache.cache.policies.learned import Learned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "sD^vPXd"
MOST_TICKS = 8
LEGEND_WIDTH = 26  # letters
ASIDE = 1.02

Line = tuple[list[float], list[float]]  # percent of unique bytes, percent saved
NO_LINE: Line = [], []


def plot_png(rows: Sequence[PolicyRow]) -> bytes:
    """FLOPs saved by capacity, a panel for each trace and model, a line for each policy."""
    panels = by_trace(rows)
    figure, grid = panels_of(len(panels))
    drawn = alike([lines_of(panel) for panel in panels])
    for axes, panel in zip(grid, panels, strict=True):
        draw(axes, panel, drawn)
    return png_of(figure, "capacity, % of the trace's unique bytes", "prefill FLOPs saved, %")


def draw(axes: "Axes", rows: Sequence[PolicyRow], drawn: Sequence[Sequence[str]]) -> None:
    """drawn: the policies of each line. One that would hide others in this panel moves to the right, a bit for each."""
    lines = lines_of(rows)
    sizes = sorted({100 * row.capacity_share for row in rows})
    axes.set_xscale("log")
    for number, names in enumerate(drawn):
        x, y = line = lines.get(names[0], NO_LINE)
        hidden = sum(same(lines.get(earlier[0], NO_LINE), line) for earlier in drawn[:number])
        label = fill(" = ".join(map(short, names)), LEGEND_WIDTH)
        axes.plot([share * ASIDE**hidden for share in x], y, label=label, **looks(names, number))
    if BOUND in lines:
        axes.plot(*lines[BOUND], color="0.55", linewidth=1.6, label=BOUND, zorder=3)
        axes.fill_between(*lines[BOUND], 100, color="0.93", linewidth=0, zorder=1)
    if INFINITE in lines:
        axes.plot(*lines[INFINITE], ":", color="0.35", linewidth=1.2, label=INFINITE, zorder=3)
    if len(sizes) <= MOST_TICKS:
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        axes.set_xticks([], minor=True)
    axes.set_ylim(0, 100)
    made_up = ", arrivals made up" if "made-up" in rows[0].note else ""
    axes.set_title(f"{rows[0].trace}, {rows[0].model}{made_up}", fontsize=10)
    axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def looks(names: Sequence[str], number: int) -> dict[str, Any]:
    """How the line of some policies is drawn."""
    if Learned.name in names:
        return {"color": "#d62728", "marker": "o", "markersize": 5, "linewidth": 2.6, "zorder": 6}
    if BASELINE in names:
        return {"color": "black", "marker": "o", "markersize": 3.5, "linewidth": 1.6, "zorder": 5}
    dash, marker = "-" if number < len(COLORS) else "--", MARKERS[number % len(MARKERS)]
    look = {"color": COLORS[number % len(COLORS)], "marker": marker, "linestyle": dash}
    return look | {"markersize": 3.5, "linewidth": 1.2, "zorder": 4}


def lines_of(rows: Sequence[PolicyRow]) -> dict[str, Line]:
    return {policy: points(rows, policy) for policy in dict.fromkeys(row.policy for row in rows)}


def alike(panels: Sequence[Mapping[str, Line]]) -> list[list[str]]:
    """The policies to draw, those together whose lines hide each other in every panel."""
    groups: list[list[str]] = []
    for policy in dict.fromkeys(policy for lines in panels for policy in lines):
        if policy in (*LIMITS, "none"):
            continue
        for group in groups:
            if all(same(lines.get(group[0], NO_LINE), lines.get(policy, NO_LINE)) for lines in panels):
                group.append(policy)
                break
        else:
            groups.append([policy])
    return groups


def same(one: Line, other: Line) -> bool:
    """Whether two lines have points at the same places that nobody could tell apart."""
    return one[0] == other[0] and all(abs(a - b) < 100 * SAME for a, b in zip(one[1], other[1], strict=True))


def points(rows: Sequence[PolicyRow], policy: str) -> Line:
    mine = sorted((100 * row.capacity_share, 100 * row.flops_saved) for row in rows if row.policy == policy)
    return [x for x, _ in mine], [y for _, y in mine]
