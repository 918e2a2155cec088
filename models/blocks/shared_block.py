"""A state-space backbone that shares a transformer block: before some layers, the block reads the stream and the
original embedding side by side; its output goes into the mixer, but not into the stream itself (Zamba).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.ops import Linear
from hybrid_cache.models.blocks.attention import Attention
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm, linear_shape
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.blocks.stack import wanted_rows
from hybrid_cache.models.blocks.transfer import transfer
from hybrid_cache.models.shapes import LayerShape


class SharedBlock:
    """Attention over [stream; embedding], then an MLP; no residual inside the block."""

    def __init__(
        self,
        attention: Attention,
        attention_norm: Norm,
        mlp: MLP,
        mlp_norm: Norm,
        adapter_shapes: Sequence[LayerShape] = (),
    ) -> None:
        self._attention = attention
        self._attention_norm = attention_norm
        self._mlp = mlp
        self._mlp_norm = mlp_norm
        self.shapes: tuple[LayerShape, ...] = (attention.shape, mlp.shape, *adapter_shapes)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        """hidden, embedded [R, hidden] -> [R, hidden]."""
        x = self._attention_norm(torch.cat([hidden, embedded], dim=1))
        return self._mlp(self._mlp_norm(self._attention(x, batch, cache)))


class MambaLayer:
    """hidden += mixer(norm(hidden))."""

    def __init__(self, norm: Norm, mixer: Mixer) -> None:
        self._norm = norm
        self._mixer = mixer
        self.shapes: tuple[LayerShape, ...] = (mixer.shape,)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        """hidden, embedded [R, hidden]; overwrites `hidden` -> hidden."""
        return self._mixer.add_to(hidden, self._norm, batch, next(cache))

    def write(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        """Does to its entry what a call does, and no more. hidden, embedded [R, hidden]"""
        self._mixer.write(self._norm(hidden), batch, next(cache))


class HybridLayer:
    """hidden += mixer(norm(hidden + projection(block(hidden, embedded))))."""

    def __init__(self, block: SharedBlock, projection: Linear, norm: Norm, mixer: Mixer) -> None:
        self._block = block
        self._projection = projection
        self._norm = norm
        self._mixer = mixer
        self.shapes: tuple[LayerShape, ...] = (*block.shapes, linear_shape(projection), mixer.shape)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        """hidden, embedded [R, hidden]; overwrites `hidden` -> hidden."""
        injected = self._projection(self._block(hidden, embedded, batch, next(cache)))
        injected += hidden
        hidden += self._mixer(self._norm(injected), batch, next(cache))
        return hidden

    def write(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        """Does to its entries what a call does, and no more. hidden, embedded [R, hidden]"""
        injected = self._projection(self._block(hidden, embedded, batch, next(cache)))
        injected += hidden
        self._mixer.write(self._norm(injected), batch, next(cache))


class _BoundLayer:
    """A layer with the embedding that it reads."""

    def __init__(self, layer: MambaLayer | HybridLayer, embedded: Tensor) -> None:
        self.shapes = layer.shapes
        self._layer = layer
        self._embedded = embedded

    def run(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        return self._layer(hidden, self._embedded, batch, cache)

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self._layer.write(hidden, self._embedded, batch, cache)


class SharedBlockStack:
    """Layers one after the other, each of which may read the embedding once more."""

    def __init__(self, layers: Iterable[MambaLayer | HybridLayer]) -> None:
        self.layers = tuple(layers)
        self.shapes = tuple(shape for layer in self.layers for shape in layer.shapes)

    def __call__(self, hidden: Tensor, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """hidden [R, hidden], overwritten -> [L or more, hidden], the output rows of the batch first."""
        embedded, entries = hidden.clone(), iter(cache)
        if batch.inputs is not None:
            layers = [_BoundLayer(layer, embedded) for layer in self.layers]
            transfer(layers, hidden, batch.inputs, batch, cache)
            return wanted_rows(hidden, batch)
        for index, layer in enumerate(self.layers):
            if batch.tap is not None:
                batch.tap(index, hidden)
            hidden = layer(hidden, embedded, batch, entries)
            batch.pause()
        return wanted_rows(hidden, batch)
