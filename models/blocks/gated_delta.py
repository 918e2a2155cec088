"""Linear attention with the delta rule."""

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import gated, sigmoid, softplus
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Linear, Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm
from hybrid_cache.models.shapes import GatedDeltaShape, KimiDeltaShape
from hybrid_cache.models.weights import Weights


class GatedDelta(Mixer):
    """Convolution, gated delta rule, norm of each head and gate, between two projections (Yang et al. 2024).

    projection   gives queries, keys, values, the gate z, then b and a: see `GatedDeltaShape.projected`
    conv_weight  [channels, K], over queries, keys and values
    norm         of each head, before the gate
    max_beta     2 where the state may also change its sign along a key
    """

    shape: GatedDeltaShape

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
        if batch.effects is not None:

            def transition(rows: slice, layout: RowLayout, pool: Tensor) -> Tensor:
                nothing = v.new_zeros(rows.stop - rows.start, s.num_heads, s.d_state)
                return self._ops.gated_delta(q[rows], k[rows], nothing, g[rows], beta[rows], layout, pool)

            batch.effects.matrix(cache.state, s.d_state, transition)
        y = self._ops.gated_delta(q, k, v, g, beta, batch.layout, cache.state)
        y = self._norm(y.view(-1, s.head_dim)).view(rows, s.inner)
        return self._out(self._ops.silu_mul(torch.cat([z, y], dim=1)))


class KimiDelta(Mixer):
    """Convolution, delta rule with a decay for each column, norm of each head and gate (Kimi Team 2025).

    projection   gives queries, keys, values, then b, then what `decay` and `gate` are made of
    decay, gate  their second halves, where they have low rank
    lowest       the logarithm of a decay is between this and 0, by a sigmoid; None for -exp(A) softplus
    """

    shape: KimiDeltaShape

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: KimiDeltaShape,
        projection: Linear,
        conv_weight: Tensor,
        norm: Norm,
        out: Linear,
        *,
        decay: Linear | None,
        gate: Linear | None,
        rate: Tensor,
        lowest: float | None,
    ) -> None:
        """rate [H] float32, exp(A)."""
        s = self.shape = shape
        self._ops = ops
        self._in = projection
        self._conv_weight = conv_weight
        self._rate = rate[:, None]
        self._dt_bias = weights.take_float32("dt_bias", s.inner)
        self._norm = norm
        self._out = out
        self._decay = decay
        self._gate = gate
        self._lowest = lowest

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        s, heads = self.shape, (x.shape[0], self.shape.num_heads, self.shape.head_dim)
        qkv, b, f, z = self._in(x).split_with_sizes([s.channels, s.num_heads, s.gate_width, s.gate_width], dim=1)
        qkv = self._ops.causal_conv(qkv, self._conv_weight, None, batch.layout, cache.conv)
        q, k, v = (part.view(heads) for part in qkv.chunk(3, dim=1))
        g = self._log_decay((f if self._decay is None else self._decay(f.contiguous())).view(heads))
        beta = sigmoid(b)
        if batch.effects is not None:

            def transition(rows: slice, layout: RowLayout, pool: Tensor) -> Tensor:
                nothing = torch.zeros_like(k[rows])
                return self._ops.kimi_delta(q[rows], k[rows], nothing, g[rows], beta[rows], layout, pool)

            batch.effects.matrix(cache.state, s.head_dim, transition)
        y = self._ops.kimi_delta(q, k, v, g, beta, batch.layout, cache.state)
        y = self._norm(y.view(-1, s.head_dim)).view(-1, s.inner)
        z = z if self._gate is None else self._gate(z.contiguous())
        return self._out(gated(y, z))

    def _log_decay(self, f: Tensor) -> Tensor:
        f = f.float() + self._dt_bias.view(f.shape[1:])
        if self._lowest is not None:
            return self._lowest * sigmoid(self._rate * f)
        return -self._rate * softplus(f)
