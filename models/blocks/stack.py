"""The layers of a model, from the embedded tokens to the last norm."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.models.blocks.common import CacheEntry, FeedForward, Mixer, Norm
from hybrid_cache.models.blocks.transfer import transfer
from hybrid_cache.models.shapes import LayerShape


class Layer(Protocol):
    """One step of a stack: what mixes tokens, then what treats each by itself. Both may overwrite `hidden`."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of its parts, in the order of use."""
        ...

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        """hidden [R, hidden] -> [R, hidden]; takes the entries of its mixers from `cache`."""
        ...

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> [R, hidden]; rows do not depend on each other."""
        ...

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        """Does to the entries what `mix` does, and no more. hidden [R, hidden]"""
        ...


class HybridStack:
    """Layers one after the other. Once the last of them has mixed, only the rows that somebody wants are computed."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = tuple(layers)
        self.shapes = tuple(shape for layer in self.layers for shape in layer.shapes)
        self._last_mixer = [layer for layer in self.layers if any(shape.cache for shape in layer.shapes)][-1]

    def __call__(self, hidden: Tensor, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """hidden [R, hidden], overwritten -> [L or more, hidden], the output rows of the batch first."""
        if batch.inputs is not None:
            transfer([_WholeLayer(layer) for layer in self.layers], hidden, batch.inputs, batch, cache)
            return wanted_rows(hidden, batch)
        entries = iter(cache)
        for index, layer in enumerate(self.layers):
            if batch.tap is not None:
                batch.tap(index, hidden)
            hidden = layer.mix(hidden, batch, entries)
            if layer is self._last_mixer:
                hidden = wanted_rows(hidden, batch)
            batch.pause()
            hidden = layer.feed_forward(hidden)
            batch.pause()
        return hidden


class _WholeLayer:
    """What mixes tokens and what treats each by itself, as one step."""

    def __init__(self, layer: Layer) -> None:
        self.shapes, self.write = layer.shapes, layer.write
        self._layer = layer

    def run(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        return self._layer.feed_forward(self._layer.mix(hidden, batch, cache))


def wanted_rows(hidden: Tensor, batch: ForwardBatch) -> Tensor:
    """hidden [R, hidden] -> the output rows of the batch, or row 0 where none are wanted."""
    batch.narrowed()
    return hidden[batch.output_rows] if len(batch.output_rows) else hidden[:1]


class PreNormLayer:
    """hidden += multiplier * mixer(norm(hidden)), then the same with a feed-forward part."""

    def __init__(
        self,
        mixer: Mixer,
        mixer_norm: Norm,
        feed_forward: FeedForward,
        feed_forward_norm: Norm,
        multiplier: float = 1.0,
    ) -> None:
        self.mixer = mixer
        self._mixer_norm = mixer_norm
        self._feed_forward = feed_forward
        self._feed_forward_norm = feed_forward_norm
        self._multiplier = multiplier
        self.shapes: tuple[LayerShape, ...] = (mixer.shape, *feed_forward.shapes)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        return self.mixer.add_to(hidden, self._mixer_norm, batch, next(cache), self._multiplier)

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self.mixer.write(self._mixer_norm(hidden), batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self._feed_forward.add_to(hidden, self._feed_forward_norm, self._multiplier)


class PostNormLayer:
    """hidden += norm(mixer(hidden)), then the same with a feed-forward part."""

    def __init__(self, mixer: Mixer, mixer_norm: Norm, feed_forward: FeedForward, feed_forward_norm: Norm) -> None:
        self.mixer = mixer
        self._mixer_norm = mixer_norm
        self._feed_forward = feed_forward
        self._feed_forward_norm = feed_forward_norm
        self.shapes: tuple[LayerShape, ...] = (mixer.shape, *feed_forward.shapes)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        hidden += self._mixer_norm(self.mixer(hidden, batch, next(cache)))
        return hidden

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self.mixer.write(hidden, batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        hidden += self._feed_forward_norm(self._feed_forward(hidden))
        return hidden


class SandwichLayer:
    """hidden += norm(mixer(norm(hidden))), then the same with a feed-forward part."""

    def __init__(
        self,
        mixer: Mixer,
        mixer_norm: Norm,
        mixed_norm: Norm,
        feed_forward: FeedForward,
        feed_forward_norm: Norm,
        fed_norm: Norm,
    ) -> None:
        self.mixer = mixer
        self._mixer_norm = mixer_norm
        self._mixed_norm = mixed_norm
        self._feed_forward = feed_forward
        self._feed_forward_norm = feed_forward_norm
        self._fed_norm = fed_norm
        self.shapes: tuple[LayerShape, ...] = (mixer.shape, *feed_forward.shapes)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        hidden += self._mixed_norm(self.mixer(self._mixer_norm(hidden), batch, next(cache)))
        return hidden

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self.mixer.write(self._mixer_norm(hidden), batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        hidden += self._fed_norm(self._feed_forward(self._feed_forward_norm(hidden)))
        return hidden


class MixerLayer:
    """hidden += mixer(norm(hidden)), and nothing after it; `hidden` may be float32 where rows are not."""

    def __init__(self, mixer: Mixer, norm: Norm, dtype: torch.dtype) -> None:
        self.mixer = mixer
        self._norm = norm
        self._dtype = dtype
        self.shapes: tuple[LayerShape, ...] = (mixer.shape,)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        hidden += self.mixer(self._norm(hidden.to(self._dtype)), batch, next(cache))
        return hidden

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self.mixer.write(self._norm(hidden.to(self._dtype)), batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden


class FeedForwardLayer:
    """hidden += feed_forward(norm(hidden)), with no mixer before it; `hidden` as in `MixerLayer`."""

    def __init__(self, feed_forward: FeedForward, norm: Norm, dtype: torch.dtype) -> None:
        self._feed_forward = feed_forward
        self._norm = norm
        self._dtype = dtype
        self.shapes = feed_forward.shapes

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        return hidden

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        """It has none."""

    def feed_forward(self, hidden: Tensor) -> Tensor:
        hidden += self._feed_forward(self._norm(hidden.to(self._dtype)))
        return hidden
