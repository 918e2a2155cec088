"""How one model makes entries of its own from those of another model of its shape: a way for each layer.

    take       the sender's entries, as they are
    project    what the receiver's layer writes (keys and values, or state and window) when it is given what the
               sender's layer was given
    recompute  the receiver's layers one after the other, from what the sender's first of them was given

What a layer is given are its *inputs*: the rows of the residual stream before it. Where the two models have the same
weights up to a layer, its inputs are the same, and taking what lies below and recomputing from there on is exact.
Recomputing contiguous layers is DroidSpeak's way (Liu et al. 2024, arXiv 2411.02820).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby, takewhile

from hybrid_cache.spec import LayerSpec


class Way(Enum):
    """See the module docstring."""

    TAKE = "take"
    PROJECT = "project"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Transfer:
    """A way for each layer, from the first one on."""

    ways: tuple[Way, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose inputs have to be there. Those of the first layer are not: they follow from the tokens."""
        ways = self.ways
        starts = (
            index
            for index, way in enumerate(ways)
            if way is Way.PROJECT or (way is Way.RECOMPUTE and ways[index - 1] is not Way.RECOMPUTE)
        )
        return tuple(index for index in starts if index > 0)

    @property
    def taken(self) -> tuple[int, ...]:
        """Layers whose entries are copied."""
        return tuple(index for index, way in enumerate(self.ways) if way is Way.TAKE)

    @property
    def computes(self) -> bool:
        """Whether anything of the receiver has to run."""
        return any(way is not Way.TAKE for way in self.ways)

    def goes_on(self, layer: int) -> bool:
        """Whether a layer is run to its end, as the next one needs what it gives."""
        return self.ways[layer : layer + 2] == (Way.RECOMPUTE, Way.RECOMPUTE)

    def for_layers(self, layers: Sequence[LayerSpec]) -> "Transfer":
        """The same without what has no effect: layers that cache nothing and are not followed by one that is run. One
        layer that is recomputed by itself is projected.
        """
        ways = list(self.ways)
        for index in reversed(range(len(ways))):
            if not layers[index].entries and ways[index : index + 2] != [Way.RECOMPUTE, Way.RECOMPUTE]:
                ways[index] = Way.TAKE
        for index, way in enumerate(ways):
            if way is Way.RECOMPUTE and Way.RECOMPUTE not in (
                *ways[max(index - 1, 0) : index],
                *ways[index + 1 : index + 2],
            ):
                ways[index] = Way.PROJECT
        return Transfer(tuple(ways))

    @property
    def letters(self) -> str:
        """One for each layer: t for take, p for project, r for recompute."""
        return "".join(way.value[0] for way in self.ways)

    def __str__(self) -> str:
        parts = []
        for way, group in groupby(range(len(self.ways)), key=lambda index: self.ways[index]):
            layers = list(group)
            parts.append(f"{way.value} {layers[0]}" + (f"-{layers[-1]}" if layers[1:] else ""))
        return ", ".join(parts)


def transfer_of(text: str, num_layers: int) -> Transfer:
    """What `str` of a transfer gives. Raises ValueError for anything else."""
    ways = list[Way]()
    for part in text.split(", "):
        way, _, layers = part.partition(" ")
        first, _, last = layers.partition("-")
        if int(first) != len(ways):
            raise ValueError(f"{text!r}: layer {len(ways)} should come before {part!r}")
        end = int(last or first) + 1
        if end > num_layers:
            raise ValueError(f"{text!r} names {end} layers, the model has {num_layers}")
        ways += [Way(way)] * (end - len(ways))
    if len(ways) != num_layers:
        raise ValueError(f"{text!r} names {len(ways)} layers, the model has {num_layers}")
    return Transfer(tuple(ways))


def upper(num_layers: int, first: int) -> Transfer:
    """Everything below a layer is taken, and recomputed from there on."""
    return Transfer((Way.TAKE,) * first + (Way.RECOMPUTE,) * (num_layers - first))


def projected(num_layers: int, layers: Iterable[int]) -> Transfer:
    """These layers are projected, the others taken."""
    chosen = set(layers)
    return Transfer(tuple(Way.PROJECT if index in chosen else Way.TAKE for index in range(num_layers)))


def equal_layers(one: Iterable[str], other: Iterable[str]) -> int | None:
    """How many layers, from the first one, two models have in common; None if they differ below the first."""
    pairs = zip(one, other, strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return count - 1 if count else None
