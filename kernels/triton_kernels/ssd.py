"""Mamba-2 between its projections, and linear attention: the state-space dual form (Dao and Gu 2024, section 6).

Prefill, in launches of one program for
    tile x channels           the convolution (see `conv`), rounded to the rows' dtype and, for bfloat16, what was lost
    chunk or capture x ...    its windows
    tile x heads              dt, and its sums `decay` from the start of the tile
    chunk x head x block      the state, tile after tile: what enters each tile, what is captured, what is left
    tile x head x block       y of a tile, from its rows and the state that enters it
    row x norm group          gate and norm
Decode, in launches of one program for
    row x head x block        convolution, dt, state and y at once; the state is read once and written once
    row x norm group          gate and norm, and the windows of the decode rows

A tile's y depends only on its rows and the entering state, and a state on the one before it and a tile: so cuts at
tiles change no bit. Sums run over all rows of a tile, or all of the state's columns, in blocks that depend on the sizes
of the model only. Padding rows have dt = 0 and zeros for x, B and C.

Products of float32 and float16 rows take three tf32 products each. For bfloat16 rows, y comes from bfloat16 operands;
the state, which lasts, from pairs of them (an operand and what its rounding lost), good for 16 bits and more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Mamba2Weights, StateTensors
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.triton_kernels.conv import (
    INTERPRET,
    bucket,
    check_width,
    chunk_of,
    convolve_tiles,
    convolve_token,
    narrow,
    save_windows,
    shift_window,
    silu,
)

DECAY_HEADS = 16  # heads of a program that computes dt
CARRY = {True: (64, 64, 3), False: (64, 32, 2)}  # bfloat16 or not: rows and columns of a state's block, stages
SCAN = {True: (64, 64, 4), False: (32, 32, 8)}  # rows of y's block, columns of the state at a time, warps
STEP_NUMBERS = 4096  # of the state, in a program for a decode row
NORM_NUMBERS = 1024  # of y, in a program for the norms of small groups
SHIFT_COLUMNS = 1024  # channels of a program that moves a decode row's window
MULTIPROCESSORS = 132  # of an H200


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where exp(x) is lost next to the 1: log(u) * e / (u - 1) is right for the rounded u."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    lost = u == 1.0
    return tl.where(x > 20.0, x, tl.where(lost, e, tl.log(u) * (e / tl.where(lost, 1.0, u - 1.0))))


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b. bfloat16 operands are taken as they are; the interpreter has no product for them."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit(do_not_specialize=["num_chunks"])
def _sum_decays(
    raw,
    dt_bias,
    A,
    dt,
    decay,
    num_rows,
    chunk_tile,
    chunk_len,
    num_chunks,
    dt_min,
    dt_max,
    ROW_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of heads, tiles): dt and the sums of dt A from the start of the tile, [tiles, HEADS, TILE] float32.

    num_rows [tiles] gets the tokens of the tile. STEPS False: dt is 1, and A holds slopes, -A.
    """
    tile = tl.program_id(1)
    chunk = chunk_of(tile, chunk_tile, num_chunks, CHUNKS)
    before = (tile - tl.load(chunk_tile + chunk)) * TILE
    length = tl.minimum(tl.load(chunk_len + chunk) - before, TILE).to(tl.int32)
    tl.store(num_rows + tile, length)
    head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, TILE)
    inside = (row < length)[:, None] & (head < HEADS)[None, :]
    a = tl.load(A + head, mask=head < HEADS, other=0.0)
    if STEPS:
        offset = (tile.to(tl.int64) * TILE + row)[:, None] * ROW_STRIDE + head[None, :]
        x = tl.load(raw + offset, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(dt_bias + head, mask=head < HEADS, other=0.0)[None, :]
        step = tl.minimum(tl.maximum(_softplus(x), dt_min), dt_max)
        step = tl.where(inside, step, 0.0)
    else:
        a = -a
        step = inside.to(tl.float32)
    total = tl.cumsum(step * a[None, :], axis=0)
    target = (tile.to(tl.int64) * HEADS + head)[None, :] * TILE + row[:, None]
    tl.store(dt + target, step, mask=(head < HEADS)[None, :])
    tl.store(decay + target, total, mask=(head < HEADS)[None, :])


@triton.jit
def _advance(
    h,
    x,
    x_rest,
    B,
    B_rest,
    dt,
    decay,
    state,
    entering,
    tile,
    length,
    capture,
    state_stride,
    head,
    p,
    n,
    in_p,
    in_n,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores the state block h as what enters `tile`; -> h after it, which also goes to slot `capture` unless -1.

    x, B at the first row and column of the head; p, n the block's rows and columns of the state
    """
    wide = tl.float32
    tile = tile.to(tl.int64)
    block = p[:, None] * D_STATE + n[None, :]
    inside = in_p[:, None] & in_n[None, :]
    tl.store(
        entering + (tile * HEADS + head) * (HEAD_DIM * D_STATE) + block,
        narrow(h, entering.dtype.element_ty),
        mask=inside,
    )

    row = tl.arange(0, TILE)
    here = row < length
    sums = decay + (tile * HEADS + head) * TILE
    last = tl.load(sums + TILE - 1)
    weight = tl.exp(last - tl.load(sums + row)) * tl.load(dt + (tile * HEADS + head) * TILE + row)
    source = tile * TILE + row
    x_at = source[:, None] * X_STRIDE + p[None, :]
    b_at = source[:, None] * B_STRIDE + n[None, :]
    x_in, b_in = here[:, None] & in_p[None, :], here[:, None] & in_n[None, :]
    value = tl.load(x + x_at, mask=x_in, other=0.0).to(wide)
    b = tl.load(B + b_at, mask=b_in, other=0.0)
    if REST:
        value += tl.load(x_rest + x_at, mask=x_in, other=0.0).to(wide)
    value *= weight[:, None]
    h *= tl.exp(last)
    if b.dtype == tl.bfloat16:
        rounded = narrow(value, tl.bfloat16)
        lost = narrow(value - rounded.to(wide), tl.bfloat16)
        h = _dot(tl.trans(rounded), b, h)
        h = _dot(tl.trans(lost), b, h)
        if REST:
            h = _dot(tl.trans(rounded), tl.load(B_rest + b_at, mask=b_in, other=0.0), h)
    else:
        h = _dot(tl.trans(value), b.to(wide), h)
    slot = tl.maximum(capture, 0)
    tl.store(
        state + slot * state_stride + head * (HEAD_DIM * D_STATE) + block,
        h,
        mask=inside & tl.where(inside, capture >= 0, False),
    )
    return h


@triton.jit(do_not_specialize=["num_captures"])
def _carry_states(
    x,
    x_rest,
    B,
    B_rest,
    dt,
    decay,
    state,
    entering,
    chunk_tile,
    chunk_tiles,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    capture_chunk,
    capture_tiles,
    capture_slot,
    num_captures,
    state_stride,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    X_HEAD: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_GROUP: tl.constexpr,
    REST: tl.constexpr,
    CAPTURES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS x COLUMNS of the state, heads, chunks): h = exp(sum dt A) h + sum w x B^T, tile after tile.

    Keeps its block in registers from the first tile to the last; `entering` [tiles, HEADS, HEAD_DIM, D_STATE].
    """
    head, chunk = tl.program_id(1), tl.program_id(2)
    column_blocks: tl.constexpr = (D_STATE + COLUMNS - 1) // COLUMNS
    p = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_p, in_n = p < HEAD_DIM, n < D_STATE
    inside = in_p[:, None] & in_n[None, :]
    first = tl.load(chunk_tile + chunk).to(tl.int32)
    tiles = tl.load(chunk_tiles + chunk).to(tl.int32)
    length = tl.load(chunk_len + chunk).to(tl.int32)
    own = state + tl.load(chunk_slot + chunk) * state_stride + head * (HEAD_DIM * D_STATE)
    block = p[:, None] * D_STATE + n[None, :]
    resumed = tl.where(inside, tl.load(chunk_fresh + chunk) == 0, False)
    h = tl.load(own + block, mask=inside & resumed, other=0.0)
    x_from, b_from = head * X_HEAD, (head // HEADS_PER_GROUP) * B_GROUP
    index = tl.arange(0, CAPTURES)
    real = index < num_captures
    mine = real & (tl.load(capture_chunk + index, mask=real, other=-1) == chunk)
    due = tl.where(mine, tl.load(capture_tiles + index, mask=real, other=0), 0)  # after how many tiles; 0 for never
    due_slot = tl.load(capture_slot + index, mask=real, other=-1)
    if INTERPRET:  # has no range() over a loaded number in some versions
        i = 0
        while i < tiles:
            capture = tl.max(tl.where(due == i + 1, due_slot, -1), axis=0)
            h = _advance(
                h, x + x_from, x_rest + x_from, B + b_from, B_rest + b_from, dt, decay, state, entering, first + i,
                length - i * TILE, capture, state_stride, head, p, n, in_p, in_n,
                HEADS, HEAD_DIM, D_STATE, X_STRIDE, B_STRIDE, REST, TILE,
            )  # fmt: skip
            i += 1
    else:
        for i in range(tiles):
            capture = tl.max(tl.where(due == i + 1, due_slot, -1), axis=0)
            h = _advance(
                h, x + x_from, x_rest + x_from, B + b_from, B_rest + b_from, dt, decay, state, entering, first + i,
                length - i * TILE, capture, state_stride, head, p, n, in_p, in_n,
                HEADS, HEAD_DIM, D_STATE, X_STRIDE, B_STRIDE, REST, TILE,
            )  # fmt: skip
    tl.debug_barrier()
    tl.store(own + block, h, mask=inside)


@triton.jit
def _scan_tiles(
    x,
    x_rest,
    B,
    C,
    dt,
    decay,
    entering,
    D,
    y,
    num_rows,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    X_HEAD: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_GROUP: tl.constexpr,
    C_STRIDE: tl.constexpr,
    C_GROUP: tl.constexpr,
    REST: tl.constexpr,
    SKIP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS of the head dim, heads, tiles): y = (C B^T * decays * dt) x + exp(decay) C h + D x.

    y [rows, HEADS, HEAD_DIM]
    """
    head = tl.program_id(1)
    tile = tl.program_id(2).to(tl.int64)
    group = head // HEADS_PER_GROUP
    row = tl.arange(0, TILE)
    here = row < tl.load(num_rows + tile)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_p = p < HEAD_DIM
    source = tile * TILE + row
    h_base = entering + (tile * HEADS + head) * (HEAD_DIM * D_STATE)
    narrow_rows: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    operand: tl.constexpr = tl.bfloat16 if narrow_rows else tl.float32

    cb = tl.zeros((TILE, TILE), tl.float32)
    acc = tl.zeros((TILE, ROWS), tl.float32)
    for start in range(0, D_STATE, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        in_n = n < D_STATE
        mask = here[:, None] & in_n[None, :]
        c = tl.load(C + source[:, None] * C_STRIDE + group * C_GROUP + n[None, :], mask=mask, other=0.0).to(operand)
        b = tl.load(B + source[:, None] * B_STRIDE + group * B_GROUP + n[None, :], mask=mask, other=0.0).to(operand)
        h = tl.load(h_base + p[:, None] * D_STATE + n[None, :], mask=in_p[:, None] & in_n[None, :], other=0.0)
        cb = _dot(c, tl.trans(b), cb)
        acc = _dot(c, tl.trans(h), acc)
    sums = tl.load(decay + (tile * HEADS + head) * TILE + row)
    step = tl.load(dt + (tile * HEADS + head) * TILE + row)
    between = tl.where(row[:, None] >= row[None, :], sums[:, None] - sums[None, :], -float("inf"))
    mix = cb * tl.exp(between) * step[None, :]
    mix = narrow(mix, operand)
    x_at = source[:, None] * X_STRIDE + head * X_HEAD + p[None, :]
    x_in = here[:, None] & in_p[None, :]
    value = tl.load(x + x_at, mask=x_in, other=0.0).to(operand)
    acc = _dot(mix, value, acc * tl.exp(sums)[:, None])
    if SKIP:
        skip = tl.load(D + head)
        acc += skip * value.to(tl.float32)
    if REST:
        value = tl.load(x_rest + x_at, mask=x_in, other=0.0)
        acc = _dot(mix, value, acc)
        if SKIP:
            acc += skip * value.to(tl.float32)
    target = (source[:, None] * HEADS + head) * HEAD_DIM + p[None, :]
    tl.store(y + target, narrow(acc, y.dtype.element_ty), mask=in_p[None, :])


@triton.jit(do_not_specialize=["first_row"])
def _step(
    x,
    B,
    C,
    raw_dt,
    conv_weight,
    conv_bias,
    windows,
    dt_bias,
    A,
    D,
    state,
    y,
    decode_slot,
    first_row,
    window_stride,
    state_stride,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    X_HEAD: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_GROUP: tl.constexpr,
    C_STRIDE: tl.constexpr,
    C_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS of the head dim, heads, decode rows): one token; COLUMNS >= D_STATE.

    h = exp(dt A) h + dt x B^T, y = h C + D x. WIDTH > 0: x, B and C lie side by side, as in the convolution's input,
    and go through it first; it leaves the windows as they are. STEPS False: dt is 1, A holds slopes (-A), no skip.
    """
    head = tl.program_id(1)
    group = head // HEADS_PER_GROUP
    row = (first_row + tl.program_id(2)).to(tl.int64)
    slot = tl.load(decode_slot + tl.program_id(2))
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    in_p, in_n = p < HEAD_DIM, n < D_STATE
    inside = in_p[:, None] & in_n[None, :]
    own = state + slot * state_stride + head * (HEAD_DIM * D_STATE) + p[:, None] * D_STATE + n[None, :]
    h = tl.load(own, mask=inside, other=0.0)

    if WIDTH > 0:
        inner: tl.constexpr = HEADS * HEAD_DIM
        all_b: tl.constexpr = HEADS // HEADS_PER_GROUP * D_STATE
        channels: tl.constexpr = inner + 2 * all_b
        line = x + row * X_STRIDE
        window = windows + slot * window_stride
        channel = head * HEAD_DIM + p
        u = silu(convolve_token(line, window, conv_weight, conv_bias, channel, in_p, channels, WIDTH, BIAS))
        channel = inner + group * D_STATE + n
        b = silu(convolve_token(line, window, conv_weight, conv_bias, channel, in_n, channels, WIDTH, BIAS))
        channel += all_b
        c = silu(convolve_token(line, window, conv_weight, conv_bias, channel, in_n, channels, WIDTH, BIAS))
    else:
        u = tl.load(x + row * X_STRIDE + head * X_HEAD + p, mask=in_p, other=0.0).to(tl.float32)
        b = tl.load(B + row * B_STRIDE + group * B_GROUP + n, mask=in_n, other=0.0).to(tl.float32)
        c = tl.load(C + row * C_STRIDE + group * C_GROUP + n, mask=in_n, other=0.0).to(tl.float32)

    if STEPS:
        step = _softplus(tl.load(raw_dt + row * X_STRIDE + head).to(tl.float32) + tl.load(dt_bias + head))
        step = tl.minimum(tl.maximum(step, dt_min), dt_max)
        h = h * tl.exp(step * tl.load(A + head)) + (step * u)[:, None] * b[None, :]
    else:
        h = h * tl.exp(-tl.load(A + head)) + u[:, None] * b[None, :]
    tl.store(own, h, mask=inside)
    total = tl.sum(h * c[None, :], axis=1)
    if STEPS:
        total += tl.load(D + head) * u
    tl.store(y + (row * HEADS + head) * HEAD_DIM + p, narrow(total, y.dtype.element_ty), mask=in_p)


@triton.jit
def _norm_rows(
    y,
    zxbcdt,
    norm_weight,
    out,
    index,
    num_norms,
    eps,
    ROW_STRIDE: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups: tl.constexpr = INNER // GROUP
    norm = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row, first = norm // groups, norm % groups * GROUP
    offset = tl.arange(0, BLOCK)
    inside = (norm < num_norms)[:, None] & (offset < GROUP)[None, :]
    channel = first[:, None] + offset[None, :]
    value = tl.load(y + row[:, None] * INNER + channel, mask=inside, other=0.0)
    gate = silu(tl.load(zxbcdt + row[:, None] * ROW_STRIDE + channel, mask=inside, other=0.0).to(tl.float32))
    if not NORM_FIRST:
        value *= gate
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / GROUP + eps)
        value = value * scale[:, None] * tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    if NORM_FIRST:
        value *= gate
    tl.store(out + row[:, None] * INNER + channel, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _shift_block(
    zxbcdt,
    windows,
    decode_slot,
    index,
    first_row,
    window_stride,
    ROW_STRIDE: tl.constexpr,
    INNER: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    decode = index // blocks
    channel = (index % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    line = zxbcdt + (first_row + decode).to(tl.int64) * ROW_STRIDE + INNER
    window = windows + tl.load(decode_slot + decode) * window_stride
    shift_window(line, window, channel, channel < CHANNELS, CHANNELS, WIDTH)


@triton.jit(do_not_specialize=["num_blocks", "num_norms", "first_row"])
def _finish_rows(
    y,
    zxbcdt,
    norm_weight,
    out,
    windows,
    decode_slot,
    num_blocks,
    num_norms,
    first_row,
    window_stride,
    eps,
    ROW_STRIDE: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS norms of all rows, then blocks of COLUMNS channels of the decode rows' windows).

    The first `num_blocks` programs turn y [rows, INNER] into norm(y * silu(z)), or norm(y) * silu(z), or y * silu(z)
    without a norm, over GROUP channels. The others move windows, which nothing in this launch reads.
    """
    index = tl.program_id(0)
    if index < num_blocks:
        _norm_rows(
            y, zxbcdt, norm_weight, out, index, num_norms, eps, ROW_STRIDE, INNER, GROUP, NORM, NORM_FIRST, ROWS, BLOCK
        )
    else:
        _shift_block(
            zxbcdt,
            windows,
            decode_slot,
            index - num_blocks,
            first_row,
            window_stride,
            ROW_STRIDE,
            INNER,
            CHANNELS,
            WIDTH,
            COLUMNS,
        )


def mamba2(zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
    """See `Ops.mamba2`."""
    w = weights
    check_width(w.conv_weight)
    zxbcdt = _dense(zxbcdt)
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    _, conv_in, raw_dt = zxbcdt.split([inner, inner + 2 * bc, w.num_heads], dim=1)
    first_row = layout.num_tiles * TILE
    y = torch.empty(first_row + layout.num_decode, w.num_heads, w.head_dim, dtype=torch.float32, device=zxbcdt.device)
    if layout.num_tiles:
        _prefill_mamba2(conv_in, raw_dt, w, layout, cache, y)
    if layout.num_decode:
        columns = triton.next_power_of_2(w.d_state)
        rows = _step_rows(w.head_dim, columns)
        bias = w.conv_weight if w.conv_bias is None else w.conv_bias
        _step[(triton.cdiv(w.head_dim, rows), w.num_heads, layout.num_decode)](
            conv_in,
            conv_in,
            conv_in,
            raw_dt,
            w.conv_weight.contiguous(),
            bias,
            cache.conv,
            w.dt_bias,
            w.A,
            w.D,
            cache.state,
            y,
            layout.decode_slot,
            first_row,
            cache.conv.stride(0),
            cache.state.stride(0),
            float(w.dt_min),
            float(w.dt_max),
            HEADS=w.num_heads,
            HEADS_PER_GROUP=w.num_heads // w.num_groups,
            HEAD_DIM=w.head_dim,
            D_STATE=w.d_state,
            X_STRIDE=zxbcdt.stride(0),
            X_HEAD=w.head_dim,
            B_STRIDE=0,
            B_GROUP=0,
            C_STRIDE=0,
            C_GROUP=0,
            WIDTH=w.conv_weight.shape[1],
            BIAS=w.conv_bias is not None,
            STEPS=True,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return _finish(y, zxbcdt, w, layout, cache.conv)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """See `Ops.linear_attention`."""
    q, k, v = (_dense(part) for part in (q, k, v))
    _, num_heads, head_dim = v.shape
    d_state = k.shape[2]
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if layout.num_tiles:
        dt, decay, num_rows = _decays(v, None, slope, layout, num_heads)
        _scan(v, None, k, None, q, dt, decay, num_rows, None, layout, state, y)
    if layout.num_decode:
        columns = triton.next_power_of_2(d_state)
        rows = _step_rows(head_dim, columns)
        _step[(triton.cdiv(head_dim, rows), num_heads, layout.num_decode)](
            v,
            k,
            q,
            slope,
            slope,
            slope,
            slope,
            slope,
            slope,
            slope,
            state,
            y,
            layout.decode_slot,
            layout.num_tiles * TILE,
            0,
            state.stride(0),
            0.0,
            0.0,
            HEADS=num_heads,
            HEADS_PER_GROUP=1,
            HEAD_DIM=head_dim,
            D_STATE=d_state,
            X_STRIDE=v.stride(0),
            X_HEAD=v.stride(1),
            B_STRIDE=k.stride(0),
            B_GROUP=k.stride(1),
            C_STRIDE=q.stride(0),
            C_GROUP=q.stride(1),
            WIDTH=0,
            BIAS=False,
            STEPS=False,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return y


def _prefill_mamba2(
    conv_in: Tensor, raw_dt: Tensor, w: Mamba2Weights, layout: RowLayout, cache: StateTensors, y: Tensor
) -> None:
    """Fills y for the rows of all tiles; advances states and windows."""
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    rows = layout.num_tiles * TILE
    in_pairs = conv_in.dtype == torch.bfloat16
    mixed = conv_in.new_empty((rows, inner + 2 * bc), dtype=torch.bfloat16 if in_pairs else torch.float32)
    rest = torch.empty_like(mixed) if in_pairs else None
    convolve_tiles(conv_in, w.conv_weight.contiguous(), w.conv_bias, layout, cache.conv, mixed, rest, inner + bc)
    save_windows(conv_in, layout, cache.conv)
    dt, decay, num_rows = _decays(raw_dt, w, w.A, layout, w.num_heads)
    x, B, C = _parts(mixed, w)
    x_rest, B_rest = (None, None) if rest is None else _parts(rest, w)[:2]
    _scan(x, x_rest, B, B_rest, C, dt, decay, num_rows, w.D, layout, cache.state, y)


def _parts(mixed: Tensor, w: Mamba2Weights) -> tuple[Tensor, Tensor, Tensor]:
    """[R, H * P + 2 * G * N] -> x [R, H, P], B, C [R, G, N]."""
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    x, B, C = mixed.split([inner, bc, bc], dim=1)
    return x.unflatten(1, (w.num_heads, -1)), B.unflatten(1, (w.num_groups, -1)), C.unflatten(1, (w.num_groups, -1))


def _decays(
    raw: Tensor, w: Mamba2Weights | None, A: Tensor, layout: RowLayout, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dt and its sums times A [tiles, H, TILE] float32, and the tokens of each tile [tiles] int32."""
    dt = torch.empty(layout.num_tiles, num_heads, TILE, dtype=torch.float32, device=raw.device)
    decay = torch.empty_like(dt)
    num_rows = torch.empty(layout.num_tiles, dtype=torch.int32, device=raw.device)
    num_chunks = len(layout.chunk_tile)
    _sum_decays[(triton.cdiv(num_heads, DECAY_HEADS), layout.num_tiles)](
        raw,
        A if w is None else w.dt_bias,
        A,
        dt,
        decay,
        num_rows,
        layout.chunk_tile,
        layout.chunk_len,
        num_chunks,
        0.0 if w is None else float(w.dt_min),
        0.0 if w is None else float(w.dt_max),
        ROW_STRIDE=raw.stride(0),
        HEADS=num_heads,
        STEPS=w is not None,
        CHUNKS=bucket(num_chunks),
        TILE=TILE,
        BLOCK=DECAY_HEADS,
        num_warps=4,
    )
    return dt, decay, num_rows


def _scan(
    x: Tensor,
    x_rest: Tensor | None,
    B: Tensor,
    B_rest: Tensor | None,
    C: Tensor,
    dt: Tensor,
    decay: Tensor,
    num_rows: Tensor,
    D: Tensor | None,
    layout: RowLayout,
    state: Tensor,
    y: Tensor,
) -> None:
    """x, y [R, H, P], B, C [R, G, N], any strides in dimensions 0 and 1; *_rest: what rounding took from them, or None.

    Fills y for the rows of all tiles, and advances `state`.
    """
    _, num_heads, head_dim = x.shape
    _, num_groups, d_state = B.shape
    in_pairs = x.dtype == torch.bfloat16
    shape = (layout.num_tiles, num_heads, head_dim, d_state)
    entering = torch.empty(shape, dtype=torch.bfloat16 if in_pairs else torch.float32, device=x.device)
    sizes = {
        "HEADS": num_heads,
        "HEADS_PER_GROUP": num_heads // num_groups,
        "HEAD_DIM": head_dim,
        "D_STATE": d_state,
        "X_STRIDE": x.stride(0),
        "X_HEAD": x.stride(1),
        "B_STRIDE": B.stride(0),
        "B_GROUP": B.stride(1),
        "TILE": TILE,
    }
    rows, columns = _state_block(num_heads, head_dim, d_state, in_pairs)
    num_captures = len(layout.capture_chunk)
    blocks = triton.cdiv(head_dim, rows) * triton.cdiv(d_state, columns)
    _carry_states[(blocks, num_heads, len(layout.chunk_tile))](
        x,
        x if x_rest is None else x_rest,
        B,
        B if B_rest is None else B_rest,
        dt,
        decay,
        state,
        entering,
        layout.chunk_tile,
        layout.chunk_tiles,
        layout.chunk_len,
        layout.chunk_slot,
        layout.chunk_fresh,
        layout.capture_chunk,
        layout.capture_tiles,
        layout.capture_slot,
        num_captures,
        state.stride(0),
        **sizes,
        REST=x_rest is not None,
        CAPTURES=bucket(num_captures),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        num_stages=CARRY[in_pairs][2],
    )
    most_rows, most_columns, num_warps = SCAN[in_pairs]
    rows = _block(head_dim, most_rows)
    _scan_tiles[(triton.cdiv(head_dim, rows), num_heads, layout.num_tiles)](
        x,
        x if x_rest is None else x_rest,
        B,
        C,
        dt,
        decay,
        entering,
        dt if D is None else D,
        y,
        num_rows,
        **sizes,
        C_STRIDE=C.stride(0),
        C_GROUP=C.stride(1),
        REST=x_rest is not None,
        SKIP=D is not None,
        ROWS=rows,
        COLUMNS=_block(d_state, most_columns),
        num_warps=num_warps,
        num_stages=2,
    )


def _finish(y: Tensor, zxbcdt: Tensor, w: Mamba2Weights, layout: RowLayout, conv: Tensor) -> Tensor:
    """Gate and norm of all rows, and the windows of the decode rows."""
    num_rows, inner = len(y), w.num_heads * w.head_dim
    _, rows, channels = conv.shape
    out = torch.empty(len(zxbcdt), inner, dtype=zxbcdt.dtype, device=zxbcdt.device)
    num_norms = num_rows * (inner // w.norm_group)
    num_shifts = layout.num_decode * triton.cdiv(channels, SHIFT_COLUMNS)
    block = triton.next_power_of_2(w.norm_group)
    norms = max(NORM_NUMBERS // block, 1)
    num_blocks = triton.cdiv(num_norms, norms)
    _finish_rows[(num_blocks + num_shifts,)](
        y,
        zxbcdt,
        zxbcdt if w.norm_weight is None else w.norm_weight,
        out,
        conv,
        layout.decode_slot,
        num_blocks,
        num_norms,
        layout.num_tiles * TILE,
        conv.stride(0),
        w.norm_eps,
        ROW_STRIDE=zxbcdt.stride(0),
        INNER=inner,
        GROUP=w.norm_group,
        NORM=w.norm_weight is not None,
        NORM_FIRST=w.norm_first,
        CHANNELS=channels,
        WIDTH=rows + 1,
        ROWS=norms,
        BLOCK=block,
        COLUMNS=SHIFT_COLUMNS,
        num_warps=_norm_warps(block),
    )
    return out


def _block(size: int, most: int) -> int:
    """A power of two that a product can take."""
    block: int = min(max(triton.next_power_of_2(size), 16), most)
    return block


def _state_block(num_heads: int, head_dim: int, d_state: int, in_pairs: bool) -> tuple[int, int]:
    """Smaller blocks where a chunk would not give each multiprocessor a program."""
    most_rows, most_columns, _ = CARRY[in_pairs]
    rows, columns = _block(head_dim, most_rows), _block(d_state, most_columns)
    programs = num_heads * triton.cdiv(head_dim, rows) * triton.cdiv(d_state, columns)
    return rows, columns if programs >= MULTIPROCESSORS else min(columns, 32)


def _step_rows(head_dim: int, columns: int) -> int:
    rows: int = min(triton.next_power_of_2(head_dim), max(STEP_NUMBERS // columns, 1))
    return rows


def _norm_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# Mamba-2 2.7B, and linear attention with 64 heads of 128
_MAMBA2 = {"HEADS": 80, "HEADS_PER_GROUP": 80, "HEAD_DIM": 64, "D_STATE": 128}
_SPLIT = {"X_STRIDE": 5376, "X_HEAD": 64, "B_STRIDE": 5376, "B_GROUP": 128}
_LINEAR = {"HEADS": 64, "HEADS_PER_GROUP": 1, "HEAD_DIM": 128, "D_STATE": 128}
_HEADS = {"X_STRIDE": 8192, "X_HEAD": 128, "B_STRIDE": 8192, "B_GROUP": 128}
_CHUNKS = {name: "*i64" for name in ("chunk_tile", "chunk_tiles", "chunk_len", "chunk_slot", "chunk_fresh")}
_CAPTURES = {name: "*i64" for name in ("capture_chunk", "capture_tiles", "capture_slot")}
_PRODUCTS = {arch: Limit(tensor_cores=True) for arch in (80, 90)}
_SMALL = {arch: Limit(registers=64) for arch in (80, 90)}
_STEPS = {arch: Limit(registers=168) for arch in (80, 90)}


def _carry_spec(row: str, sizes: dict[str, int], rest: bool, columns: int, label: str) -> Spec:
    return Spec(
        _carry_states,
        signature={
            **dict.fromkeys(("x", "x_rest", "B", "B_rest", "entering"), row),
            **dict.fromkeys(("dt", "decay", "state"), "*fp32"),
            **_CHUNKS,
            **_CAPTURES,
            "num_captures": "i32",
            "state_stride": "i32:16",
        },
        constexprs={**sizes, "REST": rest, "CAPTURES": 16, "TILE": TILE, "ROWS": 64, "COLUMNS": columns},
        num_stages=CARRY[row == "*bf16"][2],
        limits=_PRODUCTS,
        label=label,
    )


def _scan_spec(row: str, sizes: dict[str, int], rest: bool, skip: bool, y: str, label: str) -> Spec:
    rows, columns, num_warps = SCAN[row == "*bf16"]
    return Spec(
        _scan_tiles,
        signature={
            **dict.fromkeys(("x", "x_rest", "B", "C", "entering"), row),
            **dict.fromkeys(("dt", "decay", "D"), "*fp32"),
            "y": y,
            "num_rows": "*i32",
        },
        constexprs={
            **sizes,
            "C_STRIDE": sizes["B_STRIDE"],
            "C_GROUP": sizes["B_GROUP"],
            "REST": rest,
            "SKIP": skip,
            "TILE": TILE,
            "ROWS": rows,
            "COLUMNS": columns,
        },
        num_warps=num_warps,
        limits=_PRODUCTS,
        label=label,
    )


def _step_spec(sizes: dict[str, int], width: int, y: str, label: str) -> Spec:
    return Spec(
        _step,
        signature={
            **dict.fromkeys(("x", "B", "C", "raw_dt", "conv_weight", "conv_bias", "windows"), "*bf16"),
            **dict.fromkeys(("dt_bias", "A", "D", "state"), "*fp32"),
            "y": y,
            "decode_slot": "*i64",
            "first_row": "i32",
            "window_stride": "i32:16",
            "state_stride": "i32:16",
            "dt_min": "fp32",
            "dt_max": "fp32",
        },
        constexprs={
            **sizes,
            "C_STRIDE": sizes["B_STRIDE"],
            "C_GROUP": sizes["B_GROUP"],
            "WIDTH": width,
            "BIAS": width > 0,
            "STEPS": width > 0,
            "ROWS": _step_rows(sizes["HEAD_DIM"], sizes["D_STATE"]),
            "COLUMNS": sizes["D_STATE"],
        },
        limits=_STEPS,
        label=label,
    )


def _finish_spec(group: int, label: str) -> Spec:
    return Spec(
        _finish_rows,
        signature={
            **dict.fromkeys(("zxbcdt", "norm_weight", "out", "windows"), "*bf16"),
            "y": "*fp32",
            "decode_slot": "*i64",
            **dict.fromkeys(("num_blocks", "num_norms", "first_row"), "i32"),
            "window_stride": "i32:16",
            "eps": "fp32",
        },
        constexprs={
            "ROW_STRIDE": 10576,
            "INNER": 5120,
            "GROUP": group,
            "NORM": True,
            "NORM_FIRST": False,
            "CHANNELS": 5376,
            "WIDTH": 4,
            "ROWS": max(NORM_NUMBERS // triton.next_power_of_2(group), 1),
            "BLOCK": triton.next_power_of_2(group),
            "COLUMNS": SHIFT_COLUMNS,
        },
        num_warps=_norm_warps(triton.next_power_of_2(group)),
        limits=_SMALL,
        label=label,
    )


SPECS = [
    Spec(
        _sum_decays,
        signature={
            "raw": "*bf16",
            **dict.fromkeys(("dt_bias", "A", "dt", "decay"), "*fp32"),
            "num_rows": "*i32",
            "chunk_tile": "*i64",
            "chunk_len": "*i64",
            "num_chunks": "i32",
            "dt_min": "fp32",
            "dt_max": "fp32",
        },
        constexprs={"ROW_STRIDE": 10576, "HEADS": 80, "STEPS": True, "CHUNKS": 16, "TILE": TILE, "BLOCK": DECAY_HEADS},
        limits=_SMALL,
    ),
    _carry_spec("*bf16", {**_MAMBA2, **_SPLIT}, True, 64, "mamba2"),
    _carry_spec("*bf16", {**_LINEAR, **_HEADS}, False, 64, "linear attention"),
    _carry_spec("*fp32", {**_MAMBA2, **_SPLIT}, False, 32, "mamba2 fp32"),
    _scan_spec("*bf16", {**_MAMBA2, **_SPLIT}, True, True, "*fp32", "mamba2"),
    _scan_spec("*bf16", {**_LINEAR, **_HEADS}, False, False, "*bf16", "linear attention"),
    _scan_spec("*fp32", {**_MAMBA2, **_SPLIT}, False, True, "*fp32", "mamba2 fp32"),
    _step_spec({**_MAMBA2, **_SPLIT}, 4, "*fp32", "mamba2"),
    _step_spec({**_LINEAR, **_HEADS}, 0, "*bf16", "linear attention"),
    _finish_spec(5120, "one norm"),
    _finish_spec(640, "norms of 640"),
]
