"""The picture of `hybrid-cache bench policy --replicas`."""

from collections.abc import Sequence
from typing import Any

from hybrid_cache.bench.common.panels import COLORS, panels_of, png_of
from hybrid_cache.bench.fleet.rows import MEMORY, ONE, FleetRow

OWN = "usable-prefix"


def plot_png(rows: Sequence[FleetRow]) -> bytes:
    """Tokens found by number of replicas, a panel for each trace, model, policy and budget, a line for each router."""
    panels: dict[tuple[str, str, str, int], list[FleetRow]] = {}
    for row in rows:
        panels.setdefault((row.trace, row.model, row.policy, row.capacity_bytes), []).append(row)
    figure, grid = panels_of(len(panels))
    names = [name for name in dict.fromkeys(row.router for row in rows) if name not in (ONE, MEMORY)]
    for axes, panel in zip(grid, panels.values(), strict=True):
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
    return png_of(figure, "replicas", "prompt tokens found, %")


def looks(name: str, names: Sequence[str]) -> dict[str, Any]:
    if name in (ONE, MEMORY):
        return {"color": "0.4", "linestyle": "-" if name == ONE else ":", "linewidth": 1.6}
    look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4}
    return look | {"color": "#d62728" if name == OWN else COLORS[names.index(name) % len(COLORS)]}
