"""Pictures of several panels with one legend beside them."""

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#6a3d9a", "#a0a000")
PANELS_A_ROW = 3


def panels_of(number: int) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels in rows of three, which share what they have upwards; at least one."""
    from matplotlib.figure import Figure

    across = min(max(number, 1), PANELS_A_ROW)
    down = max(-(-number // across), 1)
    figure = Figure(figsize=(3.9 * across + 1.7, 3.6 * down), dpi=150, layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes in grid[number:]:
        axes.remove()
    return figure, grid[:number]


def png_of(figure: "Figure", across: str, upwards: str) -> bytes:
    """across, upwards: what the panels' axes say"""
    figure.supxlabel(across, fontsize=10)
    figure.supylabel(upwards, fontsize=10)
    legend = dict(
        item for axes in figure.axes for item in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", frameon=False, fontsize=9)
    image = BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
