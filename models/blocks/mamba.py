"""State-space mixers."""

from torch import Tensor

from hybrid_cache.batch import ForwardBatch
from hybrid_cache.kernels.ops import Mamba1Weights, Mamba2Weights, Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Norm, linear
from hybrid_cache.models.shapes import Mamba1Shape, Mamba2Shape
from hybrid_cache.models.weights import Weights


class Mamba2:
    """State-space mixer with one scalar decay per head. All checkpoints call its weights by the same names."""

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: Mamba2Shape,
        *,
        conv_bias: bool,
        proj_bias: bool,
        norm_eps: float,
        dt_min: float,
        dt_max: float,
    ) -> None:
        s = self.shape = shape
        self._mamba2 = ops.mamba2
        self._in = linear(ops, weights, {"in_proj": s.projected}, s.hidden, bias=proj_bias)
        self._weights = Mamba2Weights(
            conv_weight=weights.take("conv1d.weight", s.channels, 1, s.conv_width).view(s.channels, s.conv_width),
            conv_bias=weights.take("conv1d.bias", s.channels) if conv_bias else None,
            dt_bias=weights.take_float32("dt_bias", s.num_heads),
            A=-weights.take_float32("A_log", s.num_heads).exp(),
            D=weights.take_float32("D", s.num_heads),
            norm_weight=weights.take("norm.weight", s.inner),
            norm_eps=norm_eps,
            norm_group=s.inner // s.num_groups,
            num_heads=s.num_heads,
            head_dim=s.head_dim,
            d_state=s.d_state,
            num_groups=s.num_groups,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        return self._out(self._mamba2(self._in(x), self._weights, batch.layout, cache))


class Mamba1:
    """State-space mixer with one decay per channel and state, and norms on dt, B and C (Jamba's form)."""

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: Mamba1Shape,
        *,
        conv_bias: bool,
        proj_bias: bool,
        norm_eps: float,
    ) -> None:
        s = self.shape = shape
        self._ops = ops
        self._in = linear(ops, weights, {"in_proj": 2 * s.inner}, s.hidden, bias=proj_bias)
        self._conv_weight = weights.take("conv1d.weight", s.inner, 1, s.conv_width).view(s.inner, s.conv_width)
        self._conv_bias = weights.take("conv1d.bias", s.inner) if conv_bias else None
        self._x = linear(ops, weights, {"x_proj": s.projected}, s.inner)
        self._x_split = [s.dt_rank, s.d_state, s.d_state]
        self._dt_norm = Norm(ops, weights, "dt_layernorm", s.dt_rank, norm_eps)
        self._b_norm = Norm(ops, weights, "b_layernorm", s.d_state, norm_eps)
        self._c_norm = Norm(ops, weights, "c_layernorm", s.d_state, norm_eps)
        self._dt = linear(ops, weights, {"dt_proj": s.inner}, s.dt_rank)
        self._weights = Mamba1Weights(
            A=-weights.take_float32("A_log", s.inner, s.d_state).exp(),
            D=weights.take_float32("D", s.inner),
            dt_bias=weights.take_float32("dt_proj.bias", s.inner),
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        x, z = self._in(x).chunk(2, dim=1)
        x = self._ops.causal_conv(x, self._conv_weight, self._conv_bias, batch.layout, cache.conv)
        dt, B, C = self._x(x).split_with_sizes(self._x_split, dim=1)
        dt = self._dt(self._dt_norm(dt))
        B, C = self._b_norm(B), self._c_norm(C)
        y = self._ops.mamba1_scan(x, dt, B, C, z, self._weights, batch.layout, cache.state)
        return self._out(y)
