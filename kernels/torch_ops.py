"""The portable backend: plain torch, in shapes that do not depend on the batch.

Three habits keep the promises of `ops`:

- What mixes tokens runs for one tile, or one sequence, at a time, on freshly allocated operands: a tile sees the same
  shapes and alignment wherever its prompt was cut.
- What is elementwise uses only functions whose vector body and scalar tail round alike. `silu`, `sigmoid`, `softplus`,
  `gelu` and `rsqrt` do not (where the tail begins depends on the number of rows), so they are spelled out with `exp`,
  `log1p`, `erf` and `sqrt`, here and in `elementwise`.
- Weights are packed for oneDNN, whose results were the same for each number of rows >= 2 that was tried (up to 1,300),
  but for long sums of bfloat16, which it may cut among threads: see `PackedLinear`.
"""

from collections.abc import Callable, Sequence
from math import pi
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import runs, sampling
from hybrid_cache.kernels.codes import Coded, Matrix
from hybrid_cache.kernels.elementwise import add, sigmoid, silu, softplus
from hybrid_cache.kernels.grid import MIN_ROWS, TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.low_rank import TorchBank
from hybrid_cache.kernels.ops import (
    Bank,
    Draws,
    Experts,
    KVTensors,
    Linear,
    Mamba1Weights,
    Mamba2Weights,
    NormWeights,
    StateTensors,
)
from hybrid_cache.kernels.runs import Run, Runs

# gelu with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
_GELU_LINEAR = 2.0 * (2.0 / pi) ** 0.5
_GELU_CUBIC = 0.044715 * _GELU_LINEAR

LONG_SUM = 1024  # inputs of a product of bfloat16, see `PackedLinear`

P = ParamSpec("P")
R = TypeVar("R")
ScanTile = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # as `_scan_tile`


class PlainLinear:
    """`F.linear`, where oneDNN has no kernel for the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]   bias [out]"""
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) < MIN_ROWS:
            return self(_padded_rows(x))[: len(x)]
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A weight in oneDNN's blocked order; about twice as fast as `F.linear`.

    Products of bfloat16 with long sums run in one thread: with more, oneDNN may cut the sums (seen from 2,048 inputs
    on, with 2 to 16 threads), and whether it does depends on the number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] contiguous   bias [out]"""
        self.out_features, self.in_features = weight.shape
        self._in_one_thread = weight.dtype == torch.bfloat16 and self.in_features >= LONG_SUM
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias
        self._apply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) < MIN_ROWS:
            return self(_padded_rows(x))[: len(x)]
        num_threads = torch.get_num_threads()
        if num_threads == 1 or not self._in_one_thread:
            return self._apply(x, self._weight, self._bias, "none", [], "")
        torch.set_num_threads(1)
        try:
            return self._apply(x, self._weight, self._bias, "none", [], "")
        finally:
            torch.set_num_threads(num_threads)


def _padded_rows(x: Tensor) -> Tensor:
    """With rows of zeros, which are multiplied and dropped."""
    return F.pad(x, (0, 0, 0, MIN_ROWS - len(x)))


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """weight [out, in], bias [out] -> the product with it, in oneDNN's order where oneDNN has a kernel."""
    if _packable(weight):
        return PackedLinear(weight.contiguous(), bias)
    return PlainLinear(weight, bias)


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class CodedLinear:
    """A product with codes: decoded into float32, in which rows are multiplied. It takes 32 bits a weight."""

    def __init__(self, weight: Coded, bias: Tensor | None) -> None:
        """weight [out, in]   bias [out]"""
        self.out_features, self.in_features = weight.shape
        self._product = pack(weight.decoded(), None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.float()).to(x.dtype)


class LoopExperts:
    """Sorts the (row, choice) pairs by expert and runs each expert once on its rows."""

    def __init__(self, w_in: Sequence[Linear], w_out: Sequence[Linear], act: Callable[[Tensor], Tensor]) -> None:
        """act: [R, rows of w_in] -> [R, inner], each row by itself"""
        self._w_in = w_in
        self._w_out = w_out
        self._act = act

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        num_choices = expert_ids.shape[1]
        chosen = expert_ids.flatten()
        order = chosen.argsort(stable=True)
        sorted_rows = x[order // num_choices]
        y = torch.empty_like(sorted_rows)
        start = 0
        for expert, count in enumerate(chosen.bincount(minlength=len(self._w_in)).tolist()):
            if count:
                y[start : start + count] = self._run(expert, sorted_rows[start : start + count])
                start += count
        choices = torch.empty_like(y)
        choices[order] = y
        return _weighted_sum(choices.view(len(x), num_choices, -1), expert_weights).to(x.dtype)

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        return self._w_out[expert](self._act(self._w_in[expert](rows)))


def _weighted_sum(choices: Tensor, shares: Tensor) -> Tensor:
    """choices [R, k, hidden], shares [R, k] -> [R, hidden] float32, summed in the order of k."""
    total = choices[:, 0].float() * shares[:, :1]
    for i in range(1, choices.shape[1]):
        total += choices[:, i].float() * shares[:, i : i + 1]
    return total


class TorchOps:
    """See the module. Weights and layouts are read once: do not change them after their first use."""

    name = "torch"
    device = torch.device("cpu")
    packs = True
    inexact = ""

    def __init__(self) -> None:
        self._last: tuple[RowLayout, Runs] | None = None

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        return CodedLinear(weight, bias) if isinstance(weight, Coded) else pack(weight, bias)

    def bank(self) -> Bank:
        return TorchBank(self.linear, self.device)

    def experts(
        self, w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
    ) -> Experts:
        return LoopExperts([self.linear(w) for w in w_in], [self.linear(w) for w in w_out], act or self.silu_mul)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._fused(_rms_norm)(x, weight, eps)

    def silu_mul(self, x: Tensor) -> Tensor:
        return self._fused(_silu_mul)(x)

    def gelu_mul(self, x: Tensor) -> Tensor:
        return self._fused(_gelu_mul)(x)

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        return self._fused(_gelu_tanh_mul)(x)

    def mamba2_states(self, xbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> None:
        z = xbcdt.new_zeros(len(xbcdt), weights.num_heads * weights.head_dim)
        self.mamba2(torch.cat([z, xbcdt], dim=1), weights, layout, cache)

    def write_rows(self, k: Tensor, v: Tensor, layout: RowLayout, kv: KVTensors) -> None:
        _write_rows(k, v, layout, kv)

    def add_gated_mlp(
        self, hidden: Tensor, norm: NormWeights, multiplier: float, gate_up: Linear, down: Linear
    ) -> None:
        x = self.rms_norm(hidden, norm.weight, norm.eps)
        add(hidden, down(self.silu_mul(gate_up(x))), multiplier)

    def add_mamba2(
        self,
        hidden: Tensor,
        norm: NormWeights,
        multiplier: float,
        into: Linear,
        out: Linear,
        weights: Mamba2Weights,
        layout: RowLayout,
        cache: StateTensors,
        log_decay: Tensor | None = None,
    ) -> None:
        zxbcdt = into(self.rms_norm(hidden, norm.weight, norm.eps))
        if log_decay is not None:
            log_decay.copy_(self.mamba2_log_decay(zxbcdt, weights))
        add(hidden, out(self.mamba2(zxbcdt, weights, layout, cache)), multiplier)

    def mamba2_log_decay(self, zxbcdt: Tensor, weights: Mamba2Weights) -> Tensor:
        w = weights
        dt = self._fused(_time_steps)(zxbcdt[:, -w.num_heads :], w.dt_bias).clamp(w.dt_min, w.dt_max)
        return dt * w.A

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        return self._fused(_rotary)(x, positions, inv_freq)

    def relocate_keys(
        self,
        kv: KVTensors,
        source_rows: Tensor,
        target_rows: Tensor,
        delta: Tensor,
        inv_freq: Tensor | None,
        first: int = 0,
    ) -> None:
        source, target = (source_rows // TILE, source_rows % TILE), (target_rows // TILE, target_rows % TILE)
        keys = kv.k[source]
        if inv_freq is not None and bool(delta.any()):
            rotated = slice(first, first + 2 * len(inv_freq))
            keys[:, :, rotated] = _rotary(keys[:, :, rotated], delta, inv_freq)
        kv.k[target] = keys
        kv.v[target] = kv.v[source]

    def sample(self, logits: Tensor, draws: Draws) -> Tensor:
        return sampling.sample(logits, draws)

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        sampling.mask_tokens(logits, rows, words)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        return sampling.log_sum_exp(logits)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        layout: RowLayout,
        kv: KVTensors,
        window: int | None = None,
    ) -> Tensor:
        _write_rows(k, v, layout, kv)
        out = torch.zeros_like(q)
        runs = self._runs(layout)
        for run in runs.chunks:
            for first, end in run.tiles:
                rows, last = slice(run.row + first, run.row + end), run.start + first + TILE
                keys, values = _gather(kv, run.pages[: -(-last // TILE)], run.start + end, last)
                out[rows] = _attend_tile(_padded(q[rows]), keys, values, scale, window)[: rows.stop - rows.start]
        for run in runs.decodes:
            keys, values = _gather(kv, run.pages, run.end, TILE * len(run.pages))
            first = 0 if window is None else max(0, run.end - window)
            out[run.row] = _attend_last(q[run.row], keys[:, first : run.end], values[:, first : run.end], scale)
        return out

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: RowLayout,
        conv: Tensor,
        activation: bool = True,
    ) -> Tensor:
        y = self._conv(x, weight, bias, layout, conv)
        return (self._fused(silu)(y) if activation else y).to(x.dtype)

    def mamba2(self, zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
        w = weights
        inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
        z, conv_in, dt_in = zxbcdt.tensor_split([inner, 2 * inner + 2 * bc], dim=1)
        conv_out = self._fused(silu)(self._conv(conv_in, w.conv_weight, w.conv_bias, layout, cache.conv))
        x = conv_out[:, :inner].reshape(-1, w.num_heads, w.head_dim)
        B, C = (part.reshape(-1, w.num_groups, w.d_state) for part in conv_out[:, inner:].chunk(2, dim=1))
        dt = self._fused(_time_steps)(dt_in, w.dt_bias).clamp(w.dt_min, w.dt_max)
        y = torch.zeros_like(x)
        runs = self._runs(layout)
        for run in runs.chunks:
            _scan_chunk(self._fused(_scan_tile), run, x, dt, B, C, w.A, cache.state, y)
        if runs.decodes:
            _scan_step(_decode_rows(layout), layout.decode_slot, x, dt, B, C, w.A, cache.state, y)
        y += w.D[:, None] * x
        return self._fused(_gated_norm)(y.flatten(1), z, w.norm_weight, w.norm_eps, w.norm_group, w.norm_first)

    def mamba1_scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        weights: Mamba1Weights,
        layout: RowLayout,
        state: Tensor,
    ) -> Tensor:
        u, B, C = x.float(), B.float(), C.float()
        dt = self._fused(_time_steps)(dt, weights.dt_bias)
        y = torch.zeros_like(u)
        runs = self._runs(layout)
        for run in runs.chunks:
            points = dict(run.captures)
            h = torch.zeros_like(state[0]) if run.fresh else state[run.slot].clone()
            for first, end in run.tiles:
                rows = slice(run.row + first, run.row + end)
                y[rows] = _scan_channels(h, u[rows], dt[rows], B[rows], C[rows], weights.A)
                if end in points:
                    state[points[end]] = h
            state[run.slot] = h
        if runs.decodes:
            rows = _decode_rows(layout)
            h = (dt[rows, :, None] * weights.A).exp() * state[layout.decode_slot]
            h += (dt[rows] * u[rows])[:, :, None] * B[rows, None, :]
            state[layout.decode_slot] = h
            y[rows] = (h * C[rows, None, :]).sum(-1)
        return ((y + weights.D * u) * silu(z.float())).to(x.dtype)

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        B, C, x = k.float(), q.float(), v.float()
        y, one = torch.zeros_like(x), x.new_ones(x.shape[:2])
        runs = self._runs(layout)
        for run in runs.chunks:
            _scan_chunk(self._fused(_scan_tile), run, x, one, B, C, -slope, state, y)
        if runs.decodes:
            _scan_step(_decode_rows(layout), layout.decode_slot, x, one, B, C, -slope, state, y)
        return y.to(v.dtype)

    def rg_lru(
        self, x: Tensor, input_gate: Tensor, gate: Tensor, decay: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        gated = sigmoid(input_gate.float()) * x.float()
        a = (decay * sigmoid(gate.float())).exp()
        share = (1.0 - a * a).sqrt()
        y = gated * share
        runs = self._runs(layout)
        for run in runs.chunks:
            points = dict(run.captures)
            h = torch.zeros_like(state[0]) if run.fresh else state[run.slot].clone()
            if run.fresh:
                y[run.row] = gated[run.row]
            for i in range(run.length):
                y[run.row + i] += a[run.row + i] * h
                h = y[run.row + i]
                if i + 1 in points:
                    state[points[i + 1]] = h
            state[run.slot] = h
        if runs.decodes:
            rows = _decode_rows(layout)
            y[rows] += a[rows] * state[layout.decode_slot]
            state[layout.decode_slot] = y[rows]
        return y.to(x.dtype)

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        return self._delta(_gated_delta_tile, q, k, v, g[:, :, None], beta, layout, state)

    def kimi_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        return self._delta(_kimi_delta_tile, q, k, v, g, beta, layout, state)

    def _delta(
        self,
        compute_tile: "DeltaTile",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        layout: RowLayout,
        state: Tensor,
    ) -> Tensor:
        """g [R, H, 1 or N]."""
        q, k, v_wide = _unit(q) * q.shape[-1] ** -0.5, _unit(k), v.float()
        y = torch.zeros_like(v_wide)
        runs = self._runs(layout)
        for run in runs.chunks:
            points = dict(run.captures)
            h = torch.zeros_like(state[0]) if run.fresh else state[run.slot].clone()
            for first, end in run.tiles:
                rows = slice(run.row + first, run.row + end)
                h, y_tile = compute_tile(h, *(_padded(x[rows]) for x in (q, k, v_wide, g, beta)))
                y[rows] = y_tile[: end - first]
                if end in points:
                    state[points[end]] = h
            state[run.slot] = h
        if runs.decodes:
            rows = _decode_rows(layout)
            heads_per_group = v.shape[1] // k.shape[1]
            q, k = (x[rows].repeat_interleave(heads_per_group, dim=1)[:, :, None] for x in (q, k))  # [D, H, 1, N]
            h = state[layout.decode_slot] * g[rows, :, None].exp()
            error = v_wide[rows] - (h * k).sum(-1)
            h += (beta[rows, :, None] * error)[..., None] * k
            state[layout.decode_slot] = h
            y[rows] = (h * q).sum(-1)
        return y.to(v.dtype)

    def _fused(self, part: Callable[P, R]) -> Callable[P, R]:
        """A pure function of tensors, as it is; `CompiledOps` compiles it."""
        return part

    def _runs(self, layout: RowLayout) -> Runs:
        """All layers of a step share one layout object; reading it takes longer than a small operation."""
        last = self._last
        if last is None or last[0] is not layout:
            last = self._last = (layout, runs.read(layout))
        return last[1]

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout, conv: Tensor) -> Tensor:
        """-> [R, channels] float32, before any activation."""
        width = weight.shape[1]
        taps = weight.float().T.contiguous()
        offset = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
        out = torch.zeros_like(x, dtype=torch.float32)
        runs = self._runs(layout)
        for run in runs.chunks:
            window = torch.zeros_like(conv[0]) if run.fresh else conv[run.slot]
            rows = torch.cat([window, x[run.row : run.row + run.length]])
            out[run.row : run.row + run.length] = self._fused(_convolve)(rows, taps, offset)
            for num_tokens, slot in [*run.captures, (run.length, run.slot)]:
                conv[slot] = rows[num_tokens : num_tokens + width - 1]
        if runs.decodes:
            rows = torch.cat([conv[layout.decode_slot], x[_decode_rows(layout), None]], dim=1)
            y = offset.expand(len(rows), -1)
            for i in range(width):
                y = y + rows[:, i].float() * taps[i]
            out[_decode_rows(layout)] = y
            conv[layout.decode_slot] = rows[:, 1:]
        return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def _silu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(x.dtype)


def _gelu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (0.5 * gate * (1.0 + torch.erf(gate * 0.5**0.5)) * up).to(x.dtype)


def _gelu_tanh_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(gate * (gate * gate * -_GELU_CUBIC - _GELU_LINEAR))) * up).to(x.dtype)


def _rotary(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    angle = positions.float()[:, None, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _time_steps(dt: Tensor, bias: Tensor) -> Tensor:
    return softplus(dt.float() + bias)


def _convolve(rows: Tensor, taps: Tensor, offset: Tensor) -> Tensor:
    """rows [K - 1 + T, channels], taps [K, channels] -> [T, channels] float32."""
    length, wide = len(rows) - len(taps) + 1, rows.float()
    y = offset.expand(length, -1)
    for i in range(len(taps)):
        y = y + wide[i : i + length] * taps[i]
    return y


def _decode_rows(layout: RowLayout) -> slice:
    return slice(layout.decode_row, layout.decode_row + layout.num_decode)


# Attention


def _write_rows(k: Tensor, v: Tensor, layout: RowLayout, kv: KVTensors) -> None:
    rows = (layout.kv_rows >= 0).nonzero().flatten()
    target = layout.kv_rows[rows]
    page, offset = target // TILE, target % TILE
    kv.k[page, offset] = k[rows]
    kv.v[page, offset] = v[rows]


def _gather(kv: KVTensors, pages: list[int], num_tokens: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """-> keys, values [kv_heads, num_rows, d] float32; rows from `num_tokens` on, which may hold NaN, are zero."""
    index = torch.tensor(pages, device=kv.k.device)
    keys, values = (_fitted(pool[index].flatten(0, 1).float(), num_tokens, num_rows) for pool in (kv.k, kv.v))
    return keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()


def _fitted(rows: Tensor, num_tokens: int, num_rows: int) -> Tensor:
    """Zeros from `num_tokens` on, and `num_rows` in all."""
    if len(rows) != num_rows:
        rows = torch.cat([rows[:num_rows], rows.new_zeros(max(num_rows - len(rows), 0), *rows.shape[1:])])
    rows[num_tokens:] = 0.0
    return rows


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """q [TILE, heads, d], the last TILE of the positions in keys, values [kv_heads, T, d] -> [TILE, heads, d]."""
    _, heads, d = q.shape
    kv_heads, num_keys, _ = keys.shape
    grouped = q.float().reshape(TILE, kv_heads, -1, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)
    scores = (grouped @ keys.transpose(1, 2)).view(kv_heads, -1, TILE, num_keys) * scale
    positions = torch.arange(num_keys, device=q.device)
    visible = positions <= positions[-TILE:, None]
    if window is not None:
        visible &= positions > positions[-TILE:, None] - window
    scores.masked_fill_(~visible, -torch.inf)
    y = _softmax(scores).flatten(1, 2) @ values
    return y.view(heads, TILE, d).transpose(0, 1).to(q.dtype)


def _attend_last(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [heads, d], keys, values [kv_heads, T, d] -> [heads, d]."""
    grouped = q.float().reshape(len(keys), -1, q.shape[-1])
    scores = (grouped @ keys.contiguous().transpose(1, 2)) * scale
    return (_softmax(scores) @ values.contiguous()).view(q.shape).to(q.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """The weights of the last dimension, without those that are no normal numbers: a CPU multiplies these slowly."""
    weights = scores.softmax(-1)
    return F.threshold(weights, torch.finfo(torch.float32).tiny, 0.0, inplace=True)


# Mamba-2


def _scan_chunk(
    scan_tile: ScanTile,
    run: Run,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    state: Tensor,
    y: Tensor,
) -> None:
    """x [R, H, P], dt [R, H], B, C [R, G, N]; fills the run's rows of y [R, H, P] and its slots of `state`."""
    points = dict(run.captures)
    h = torch.zeros_like(state[0]) if run.fresh else state[run.slot].clone()
    for first, end in run.tiles:
        rows = slice(run.row + first, run.row + end)
        h, y_tile = scan_tile(h, _padded(x[rows]), _padded(dt[rows]), _padded(B[rows]), _padded(C[rows]), A)
        y[rows] = y_tile[: end - first]
        if end in points:
            state[points[end]] = h
    state[run.slot] = h


def _padded(rows: Tensor) -> Tensor:
    """Always a new tensor of TILE rows. A row of zeros has dt = 0, which leaves the state as it is."""
    tile = rows.new_zeros((TILE, *rows.shape[1:]))
    tile[: len(rows)] = rows
    return tile


def _scan_tile(h: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of the state-space dual form (Dao and Gu 2024, section 6), all float32.

    h [H, P, N], x [T, H, P], dt [T, H], B, C [T, G, N] -> h after the tile, y [T, H, P] without the skip D
    """
    heads_per_group = x.shape[1] // B.shape[1]
    decay = (dt * A).cumsum(0).T.contiguous()  # [H, T], log of the decay from before the tile to after a token
    between = decay[:, :, None] - decay[:, None, :]
    causal = torch.ones(TILE, TILE, dtype=torch.bool, device=x.device).tril_()
    dtx = (dt[:, :, None] * x).transpose(0, 1).contiguous()  # [H, T, P]
    by_group_b, by_group_c = (part.transpose(0, 1).contiguous() for part in (B, C))  # [G, T, N]
    cb = (by_group_c @ by_group_b.transpose(1, 2)).repeat_interleave(heads_per_group, dim=0)
    b, c = (part.repeat_interleave(heads_per_group, dim=0) for part in (by_group_b, by_group_c))  # [H, T, N]
    y = (cb * between.masked_fill(~causal, -torch.inf).exp()) @ dtx
    y += (c * decay.exp()[:, :, None]) @ h.transpose(1, 2)
    to_end = (decay[:, -1:] - decay).exp()
    new = h * decay[:, -1, None, None].exp() + (dtx * to_end[:, :, None]).transpose(1, 2) @ b
    return new, y.transpose(0, 1)


def _scan_step(
    rows: slice,
    slots: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    state: Tensor,
    y: Tensor,
) -> None:
    """The recurrence for one token of each decode row."""
    heads_per_group = x.shape[1] // B.shape[1]
    b, c = (part[rows].repeat_interleave(heads_per_group, dim=1) for part in (B, C))  # [D, H, N]
    h = state[slots] * (dt[rows] * A).exp()[:, :, None, None]
    h += (dt[rows, :, None] * x[rows])[..., None] * b[:, :, None, :]
    state[slots] = h
    y[rows] = (h * c[:, :, None, :]).sum(-1)


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor | None, eps: float, group: int, norm_first: bool) -> Tensor:
    """y float32, z [R, channels] -> [R, channels] in the dtype of z; see `Mamba2Weights`."""
    gate = silu(z.float())
    if weight is None:
        return (y * gate).to(z.dtype)
    x = y if norm_first else y * gate
    normed = F.rms_norm(x.view(len(x), -1, group), (group,), None, eps).flatten(1) * weight.float()
    return (normed * gate if norm_first else normed).to(z.dtype)


# Delta rule

DELTA_BLOCK = 16  # rows


def _unit(x: Tensor) -> Tensor:
    """x [R, heads, N] -> float32 rows of length one."""
    x = x.float()
    return x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt()


DeltaTile = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""h [H, P, N], q, k [T, G, N], v [T, H, P], g [T, H, 1 or N], beta [T, H] -> h after the tile, y [T, H, P].

All float32. A token writes beta (v - h k): what the state would say at its key is wrong by so much. That depends on
what the earlier tokens of the tile wrote, so all of it is the solution of one triangular system.
"""


def _gated_delta_tile(h: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Yang et al. 2024, section 3.3."""
    heads_per_group = v.shape[1] // k.shape[1]
    decay = g[:, :, 0].cumsum(0).T.contiguous()  # [H, T], log of the decay from before the tile to a token
    causal = torch.ones(TILE, TILE, dtype=torch.bool, device=v.device).tril_()
    between = (decay[:, :, None] - decay[:, None, :]).masked_fill_(~causal, -torch.inf).exp_()
    q, k = (x.transpose(0, 1).contiguous() for x in (q, k))  # [G, T, N]
    qk, kk = ((x @ k.transpose(1, 2)).repeat_interleave(heads_per_group, dim=0) * between for x in (q, k))
    q, k = (x.repeat_interleave(heads_per_group, dim=0) for x in (q, k))
    return _delta_of_products(h, q, k, v, g.transpose(0, 1).contiguous(), beta, qk, kk)


def _kimi_delta_tile(h: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Kimi Team 2025, section 3.2.

    A product of two tokens' rows has the decay between them inside. Within a block of rows it is computed pair by pair;
    between blocks it is split at the later block's start, so that no factor is larger than one.
    """
    g, q, k = (x.transpose(0, 1).contiguous() for x in (g, q, k))  # [H, T, N]
    heads, _, size = k.shape
    g_blocks, q_blocks, k_blocks = (x.view(heads, -1, DELTA_BLOCK, size) for x in (g, q, k))
    causal = torch.ones(DELTA_BLOCK, DELTA_BLOCK, dtype=torch.bool, device=v.device).tril_()
    between = torch.where(causal.tril(-1)[:, :, None], g_blocks[:, :, :, None], 0.0).cumsum(2)  # from column to row
    decayed = between.masked_fill_(~causal[:, :, None], -torch.inf).exp_() * k_blocks[:, :, None]
    qk, kk = torch.zeros(heads, TILE, TILE, device=v.device), torch.zeros(heads, TILE, TILE, device=v.device)
    for product, x, x_blocks in ((qk, q, q_blocks), (kk, k, k_blocks)):
        near = (decayed * x_blocks[:, :, :, None]).sum(-1)  # [H, blocks, block, block]
        far = x * g_blocks.cumsum(2).exp_().view(heads, TILE, size)
        for block, first in enumerate(range(0, TILE, DELTA_BLOCK)):
            rows = slice(first, first + DELTA_BLOCK)
            product[:, rows, rows] = near[:, block]
            if first:
                until = k[:, :first] * _sums_after(g[:, :first]).exp_()
                product[:, rows, :first] = far[:, rows] @ until.transpose(1, 2)
    return _delta_of_products(h, q, k, v, g, beta, qk, kk)


def _sums_after(g: Tensor) -> Tensor:
    """g [H, T, *] -> for each row the sum of all rows after it."""
    sums = torch.zeros_like(g)
    sums[:, :-1] = g[:, 1:].flip(1).cumsum(1).flip(1)
    return sums


def _delta_of_products(
    h: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, qk: Tensor, kk: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k [H, T, N], g [H, T, 1 or N], qk, kk [H, T, T] with the decay between two tokens; the rest as above."""
    beta = beta.T.contiguous()[:, :, None]
    from_start, to_end = g.cumsum(1).exp(), _sums_after(g).exp()
    said = (k * from_start) @ h.transpose(1, 2)  # by the state before the tile
    right = beta * (v.transpose(0, 1) - said)
    written = torch.linalg.solve_triangular(kk * beta, right, upper=False, unitriangular=True)  # [H, T, P]
    y = (q * from_start) @ h.transpose(1, 2) + qk @ written
    return h * from_start[:, -1:] + written.transpose(1, 2) @ (k * to_end), y.transpose(0, 1)


# Mamba-1


def _scan_channels(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """u, dt [T, channels], B, C [T, N], T <= TILE; overwrites h [channels, N] -> y [T, channels] without the skip D."""
    decay = (dt[:, :, None] * A).exp()
    states = (dt * u)[:, :, None] * B[:, None, :]
    for t in range(len(u)):
        states[t] += decay[t] * h
        h.copy_(states[t])
    return (states * C[:, None, :]).sum(-1)
