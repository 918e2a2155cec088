"""Critical layers of pairs of models, attention and state-space layers apart.

python -m hybrid_cache.bench.variants.plot OUT.png [--examples N] [--seed N] [--pair SENDER:RECEIVER ...]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from hybrid_cache.bench.variants.quality import PAIRS, Layers, layers_of, load_pair
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.dispatch import select

LEAST = 1e-5  # nats a token: the foot of the bars


def draw(found: Sequence[Layers], path: Path) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=200, help="dialogues for each pair")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pair", action="append", help="SENDER:RECEIVER")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ops, found = select(), list[Layers]()
    for name in track(given.pair or PAIRS, "layers taken alone"):
        pair = load_pair(name, ops, given.examples, given.seed)
        if pair is None:
            raise ConfigError(f"{name}: an activated adapter loses nothing")
        *_, alone = pair.measure_layers(range(len(pair.examples)))
        found.append(layers_of(name, pair, alone))
    draw(found, given.out)


if __name__ == "__main__":
    main()
