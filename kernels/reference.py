"""Each operation of `Ops` as the papers write it: float32, one sequence and one token at a time.

These functions say what is right; they are not meant to be fast. Letters, dtypes and side effects are those of `ops`.
Rows that belong to no sequence come back as zeros.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import runs
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Draws, KVTensors, Mamba1Weights, Mamba2Weights, StateTensors

packs = True  # as in `ops.Ops`


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, in], weight [out, in], bias [out] -> x @ weight.T + bias, [R, out]."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A token goes to its k experts, one after the other (Shazeer et al. 2017).

    x [R, hidden]   expert_ids [R, k] int64   expert_weights [R, k] float32
    for each expert: w_in [2 * inner, hidden], w_out [hidden, inner] -> [R, hidden]
    """
    act = act or silu_mul
    out = torch.zeros(x.shape, dtype=torch.float32)
    for row in range(len(x)):
        for expert, share in zip(expert_ids[row].tolist(), expert_weights[row], strict=True):
            out[row] += share * (w_out[expert].float() @ act(w_in[expert].float() @ x[row].float()))
    return out.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, d], weight [d] -> x / sqrt(mean(x^2) + eps) * weight, [R, d] (Zhang and Sennrich 2019)."""
    return _normalised(x.float(), weight, eps).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """x [R, 2 * d] -> silu(x[:, :d]) * x[:, d:], SwiGLU's activation (Shazeer 2020)."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_mul(x: Tensor) -> Tensor:
    """x [R, 2 * d] -> gelu(x[:, :d]) * x[:, d:], with erf."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """x [R, 2 * d] -> gelu(x[:, :d]) * x[:, d:], with tanh in place of erf."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Pairs (i, i + d / 2) are rotated by the angle position * inv_freq[i] (Su et al. 2021).

    x [R, heads, d]   positions [R] int64   inv_freq [d / 2] float32 -> [R, heads, d]
    """
    angle = positions.float()[:, None, None] * inv_freq
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def relocate_keys(
    kv: KVTensors, source_rows: Tensor, target_rows: Tensor, delta: Tensor, inv_freq: Tensor | None, first: int = 0
) -> None:
    """Copies KV rows to other rows, for tokens whose positions there are `delta` higher.

    A key rotated to position p and then by delta more is the key of position p + delta. Values, keys without positions
    and rows with delta = 0 are copied as they are.

    source_rows, target_rows [N] int64, page * TILE + offset; a row may not be in both, a negative target is skipped
    delta [N] int64   inv_freq [d / 2] float32: the values [first, first + d) of a head are rotated; None for none
    """
    for source, target, shift in zip(source_rows.tolist(), target_rows.tolist(), delta.tolist(), strict=True):
        if target < 0:
            continue
        for pages in (kv.k, kv.v):
            pages[target // TILE, target % TILE] = pages[source // TILE, source % TILE]
        if inv_freq is not None and shift != 0:
            key = kv.k[target // TILE, target % TILE, None, :, first : first + 2 * len(inv_freq)]
            key.copy_(rotary(key, torch.tensor([shift], device=key.device), inv_freq))


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """One token a row: the temperature, then top_k, top_p and min_p, then the inverse of the cumulated distribution.

    logits [S, V] -> [S] int64
    """
    columns = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.point)
    tokens = []
    for row, *values in zip(logits.double(), *(column.tolist() for column in columns), strict=True):
        temperature, top_k, top_p, min_p, point = values
        if temperature == 0:
            tokens.append(int(row.argmax()))
            continue
        weights = torch.exp((row - row.max()) / temperature)
        falling = weights.sort(descending=True).values
        kept = falling[falling >= falling[min(top_k, len(falling)) - 1]] if top_k else falling
        larger = kept.cumsum(0) - kept
        least = kept[larger < top_p * kept.sum()][-1] if top_p < 1 else kept[-1]
        weights[(weights < least) | (weights < min_p)] = 0
        tokens.append(int((weights.cumsum(0) > point * weights.sum()).nonzero()[0]))
    return torch.tensor(tokens, dtype=torch.int64)


def mask_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """logits [S, V] of the rows [C]: -inf where a bit of words [C, V / 32, rounded up] is not set."""
    for row, mask in zip(rows.tolist(), words.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not mask[token // 32] >> token % 32 & 1:
                logits[row, token] = -torch.inf


def log_sum_exp(logits: Tensor) -> Tensor:
    """logits [S, V] -> log(sum(exp(logits))) of each row, [S] float32."""
    return torch.logsumexp(logits.double(), 1).float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: RowLayout, kv: KVTensors, window: int | None = None
) -> Tensor:
    """A token attends to itself and all earlier tokens of its sequence, or to the last `window` of these.

    q [R, heads, d]   k, v [R, kv_heads, d], first written to the pages -> [R, heads, d]
    """
    for row, target in enumerate(layout.kv_rows.tolist()):
        if target >= 0:
            kv.k[target // TILE, target % TILE] = k[row]
            kv.v[target // TILE, target % TILE] = v[row]
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for run in runs.read(layout):
        keys, values = (pages[run.pages].flatten(0, 1).float() for pages in (kv.k, kv.v))
        for i in range(run.length):
            num_visible = run.start + i + 1
            first = 0 if window is None else max(0, num_visible - window)
            for head in range(q.shape[1]):
                scores = keys[first:num_visible, head // group] @ q[run.row + i, head].float() * scale
                out[run.row + i, head] = (scores.softmax(0) @ values[first:num_visible, head // group]).to(q.dtype)
    return out


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout, conv: Tensor, activation: bool = True
) -> Tensor:
    """y[t] = silu(bias + sum_k weight[:, k] * x[t - K + 1 + k]), or the sum as it is.

    x [R, channels]   weight [channels, K]   bias [channels]   conv [slots, K - 1, channels] -> [R, channels]
    """
    out = torch.zeros_like(x)
    width = weight.shape[1]
    for run in runs.read(layout):
        window = torch.zeros_like(conv[run.slot]) if run.fresh else conv[run.slot].clone()
        rows = torch.cat([window, x[run.row : run.row + run.length]])
        for i in range(run.length):
            y = (rows[i : i + width].float() * weight.float().T).sum(0)
            y = y if bias is None else y + bias.float()
            out[run.row + i] = (F.silu(y) if activation else y).to(x.dtype)
        for num_tokens, slot in [*run.captures, (run.length, run.slot)]:
            conv[slot] = rows[num_tokens : num_tokens + width - 1]
    return out


def mamba2(zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
    """h = exp(dt A) h + dt x B^T, y = h C + D x for each head, then norm(y * silu(z)) (Dao and Gu 2024).

    Or norm(y) * silu(z), or y * silu(z) without a norm (Falcon-H1).

    zxbcdt [R, 2 * H * P + 2 * G * N + H]: z, then x, B, C, then dt   h [H, P, N] -> [R, H * P]
    """
    w = weights
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    z, conv_in, dt = zxbcdt.float().tensor_split([inner, 2 * inner + 2 * bc], dim=1)
    conv_out = _conv_float(conv_in, w, layout, cache.conv)
    x = conv_out[:, :inner].reshape(-1, w.num_heads, w.head_dim)
    B, C = (
        part.reshape(-1, w.num_groups, w.d_state).repeat_interleave(w.num_heads // w.num_groups, dim=1)
        for part in conv_out[:, inner:].chunk(2, dim=1)
    )
    dt = F.softplus(dt + w.dt_bias).clamp(w.dt_min, w.dt_max)
    y = torch.zeros_like(x)
    for run in runs.read(layout):
        h = torch.zeros_like(cache.state[run.slot]) if run.fresh else cache.state[run.slot].clone()
        points = dict(run.captures)
        for i in range(run.length):
            t = run.row + i
            h = (dt[t] * w.A).exp()[:, None, None] * h + (dt[t][:, None] * x[t])[:, :, None] * B[t][:, None, :]
            y[t] = (h * C[t][:, None, :]).sum(-1) + w.D[:, None] * x[t]
            if i + 1 in points:
                cache.state[points[i + 1]] = h
        cache.state[run.slot] = h
    y, gate = y.flatten(1), F.silu(z)
    if w.norm_weight is None:
        return (y * gate).to(zxbcdt.dtype)
    grouped = (y if w.norm_first else y * gate).view(len(y), -1, w.norm_group)
    normed = _normalised(grouped, w.norm_weight.view(-1, w.norm_group), w.norm_eps).flatten(1)
    return (normed * gate if w.norm_first else normed).to(zxbcdt.dtype)


def mamba1_scan(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    weights: Mamba1Weights,
    layout: RowLayout,
    state: Tensor,
) -> Tensor:
    """h = exp(dt A) h + dt B x, y = (C h + D x) * silu(z) for each channel (Gu and Dao 2023).

    x, dt, z [R, channels]   B, C [R, N]   state [slots, channels, N] float32 -> [R, channels]
    """
    u, B, C = x.float(), B.float(), C.float()
    dt = F.softplus(dt.float() + weights.dt_bias)
    y = torch.zeros_like(u)
    for run in runs.read(layout):
        h = torch.zeros_like(state[run.slot]) if run.fresh else state[run.slot].clone()
        points = dict(run.captures)
        for i in range(run.length):
            t = run.row + i
            h = (dt[t][:, None] * weights.A).exp() * h + (dt[t] * u[t])[:, None] * B[t]
            y[t] = (h * C[t]).sum(-1) + weights.D * u[t]
            if i + 1 in points:
                state[points[i + 1]] = h
        state[run.slot] = h
    return (y * F.silu(z.float())).to(x.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """h = exp(-slope) h + v k^T, y = h q for each head (Qin et al. 2024).

    q, k [R, H, N]   v [R, H, P]   slope [H] float32   state [slots, H, P, N] float32 -> [R, H, P]
    """
    y = torch.zeros_like(v)
    for run in runs.read(layout):
        h = torch.zeros_like(state[run.slot]) if run.fresh else state[run.slot].clone()
        points = dict(run.captures)
        for i in range(run.length):
            t = run.row + i
            h = (-slope).exp()[:, None, None] * h + v[t].float()[:, :, None] * k[t].float()[:, None, :]
            y[t] = (h * q[t].float()[:, None, :]).sum(-1).to(y.dtype)
            if i + 1 in points:
                state[points[i + 1]] = h
        state[run.slot] = h
    return y


def rg_lru(x: Tensor, input_gate: Tensor, gate: Tensor, decay: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """h = a h + sqrt(1 - a^2) sigmoid(input_gate) x, a = exp(decay sigmoid(gate)) (De et al. 2024).

    x, input_gate, gate [R, channels]   decay [channels] float32   state [slots, channels] float32 -> [R, channels]
    """
    y = torch.zeros_like(x)
    for run in runs.read(layout):
        h = torch.zeros_like(state[run.slot]) if run.fresh else state[run.slot].clone()
        points = dict(run.captures)
        for i in range(run.length):
            t = run.row + i
            a = (decay * gate[t].float().sigmoid()).exp()
            share = torch.ones_like(a) if run.fresh and i == 0 else (1.0 - a * a).sqrt()
            h = a * h + share * input_gate[t].float().sigmoid() * x[t].float()
            y[t] = h.to(y.dtype)
            if i + 1 in points:
                state[points[i + 1]] = h
        state[run.slot] = h
    return y


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """`kimi_delta` with one decay for all columns of a head's state, and q, k shared by heads (Yang et al. 2024).

    q, k [R, G, N]   v [R, H, P]   g, beta [R, H] float32   state [slots, H, P, N] float32 -> [R, H, P]
    """
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], dim=1) for x in (q, k))
    return kimi_delta(q, k, v, g[:, :, None].expand(k.shape), beta, layout, state)


def kimi_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """h = h exp(g), h += beta (v - h k) k^T, y = h q, with unit keys and scaled unit queries (Kimi Team 2025).

    q, k [R, H, N]   v [R, H, P]   g [R, H, N] float32   beta [R, H] float32   state [slots, H, P, N] float32
    -> [R, H, P]
    """
    q, k = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    y = torch.zeros_like(v)
    for run in runs.read(layout):
        h = torch.zeros_like(state[run.slot]) if run.fresh else state[run.slot].clone()
        points = dict(run.captures)
        for i in range(run.length):
            t = run.row + i
            h = g[t].exp()[:, None, :] * h
            error = v[t].float() - (h * k[t][:, None, :]).sum(-1)
            h = h + (beta[t][:, None] * error)[:, :, None] * k[t][:, None, :]
            y[t] = ((h * q[t][:, None, :]).sum(-1) * q.shape[-1] ** -0.5).to(y.dtype)
            if i + 1 in points:
                state[points[i + 1]] = h
        state[run.slot] = h
    return y


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _conv_float(x: Tensor, w: Mamba2Weights, layout: RowLayout, conv: Tensor) -> Tensor:
    """`causal_conv` without rounding its result to the model's dtype; the window keeps the dtype of `conv`."""
    window = conv.float()
    y = causal_conv(x, w.conv_weight, w.conv_bias, layout, window)
    conv.copy_(window)
    return y
