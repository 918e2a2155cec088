"""Layers that are not run one after the other: see `hybrid_cache.transfer`."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch, LayerInputs
from hybrid_cache.models.blocks.common import CacheEntry
from hybrid_cache.models.shapes import LayerShape
from hybrid_cache.transfer import Way


class Step(Protocol):
    """A layer as a transfer sees it."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of its parts, in the order of use."""
        ...

    def run(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        """hidden [R, hidden], overwritten -> [R, hidden]; takes the entries of its mixers from `cache`."""
        ...

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        """Does to its entries what `run` does, and no more. `hidden` [R, hidden] may be overwritten."""
        ...


def transfer(
    layers: Sequence[Step], embedded: Tensor, inputs: LayerInputs, batch: ForwardBatch, cache: CacheTensors
) -> None:
    """Makes the entries of each layer in the way that `inputs.transfer` says; those that are taken are not touched.

    embedded [R, hidden]: what the first layer is given
    """
    entries, hidden, ways = iter(cache), embedded, inputs.transfer.ways
    for index, (layer, way) in enumerate(zip(layers, ways, strict=True)):
        if way is Way.TAKE:
            for _ in entries_of(layer.shapes):
                next(entries)
            continue
        if index and not inputs.transfer.goes_on(index - 1):
            hidden = inputs(index)
        if inputs.transfer.goes_on(index):
            hidden = layer.run(hidden, batch, entries)
        else:
            layer.write(hidden, batch, entries)
        batch.pause()


def entries_of(shapes: Sequence[LayerShape]) -> list[LayerShape]:
    """Those that have an entry in the cache."""
    return [shape for shape in shapes if shape.cache is not None]
