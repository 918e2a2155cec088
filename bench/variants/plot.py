"""Critical layers of pairs of models, attention and state-space layers apart."""

from collections.abc import Sequence
from pathlib import Path

from hybrid_cache.bench.variants.quality import Quality
from hybrid_cache.errors import ConfigError

LEAST = 1e-5  # nats a token: the foot of the bars


def draw(found: Sequence[Quality], path: Path) -> None:
    """A panel for each direction. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'hybrid-cache[bench]'") from error
    height = -(-len(found) // 2)
    figure = Figure(figsize=(2.3 * height, 4.2), layout="constrained")
    panels = figure.subplots(2, height, sharey=True, squeeze=False)
    for panel, each in zip(panels.T.flat, found, strict=False):
        for colour, attention in (("tab:orange", True), ("tab:blue", False)):
            layers = [i for i, kind in enumerate(each.kinds) if kind.startswith("attention") is attention]
            losses = [max(each.alone[i].kl, LEAST) for i in layers]
            panel.bar(layers, losses, color=colour, label="attention" if attention else "state-space")
        panel.set_yscale("log", nonpositive="clip")
        panel.set_ylim(bottom=LEAST)
        panel.set_title(f"{_short(each.sender)} to {_short(each.receiver)}", fontsize=8)
        panel.set_xticks(range(len(each.kinds)))
        panel.tick_params(labelsize=7)
    panels[0, 0].legend(fontsize=7)
    figure.supylabel("nats a token, one layer taken", fontsize=8)
    figure.supxlabel("layer", fontsize=8)
    figure.savefig(path, dpi=100)


def _short(name: str) -> str:
    return name.rpartition("+")[2]
