"""State-space mixers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import softplus
from hybrid_cache.kernels.ops import Linear, Mamba1Weights, Mamba2Weights, Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm, RowNorm, linear, tail
from hybrid_cache.models.shapes import Mamba1Shape, Mamba2Shape
from hybrid_cache.models.weights import Weights


class Mamba2(Mixer):
    """State-space mixer with one scalar decay per head. All checkpoints call its weights by the same names."""

    shape: Mamba2Shape

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
        norm: bool = True,
        norm_first: bool = False,
        out_bias: bool | None = None,
        multipliers: Tensor | None = None,
    ) -> None:
        """Without `norm`, y * silu(z) as it is; with `norm_first`, the norm comes before that product.

        proj_bias    of both projections; `out_bias` says otherwise of the second
        multipliers  [projected] of what the first projection gives
        """
        s = self.shape = shape
        self._mamba2 = ops.mamba2
        self._log_decay = ops.mamba2_log_decay
        self._add_at_once = ops.add_mamba2
        self._in = linear(ops, weights, {"in_proj": s.projected}, s.hidden, bias=proj_bias)
        self._into_states = tail(self._in, s.inner)
        self._ops = ops
        self._multipliers = multipliers
        self._weights = Mamba2Weights(
            conv_weight=weights.take("conv1d.weight", s.channels, 1, s.conv_width).view(s.channels, s.conv_width),
            conv_bias=weights.take("conv1d.bias", s.channels) if conv_bias else None,
            dt_bias=weights.take_float32("dt_bias", s.num_heads),
            A=-weights.take_float32("A_log", s.num_heads).exp(),
            D=weights.take_float32("D", s.num_heads),
            norm_weight=weights.take("norm.weight", s.inner) if norm else None,
            norm_eps=norm_eps,
            norm_group=s.inner // s.num_groups,
            num_heads=s.num_heads,
            head_dim=s.head_dim,
            d_state=s.d_state,
            num_groups=s.num_groups,
            dt_min=dt_min,
            dt_max=dt_max,
            norm_first=norm_first,
        )
        out_bias = proj_bias if out_bias is None else out_bias
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=out_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        zxbcdt = self._in(x)
        if self._multipliers is not None:
            zxbcdt *= self._multipliers
        if batch.effects is not None:
            batch.effects.decay(cache.state, self._log_decay(zxbcdt, self._weights))
        return self._out(self._mamba2(zxbcdt, self._weights, batch.layout, cache))

    def write(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> None:
        assert isinstance(cache, StateTensors)
        xbcdt = self._into_states(x)
        if self._multipliers is not None:
            xbcdt *= self._multipliers[self.shape.inner :]
        self._ops.mamba2_states(xbcdt, self._weights, batch.layout, cache)

    def add_to(
        self, hidden: Tensor, norm: Norm, batch: ForwardBatch, cache: CacheEntry, multiplier: float = 1.0
    ) -> Tensor:
        if self._multipliers is not None:
            return super().add_to(hidden, norm, batch, cache, multiplier)
        assert isinstance(cache, StateTensors)
        log_decay = None
        if batch.effects is not None:
            log_decay = hidden.new_empty(len(hidden), self.shape.num_heads, dtype=torch.float32)
            batch.effects.decay(cache.state, log_decay)
        parts = (self._in, self._out, self._weights)
        self._add_at_once(hidden, norm.weights, multiplier, *parts, batch.layout, cache, log_decay)
        return hidden


class Mamba1(Mixer):
    """State-space mixer with one decay per channel and state.

    norm  given the name and size of one of dt, B and C (`dt_layernorm`, ...): what normalises it; None for no norms
    """

    shape: Mamba1Shape

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: Mamba1Shape,
        *,
        conv_bias: bool,
        proj_bias: bool,
        norm: Callable[[str, int], RowNorm] | None = None,
    ) -> None:
        s = self.shape = shape
        self._in = linear(ops, weights, {"in_proj": 2 * s.inner}, s.hidden, bias=proj_bias)
        self._conv = CausalConv(ops, weights, s, bias=conv_bias)
        self._scan = Mamba1Scan(
            ops,
            s,
            to_parts=linear(ops, weights, {"x_proj": s.projected}, s.inner),
            to_dt=linear(ops, weights, {"dt_proj": s.inner}, s.dt_rank),
            weights=Mamba1Weights(
                A=-weights.take_float32("A_log", s.inner, s.d_state).exp(),
                D=weights.take_float32("D", s.inner),
                dt_bias=weights.take_float32("dt_proj.bias", s.inner),
            ),
            norm=norm,
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        x, z = self._in(x).chunk(2, dim=1)
        x = self._conv(x, batch, cache)
        return self._out(self._scan(x, z, batch, cache.state))


class Mamba1Heads(Mixer):
    """Mamba-1 in heads: each has projections of its own to dt, B and C, and its part of the channels (Zamba)."""

    shape: Mamba1Shape

    def __init__(
        self, ops: Ops, weights: Weights, shape: Mamba1Shape, num_heads: int, *, conv_bias: bool, proj_bias: bool
    ) -> None:
        s = self.shape = shape
        size = self._size = s.inner // num_heads
        self._in = _split_pairs(ops, weights, "in_proj", s, bias=proj_bias)
        self._conv = CausalConv(ops, weights, s, bias=conv_bias)
        to_parts = weights.take("x_proj_weight", num_heads, s.projected, size)
        to_dt = weights.take("dt_proj_weight", num_heads, size, s.dt_rank)
        A = -weights.take_float32("A_log", num_heads, size, s.d_state).exp()
        D = weights.take_float32("D", num_heads, size)
        dt_bias = weights.take_float32("dt_proj_bias", num_heads, size)
        self._heads = [
            Mamba1Scan(ops, s, ops.linear(to_parts[i]), ops.linear(to_dt[i]), Mamba1Weights(A[i], D[i], dt_bias[i]))
            for i in range(num_heads)
        ]
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        x, z = self._in(x).chunk(2, dim=1)
        x = self._conv(x, batch, cache)
        parts = (torch.split(part, self._size, dim=1) for part in (x, z, cache.state))
        y = [
            head(x_head, z_head, batch, state) for head, x_head, z_head, state in zip(self._heads, *parts, strict=True)
        ]
        return self._out(torch.cat(y, dim=1))


class CausalConv:
    """The convolution of a Mamba-1 mixer."""

    def __init__(self, ops: Ops, weights: Weights, shape: Mamba1Shape, *, bias: bool) -> None:
        channels, width = shape.inner, shape.conv_width
        self._ops = ops
        self._weight = weights.take("conv1d.weight", channels, 1, width).view(channels, width)
        self._bias = weights.take("conv1d.bias", channels) if bias else None

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: StateTensors) -> Tensor:
        """x [R, channels] -> [R, channels], with the silu."""
        return self._ops.causal_conv(x, self._weight, self._bias, batch.layout, cache.conv)


class Mamba1Scan:
    """From the output of the convolution to the input of the output projection."""

    def __init__(
        self,
        ops: Ops,
        shape: Mamba1Shape,
        to_parts: Linear,
        to_dt: Linear,
        weights: Mamba1Weights,
        norm: Callable[[str, int], RowNorm] | None = None,
    ) -> None:
        self._ops = ops
        self._to_parts = to_parts
        self._to_dt = to_dt
        self._weights = weights
        sizes = {"dt_layernorm": shape.dt_rank, "b_layernorm": shape.d_state, "c_layernorm": shape.d_state}
        self._sizes = list(sizes.values())
        self._norms = None if norm is None else [norm(name, size) for name, size in sizes.items()]

    def __call__(self, x: Tensor, z: Tensor, batch: ForwardBatch, state: Tensor) -> Tensor:
        """x, z [R, channels]   state [slots, channels, d_state] -> [R, channels]."""
        parts: Sequence[Tensor] = self._to_parts(x).split_with_sizes(self._sizes, dim=1)
        if self._norms is not None:
            parts = [norm(part) for norm, part in zip(self._norms, parts, strict=True)]
        _, B, C = parts
        dt = self._to_dt(parts[0])
        if batch.effects is not None:
            batch.effects.channel_decay(state, self._weights.A, softplus(dt.float() + self._weights.dt_bias))
        return self._ops.mamba1_scan(x, dt, B, C, z, self._weights, batch.layout, state)


def _split_pairs(ops: Ops, weights: Weights, name: str, shape: Mamba1Shape, *, bias: bool) -> Linear:
    """A projection whose file has alternating rows of x and z -> first all of x, then all of z."""
    inner, hidden = shape.inner, shape.hidden
    matrix = weights.take(f"{name}.weight", 2 * inner, hidden).view(inner, 2, hidden).transpose(0, 1)
    pairs = weights.take(f"{name}.bias", 2 * inner).view(inner, 2).T if bias else None
    return ops.linear(
        weights.scheme.matrix(matrix.reshape(2 * inner, hidden)), None if pairs is None else pairs.reshape(2 * inner)
    )
