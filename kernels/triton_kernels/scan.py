"""Recurrences with one decay for each value of the state: Mamba-1 (Gu and Dao 2023) and the RG-LRU (De et al. 2024).

Grid (chunks, channel blocks). A program has some channels of one chunk, with their state in registers. For each tile it
first computes what does not depend on the state, for all tokens at once, into scratch memory of its own; then it takes
the tokens one after the other, some loaded together. A token's sum over the state is a tree that only the block's size
decides. Cutting a chunk stores the state and loads it again, which changes no bit. Decode rows are another launch.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Mamba1Weights
from hybrid_cache.kernels.triton_kernels.aot import Spec
from hybrid_cache.kernels.unsupported import UnsupportedShape

STATES = 512  # values of the state in a Mamba-1 program over a chunk: 4 for a thread
STATES_DECODE = 1024
MAX_D_STATE = 512
LRU_CHANNELS = 32
LRU_CHANNELS_DECODE = 256
AHEAD = 8  # tokens loaded together

_TILE = tl.constexpr(TILE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_ROWS = tl.constexpr(TILE + AHEAD)  # of scratch for a tile: the last are loaded ahead, and not used
_CAPTURES = tl.constexpr(64)  # looked at in one step

# What differs from batch to batch is never compiled in.
COUNTS = ["num_chunks", "num_captures", "num_decode", "first_row"]
INDICES = ["chunk_tile", "chunk_len", "chunk_slot", "chunk_fresh", "decode_slot"]
INDICES += ["capture_chunk", "capture_tiles", "capture_slot"]


def inlined(function: Callable[..., Any]) -> Any:
    """For what kernels call. Plain Python in the interpreter: entering a `triton.jit` function takes milliseconds."""
    return function if knobs.runtime.interpret else triton.jit(function)


def _interpreted_range(first: int, last: Any, step: int = 1, **_: object) -> range:
    return range(first, int(last.handle.data.item()) if isinstance(last, tl.tensor) else int(last), int(step))


# `tl.range` whose end may come from memory, which the interpreter cannot do with each numpy
counted = _interpreted_range if knobs.runtime.interpret else tl.range


@inlined
def summed(x, axis: tl.constexpr):
    """`tl.sum` of floats, and `tl.max` and `tl.cumsum` below: those are `triton.jit` functions."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@inlined
def largest(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@inlined
def running_sum(x, axis: tl.constexpr, reverse: tl.constexpr = False):
    return tl.associative_scan(x, axis, tl.standard._sum_combine, reverse)


@inlined
def softplus(x):
    """log(1 + exp(x)), also where exp(x) is far below 1: the series of 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # at most 1 / 3
    q = s * s
    series = 1.0 / 15.0 + q * (1.0 / 17.0)
    series = 1.0 / 13.0 + q * series
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(x, 0.0) + 2.0 * (s + s * q * series)


@inlined
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@inlined
def find_capture(chunk, num_tiles, capture_chunk, capture_tiles, capture_slot, num_captures):
    """The slot that gets the state after `num_tiles` tiles of a chunk, or -1."""
    slot = tl.full([], -1, tl.int64)
    first = 0
    while first < num_captures:
        at = first + tl.arange(0, _CAPTURES)
        there = at < num_captures
        here = (tl.load(capture_chunk + at, there, -1) == chunk) & (tl.load(capture_tiles + at, there, 0) == num_tiles)
        slot = tl.maximum(slot, largest(tl.where(here, tl.load(capture_slot + at, there, -1), -1), 0))
        first += _CAPTURES
    return slot


@inlined
def _load_scratch(x, y, first, stride, mask, NUM: tl.constexpr):
    """-> rows of x and y alternately, NUM of each from `first` on."""
    found = ()  # type: tuple[Any, ...]
    for i in tl.static_range(NUM):
        at = (first + i) * stride
        found = found + (tl.load(x + at, mask, 0.0), tl.load(y + at, mask, 0.0))  # noqa: RUF005
    return found


@inlined
def _load_rows(x, y, first, last, x_stride, y_stride, mask, NUM: tl.constexpr):
    """-> rows of x and y alternately, NUM of each from `first` on; row `last` again in place of what is after it."""
    found = ()  # type: tuple[Any, ...]
    for i in tl.static_range(NUM):
        at = tl.minimum(first + i, last)
        pair = (tl.load(x + at * x_stride, mask, 0.0), tl.load(y + at * y_stride, mask, 0.0))
        found = found + pair
    return found


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _mamba1_chunk_kernel(
    x,
    dt,
    B,
    C,
    z,
    A,
    D,
    dt_bias,
    state,
    y,
    scratch,
    chunk_tile,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    capture_chunk,
    capture_tiles,
    capture_slot,
    num_captures,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    state_stride,
    channels,
    D_STATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    NUM: tl.constexpr,
):
    """Grid (chunks, channel blocks). A program walks along a chunk with the state of CHANNELS channels."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(chunk_tile + chunk) * _TILE
    length = tl.load(chunk_len + chunk).to(tl.int32)
    slot = tl.load(chunk_slot + chunk)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    tokens, four = tl.arange(0, _TILE), tl.arange(0, 4)
    tile_place = tokens[:, None] * channels + c[None, :]
    deltas = scratch + chunk * (3 * _ROWS * channels)
    inputs, outputs = deltas + _ROWS * channels, deltas + 2 * _ROWS * channels
    state_place = c[:, None] * D_STATE + n[None, :]
    c_mask, n_mask = c < channels, n < D_STATE
    inside = c_mask[:, None] & n_mask[None, :]
    rate = tl.load(A + state_place, inside, 0.0) * _LOG2_E
    skip = tl.load(D + c, c_mask, 0.0)
    bias = tl.load(dt_bias + c, c_mask, 0.0)
    kept = c < tl.where(tl.load(chunk_fresh + chunk) != 0, 0, channels)
    h = tl.load(state + slot * state_stride + state_place, kept[:, None] & n_mask[None, :], 0.0)
    done = 0
    while done < length:
        num_tokens = tl.minimum(length - done, _TILE)
        rows, first = (row + done + tokens)[:, None], row + done
        there = (tokens < num_tokens)[:, None] & c_mask[None, :]
        step = softplus(tl.load(dt + rows * dt_stride + c[None, :], there, 0.0).to(tl.float32) + bias[None, :])
        u = tl.load(x + rows * x_stride + c[None, :], there, 0.0).to(tl.float32)
        tl.store(deltas + tile_place, tl.where(there, step, 0.0), c_mask[None, :])
        tl.store(inputs + tile_place, step * u, c_mask[None, :])
        tl.debug_barrier()
        last = num_tokens - 1
        ds, us, bs, cs = deltas + c, inputs + c, B + first * B_stride + n, C + first * C_stride + n
        t = 0
        while t < num_tokens:
            # After the last token, delta and input are zero, which leaves the state as it is.
            du = _load_scratch(ds, us, t, channels, c_mask, NUM)
            bc = _load_rows(bs, cs, t, last, B_stride, C_stride, n_mask, NUM)
            for few in tl.static_range(0, NUM, 4):
                said = tl.full([CHANNELS, 4], 0.0, tl.float32)
                for i in tl.static_range(4):
                    delta, given = du[2 * (few + i)], du[2 * (few + i) + 1]
                    key, query = bc[2 * (few + i)].to(tl.float32), bc[2 * (few + i) + 1].to(tl.float32)
                    h = h * tl.exp2(delta[:, None] * rate) + given[:, None] * key[None, :]
                    y_now = summed(h * query[None, :], 1)
                    said = tl.where((four == i)[None, :], y_now[:, None], said)
                tl.store(outputs + c[:, None] * _TILE + (t + few + four)[None, :], said, c_mask[:, None])
            t += NUM
        tl.debug_barrier()
        gate = tl.load(z + rows * z_stride + c[None, :], there, 0.0).to(tl.float32)
        said = tl.load(outputs + c[None, :] * _TILE + tokens[:, None], there, 0.0)
        out = (said + skip[None, :] * u) * (gate * sigmoid(gate))
        tl.store(y + rows * channels + c[None, :], out.to(y.dtype.element_ty), c_mask[None, :])
        done += _TILE
        if done <= length:
            capture = find_capture(chunk, done // _TILE, capture_chunk, capture_tiles, capture_slot, num_captures)
            if capture >= 0:
                tl.store(state + capture * state_stride + state_place, h, inside)
    tl.store(state + slot * state_stride + state_place, h, inside)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _mamba1_decode_kernel(
    x,
    dt,
    B,
    C,
    z,
    A,
    D,
    dt_bias,
    state,
    y,
    decode_slot,
    num_decode,
    first_row,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    state_stride,
    channels,
    D_STATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
):
    """Grid (decode and padding rows, channel blocks). A program takes one token of CHANNELS channels."""
    i = tl.program_id(0)
    row = (first_row + i).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    there = c < channels
    out = tl.full([CHANNELS], 0.0, tl.float32)
    if i < num_decode:
        inside = there[:, None] & (n < D_STATE)[None, :]
        place = c[:, None] * D_STATE + n[None, :]
        source = state + tl.load(decode_slot + i) * state_stride + place
        h = tl.load(source, inside, 0.0)
        u = tl.load(x + row * x_stride + c, there, 0.0).to(tl.float32)
        gate = tl.load(z + row * z_stride + c, there, 0.0).to(tl.float32)
        raw = tl.load(dt + row * dt_stride + c, there, 0.0).to(tl.float32)
        delta = softplus(raw + tl.load(dt_bias + c, there, 0.0))
        key = tl.load(B + row * B_stride + n, n < D_STATE, 0.0)
        query = tl.load(C + row * C_stride + n, n < D_STATE, 0.0)
        rate = tl.load(A + place, inside, 0.0) * _LOG2_E
        h = h * tl.exp2(delta[:, None] * rate) + (delta * u)[:, None] * key.to(tl.float32)[None, :]
        said = summed(h * query.to(tl.float32)[None, :], 1)
        tl.store(source, h, inside)
        out = (said + tl.load(D + c, there, 0.0) * u) * (gate * sigmoid(gate))
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), there)


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
    """See `Ops.mamba1_scan`. Padding rows come back as zeros. Raises UnsupportedShape for too large a state."""
    channels, d_state = weights.A.shape
    if d_state > MAX_D_STATE:
        raise UnsupportedShape(f"mamba1_scan with a state of {d_state}, limit {MAX_D_STATE}")
    rows = [_with_unit_stride(t) for t in (x, dt, B, C, z)]
    constants = [t.float().contiguous() for t in (weights.A, weights.D, weights.dt_bias)]
    strides = [t.stride(0) for t in rows]
    y = torch.empty(layout.num_rows, channels, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(d_state)
    if layout.num_tiles:
        block = max(1, STATES // padded)
        _mamba1_chunk_kernel[len(layout.chunk_tile), triton.cdiv(channels, block)](
            *(*rows, *constants, state, y, _scratch(layout, 3, state), *_chunk_arguments(layout)),
            *(*strides, state.stride(0), channels),
            D_STATE=d_state,
            CHANNELS=block,
            N=padded,
            NUM=AHEAD,
            num_warps=4,
        )
    first_row = layout.num_tiles * TILE
    if layout.num_rows > first_row:
        block = max(1, STATES_DECODE // padded)
        _mamba1_decode_kernel[layout.num_rows - first_row, triton.cdiv(channels, block)](
            *(*rows, *constants, state, y, layout.decode_slot, layout.num_decode, first_row),
            *(*strides, state.stride(0), channels),
            D_STATE=d_state,
            CHANNELS=block,
            N=padded,
            num_warps=4,
        )
    return y


@inlined
def _rg_lru_gates(x, input_gate, gate, decay):
    """-> what a token leaves of the state, and its input before the square root."""
    a = tl.exp(decay * sigmoid(gate.to(tl.float32)))
    return a, sigmoid(input_gate.to(tl.float32)) * x.to(tl.float32)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _rg_lru_chunk_kernel(
    x,
    input_gate,
    gate,
    decay,
    state,
    y,
    scratch,
    chunk_tile,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    capture_chunk,
    capture_tiles,
    capture_slot,
    num_captures,
    x_stride,
    input_gate_stride,
    gate_stride,
    state_stride,
    channels,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid (chunks, channel blocks). A program walks along a chunk with the state of CHANNELS channels."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(chunk_tile + chunk) * _TILE
    length = tl.load(chunk_len + chunk).to(tl.int32)
    slot = tl.load(chunk_slot + chunk)
    fresh = tl.load(chunk_fresh + chunk)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = tl.arange(0, _TILE)
    tile_place = tokens[:, None] * channels + c[None, :]
    decays = scratch + chunk * (2 * _ROWS * channels)
    inputs = decays + _ROWS * channels
    c_mask = c < channels
    rate = tl.load(decay + c, c_mask, 0.0)[None, :]
    h = tl.load(state + slot * state_stride + c, c < tl.where(fresh != 0, 0, channels), 0.0)
    without_root = tl.where(fresh != 0, 0, -1)  # this token
    done = 0
    while done < length:
        num_tokens = tl.minimum(length - done, _TILE)
        rows = (row + done + tokens)[:, None]
        there = (tokens < num_tokens)[:, None] & c_mask[None, :]
        a, gated = _rg_lru_gates(
            tl.load(x + rows * x_stride + c[None, :], there, 0.0),
            tl.load(input_gate + rows * input_gate_stride + c[None, :], there, 0.0),
            tl.load(gate + rows * gate_stride + c[None, :], there, 0.0),
            rate,
        )
        share = tl.where((done + tokens == without_root)[:, None], 1.0, tl.sqrt(1.0 - a * a))
        tl.store(decays + tile_place, tl.where(there, a, 1.0), c_mask[None, :])
        tl.store(inputs + tile_place, share * gated, c_mask[None, :])
        nothing = tl.full([_TILE, CHANNELS], 0.0, y.dtype.element_ty)
        tl.store(y + rows * channels + c[None, :], nothing, (tokens >= num_tokens)[:, None] & c_mask[None, :])
        tl.debug_barrier()
        out = y + (row + done) * channels + c
        ahead = _load_scratch(decays + c, inputs + c, 0, channels, c_mask, AHEAD)
        t = 0
        while t < num_tokens:
            now = ahead
            ahead = _load_scratch(decays + c, inputs + c, t + AHEAD, channels, c_mask, AHEAD)
            for i in tl.static_range(AHEAD):
                h = now[2 * i] * h + now[2 * i + 1]
                tl.store(
                    out + (t + i) * channels, h.to(y.dtype.element_ty), c < tl.where(t + i < num_tokens, channels, 0)
                )
            t += AHEAD
        tl.debug_barrier()
        done += _TILE
        if done <= length:
            capture = find_capture(chunk, done // _TILE, capture_chunk, capture_tiles, capture_slot, num_captures)
            if capture >= 0:
                tl.store(state + capture * state_stride + c, h, c_mask)
    tl.store(state + slot * state_stride + c, h, c_mask)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _rg_lru_decode_kernel(
    x,
    input_gate,
    gate,
    decay,
    state,
    y,
    decode_slot,
    num_decode,
    first_row,
    x_stride,
    input_gate_stride,
    gate_stride,
    state_stride,
    channels,
    CHANNELS: tl.constexpr,
):
    """Grid (decode and padding rows, channel blocks). A program takes one token of CHANNELS channels."""
    i = tl.program_id(0)
    row = (first_row + i).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    h = tl.full([CHANNELS], 0.0, tl.float32)
    if i < num_decode:
        source = state + tl.load(decode_slot + i) * state_stride + c
        a, gated = _rg_lru_gates(
            tl.load(x + row * x_stride + c, there, 0.0),
            tl.load(input_gate + row * input_gate_stride + c, there, 0.0),
            tl.load(gate + row * gate_stride + c, there, 0.0),
            tl.load(decay + c, there, 0.0),
        )
        h = a * tl.load(source, there, 0.0) + tl.sqrt(1.0 - a * a) * gated
        tl.store(source, h, there)
    tl.store(y + row * channels + c, h.to(y.dtype.element_ty), there)


def rg_lru(x: Tensor, input_gate: Tensor, gate: Tensor, decay: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """See `Ops.rg_lru`. Padding rows come back as zeros."""
    channels = len(decay)
    rows = [_with_unit_stride(t) for t in (x, input_gate, gate)]
    strides = [t.stride(0) for t in rows]
    decay = decay.float().contiguous()
    y = torch.empty(layout.num_rows, channels, dtype=x.dtype, device=x.device)
    if layout.num_tiles:
        _rg_lru_chunk_kernel[len(layout.chunk_tile), triton.cdiv(channels, LRU_CHANNELS)](
            *(*rows, decay, state, y, _scratch(layout, 2, state), *_chunk_arguments(layout)),
            *(*strides, state.stride(0), channels),
            CHANNELS=LRU_CHANNELS,
            AHEAD=AHEAD,
            num_warps=4,
        )
    first_row = layout.num_tiles * TILE
    if layout.num_rows > first_row:
        _rg_lru_decode_kernel[layout.num_rows - first_row, triton.cdiv(channels, LRU_CHANNELS_DECODE)](
            *(*rows, decay, state, y, layout.decode_slot, layout.num_decode, first_row),
            *(*strides, state.stride(0), channels),
            CHANNELS=LRU_CHANNELS_DECODE,
            num_warps=4,
        )
    return y


def _chunk_arguments(layout: RowLayout) -> tuple[Tensor | int, ...]:
    chunks = (layout.chunk_tile, layout.chunk_len, layout.chunk_slot, layout.chunk_fresh)
    return (*chunks, layout.capture_chunk, layout.capture_tiles, layout.capture_slot, len(layout.capture_chunk))


def _scratch(layout: RowLayout, num: int, state: Tensor) -> Tensor:
    """`num` tiles of float32 for each chunk, as wide as the state has channels."""
    return torch.empty(
        len(layout.chunk_tile) * num * _ROWS.value * state.shape[1], dtype=torch.float32, device=state.device
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    """x [R, channels] with each row's values next to each other; rows may have any stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


_CHUNKS = dict.fromkeys(
    ("chunk_tile", "chunk_len", "chunk_slot", "chunk_fresh", "capture_chunk", "capture_tiles", "capture_slot"), "*i64"
) | {"num_captures": "i32", "scratch": "*fp32"}
_DECODES = {"decode_slot": "*i64", "num_decode": "i32", "first_row": "i32"}
_MAMBA1 = (
    dict.fromkeys(("x", "dt", "B", "C", "z", "y"), "*bf16")
    | dict.fromkeys(("A", "D", "dt_bias", "state"), "*fp32")
    | {f"{name}_stride": "i32:16" for name in ("x", "dt", "B", "C", "z", "state")}
    | {"channels": "i32:16"}
)
_RG_LRU = (
    dict.fromkeys(("x", "input_gate", "gate", "y"), "*bf16")
    | dict.fromkeys(("decay", "state"), "*fp32")
    | {f"{name}_stride": "i32:16" for name in ("x", "input_gate", "gate", "state")}
    | {"channels": "i32:16"}
)


def _mamba1_spec(kernel: Any, rows: dict[str, str], d_state: int, states: int, **constexprs: int) -> Spec:
    sizes = {"D_STATE": d_state, "CHANNELS": states // d_state, "N": d_state, **constexprs}
    return Spec(kernel, _MAMBA1 | rows, sizes, label=f"state {d_state}")


SPECS = [
    *(_mamba1_spec(_mamba1_chunk_kernel, _CHUNKS, d_state, STATES, NUM=AHEAD) for d_state in (16, 128)),
    *(_mamba1_spec(_mamba1_decode_kernel, _DECODES, d_state, STATES_DECODE) for d_state in (16, 128)),
    Spec(_rg_lru_chunk_kernel, _RG_LRU | _CHUNKS, {"CHANNELS": LRU_CHANNELS, "AHEAD": AHEAD}),
    Spec(_rg_lru_decode_kernel, _RG_LRU | _DECODES, {"CHANNELS": LRU_CHANNELS_DECODE}),
]
