"""The picture of `hybrid-cache bench policy --replicas`."""

from collections.abc import Sequence
from io import BytesIO

from hybrid_cache.bench.fleet.rows import MEMORY, ONE, FleetRow

PANELS_A_ROW = 3
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#6a3d9a", "#a0a000")
OWN = "usable-prefix"


def plot_png(rows: Sequence[FleetRow]) -> bytes:
    """Tokens found by number of replicas, a panel for each trace, model, policy and budget, a line for each router."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str, int], list[FleetRow]] = {}
    for row in rows:
        panels.setdefault((row.trace, row.model, row.policy, row.capacity_bytes), []).append(row)
    across = min(max(len(panels), 1), PANELS_A_ROW)
    down = max(-(-len(panels) // across), 1)
    figure = Figure(figsize=(3.9 * across + 1.7, 3.6 * down), dpi=150, layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    names = [name for name in dict.fromkeys(row.router for row in rows) if name not in (ONE, MEMORY)]
    for axes, panel in zip(grid, panels.values(), strict=False):
        for name in (MEMORY, ONE, *names):
            line = sorted((r.num_replicas, 100 * r.token_hit_rate) for r in panel if r.router == name)
            if line:
                axes.plot(*zip(*line, strict=True), label=name.rpartition(":")[2], **looks(name, names))
        sizes = sorted({row.num_replicas for row in panel})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0, 100)
        made_up = ", arrivals made up" if "made-up" in panel[0].note else ""
        place = f"{panel[0].trace}, {panel[0].model}, {panel[0].policy}{made_up}"
        axes.set_title(f"{place}\neach {100 * panel[0].capacity_share:.3g} %", fontsize=9)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("replicas", fontsize=10)
    figure.supylabel("prompt tokens found, %", fontsize=10)
    legend = dict(
        item for each in figure.axes for item in zip(*reversed(each.get_legend_handles_labels()), strict=True)
    )
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", frameon=False, fontsize=9)
    image = BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def looks(name: str, names: Sequence[str]) -> dict[str, str | float]:
    if name in (ONE, MEMORY):
        return {"color": "0.4", "linestyle": "-" if name == ONE else ":", "linewidth": 1.6}
    look: dict[str, str | float] = {"marker": "o", "markersize": 4, "linewidth": 1.4}
    return look | {"color": "#d62728" if name == OWN else COLORS[names.index(name) % len(COLORS)]}
