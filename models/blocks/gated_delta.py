"""Linear attention with the delta rule."""

import torch
from torch import Tensor

from hybrid_cache.batch import ForwardBatch
from hybrid_cache.kernels.ops import Linear, Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Norm, sigmoid, softplus
from hybrid_cache.models.shapes import GatedDeltaShape
from hybrid_cache.models.weights import Weights


class GatedDelta:
    """Convolution, gated delta rule, norm of each head and gate, between two projections (Yang et al. 2024).

    projection   gives queries, keys, values, the gate z, then b and a: see `GatedDeltaShape.projected`
    conv_weight  [channels, K], over queries, keys and values
    norm         of each head, before the gate
    max_beta     2 where the state may also turn its sign along a key
    """

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: GatedDeltaShape,
        projection: Linear,
        conv_weight: Tensor,
        norm: Norm,
        out: Linear,
        *,
        max_beta: float = 1.0,
    ) -> None:
        s = self.shape = shape
        self._ops = ops
        self._in = projection
        self._conv_weight = conv_weight
        self._A = -weights.take_float32("A_log", s.num_heads).exp()
        self._dt_bias = weights.take_float32("dt_bias", s.num_heads)
        self._norm = norm
        self._out = out
        self._max_beta = max_beta

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        s, rows = self.shape, x.shape[0]
        qkv, z, b, a = self._in(x).split_with_sizes([s.channels, s.inner, s.num_heads, s.num_heads], dim=1)
        qkv = self._ops.causal_conv(qkv, self._conv_weight, None, batch.layout, cache.conv)
        q, k, v = qkv.split_with_sizes([s.keys, s.keys, s.inner], dim=1)
        q, k = q.view(rows, s.num_groups, s.d_state), k.view(rows, s.num_groups, s.d_state)
        v = v.view(rows, s.num_heads, s.head_dim)
        beta = self._max_beta * sigmoid(b)
        g = self._A * softplus(a.float() + self._dt_bias)
        y = self._ops.gated_delta(q, k, v, g, beta, batch.layout, cache.state)
        y = self._norm(y.view(-1, s.head_dim)).view(rows, s.inner)
        return self._out(self._ops.silu_mul(torch.cat([z, y], dim=1)))
