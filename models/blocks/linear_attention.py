"""Linear attention."""

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import gated
from hybrid_cache.kernels.ops import Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm, linear
from hybrid_cache.models.shapes import LinearAttentionShape
from hybrid_cache.models.weights import Weights


class LightningAttention(Mixer):
    """Attention without softmax and with a fixed decay for each head (Qin et al. 2024), then a norm and a gate."""

    shape: LinearAttentionShape

    def __init__(self, ops: Ops, weights: Weights, shape: LinearAttentionShape, *, slope: Tensor, norm: Norm) -> None:
        """slope [heads] float32: how fast a head forgets."""
        s = self.shape = shape
        self._ops = ops
        self._in = linear(ops, weights, {"qkv_proj": 3 * s.inner, "output_gate": s.inner}, s.hidden)
        self._slope = slope
        self._norm = norm
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        s = self.shape
        qkv, gate = self._in(x).split_with_sizes([3 * s.inner, s.inner], dim=1)
        qkv = gated(qkv, qkv).view(len(x), s.num_heads, 3 * s.head_dim)
        q, k, v = qkv.chunk(3, dim=2)
        if batch.effects is not None:
            batch.effects.decay(cache.state, -self._slope.expand(len(x), -1))
        y = self._ops.linear_attention(q, k, v, self._slope, batch.layout, cache.state).flatten(1)
        return self._out(gated(self._norm(y), gate))


def alibi_slopes(num_heads: int) -> Tensor:
    """-> [heads] float32: 2^(-8 i / heads) for head i from 1 on (Press et al. 2021)."""
    base: float = 1 / 2 ** (8 / num_heads)
    return base ** (torch.arange(num_heads) + 1)
