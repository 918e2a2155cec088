"""Depthwise causal convolution over packed rows, with a window of the last K - 1 rows in the slot of each sequence.

A launch never reads a window that another program of it writes: first the rows of all tiles, which read old windows,
then the windows of chunks and captures, each owned by one program for a block of channels. A decode row's program does
both. Sums run over the taps from the oldest to the newest, in float32, after the bias; a row of a tile is computed from
its K rows only, so neither cuts nor other sequences matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.unsupported import UnsupportedShape

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

TILE_COLUMNS = 64  # channels of a program over a tile
WINDOW_COLUMNS = 256  # channels of a program that saves a window
STEP_COLUMNS = 256  # channels of a program for a decode row
MAX_WIDTH = 8


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> `dtype`, to the nearest; the interpreter's own cast to bfloat16 cuts bits off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def chunk_of(tile, chunk_tile, num_chunks, CHUNKS: tl.constexpr):
    """The chunk that a tile lies in: the last one that starts at or before it. CHUNKS >= num_chunks."""
    chunk = tl.arange(0, CHUNKS)
    first = tl.load(chunk_tile + chunk, mask=chunk < num_chunks, other=0)
    return tl.sum(((chunk < num_chunks) & (first <= tile)).to(tl.int32), axis=0) - 1


@triton.jit
def convolve_token(
    x, window, weight, bias, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr
):
    """One row: the taps of some channels on a window [WIDTH - 1, CHANNELS] and the row `x`, before any activation."""
    y = tl.zeros(channel.shape, tl.float32)
    if BIAS:
        y += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        if k < WIDTH - 1:
            row = tl.load(window + k * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
        else:
            row = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
        y += row * tl.load(weight + channel * WIDTH + k, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def shift_window(x, window, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Moves a window [WIDTH - 1, CHANNELS] up by one row and puts the row `x` at its end.

    A barrier before each store: until then another thread may read the row that it overwrites.
    """
    for k in tl.static_range(WIDTH - 1):
        if k < WIDTH - 2:
            row = tl.load(window + (k + 1) * CHANNELS + channel, mask=mask, other=0.0)
        else:
            row = tl.load(x + channel, mask=mask, other=0.0).to(window.dtype.element_ty)
        tl.debug_barrier()
        tl.store(window + k * CHANNELS + channel, row, mask=mask)


@triton.jit(do_not_specialize=["num_chunks"])
def _convolve_tiles(
    x,
    weight,
    bias,
    windows,
    out,
    rest,
    chunk_tile,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    num_chunks,
    window_stride,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    REST_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of COLUMNS channels, tiles): the rows of a tile; zeros for those of no token.

    `out` [rows, CHANNELS] gets the result, and `rest` what its rounding took from the first REST_CHANNELS channels.
    """
    tile = tl.program_id(1)
    chunk = chunk_of(tile, chunk_tile, num_chunks, CHUNKS)
    first = tl.load(chunk_tile + chunk).to(tl.int32)
    row = (tile - first) * TILE + tl.arange(0, TILE)  # of the chunk
    length = tl.load(chunk_len + chunk).to(tl.int32)
    fresh = tl.load(chunk_fresh + chunk) != 0
    old = tl.where(fresh, 0, WIDTH - 1)  # rows of the window that count
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < CHANNELS
    base = x + first.to(tl.int64) * TILE * X_STRIDE
    window = windows + tl.load(chunk_slot + chunk) * window_stride

    y = tl.zeros((TILE, COLUMNS), tl.float32)
    if BIAS:
        y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        source = row - (WIDTH - 1 - k)
        here = (source >= 0) & (source < length)
        offset = source.to(tl.int64)[:, None] * X_STRIDE + channel[None, :]
        value = tl.load(base + offset, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if k < WIDTH - 1:
            before = (source < 0) & (source + old >= 0)
            offset = (source + (WIDTH - 1))[:, None] * CHANNELS + channel[None, :]
            value += tl.load(window + offset, mask=before[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += value * tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION:
        y = silu(y)
    y = tl.where((row < length)[:, None], y, 0.0)

    target = (tile.to(tl.int64) * TILE + tl.arange(0, TILE))[:, None] * CHANNELS + channel[None, :]
    rounded = narrow(y, out.dtype.element_ty)
    tl.store(out + target, rounded, mask=inside[None, :])
    if REST_CHANNELS > 0:
        left = narrow(y - rounded.to(tl.float32), rest.dtype.element_ty)
        tl.store(rest + target, left, mask=(channel < REST_CHANNELS)[None, :])


@triton.jit(do_not_specialize=["num_chunks"])
def _save_windows(
    x,
    windows,
    chunk_tile,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    capture_chunk,
    capture_tiles,
    capture_slot,
    num_chunks,
    window_stride,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of COLUMNS channels, chunks and then captures): the window after a chunk, or after some tiles of it.

    Only the window after a chunk of fewer than WIDTH - 1 tokens has rows of the old one, which lie in the same slot:
    all threads have read before one writes. A capture comes after a whole tile at least, so it reads no window.
    """
    index = tl.program_id(1)
    captured = index >= num_chunks
    capture = tl.maximum(index - num_chunks, 0)
    chunk = tl.where(captured, tl.load(capture_chunk + capture, mask=captured, other=0), index)
    own = tl.load(chunk_slot + chunk)
    slot = tl.where(captured, tl.load(capture_slot + capture, mask=captured, other=0), own)
    tiles = tl.load(capture_tiles + capture, mask=captured, other=0)
    tokens = tl.where(captured, tiles * TILE, tl.load(chunk_len + chunk)).to(tl.int32)
    old = tl.where(tl.load(chunk_fresh + chunk) != 0, 0, WIDTH - 1)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    source = tokens - (WIDTH - 1) + row  # of the chunk
    inside = (row < WIDTH - 1)[:, None] & (channel < CHANNELS)[None, :]
    base = x + tl.load(chunk_tile + chunk) * TILE * X_STRIDE
    recent = tl.load(
        base + source.to(tl.int64)[:, None] * X_STRIDE + channel[None, :],
        mask=(source >= 0)[:, None] & inside,
        other=0.0,
    )
    before = (source < 0) & (source + old >= 0)
    offset = (source + (WIDTH - 1))[:, None] * CHANNELS + channel[None, :]
    kept = tl.load(windows + own * window_stride + offset, mask=before[:, None] & inside, other=0.0)
    value = tl.where((source >= 0)[:, None], recent.to(windows.dtype.element_ty), kept)
    tl.debug_barrier()
    target = row[:, None] * CHANNELS + channel[None, :]
    tl.store(windows + slot * window_stride + target, value, mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def _convolve_step(
    x,
    weight,
    bias,
    windows,
    out,
    decode_slot,
    first_row,
    window_stride,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of COLUMNS channels, decode rows): one row, then its window."""
    row = (first_row + tl.program_id(1)).to(tl.int64)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < CHANNELS
    window = windows + tl.load(decode_slot + tl.program_id(1)) * window_stride
    y = convolve_token(x + row * X_STRIDE, window, weight, bias, channel, inside, CHANNELS, WIDTH, BIAS)
    if ACTIVATION:
        y = silu(y)
    tl.store(out + row * CHANNELS + channel, narrow(y, out.dtype.element_ty), mask=inside)
    shift_window(x + row * X_STRIDE, window, channel, inside, CHANNELS, WIDTH)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout, conv: Tensor, activation: bool = True
) -> Tensor:
    """See `Ops.causal_conv`."""
    check_width(weight)
    x, weight = _dense(x), weight.contiguous()
    channels, width = weight.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if layout.num_tiles:
        convolve_tiles(x, weight, bias, layout, conv, out, activation=activation)
        save_windows(x, layout, conv)
    if layout.num_decode:
        _convolve_step[(triton.cdiv(channels, STEP_COLUMNS), layout.num_decode)](
            x,
            weight,
            weight if bias is None else bias,
            conv,
            out,
            layout.decode_slot,
            layout.num_tiles * TILE,
            conv.stride(0),
            X_STRIDE=x.stride(0),
            CHANNELS=channels,
            WIDTH=width,
            BIAS=bias is not None,
            ACTIVATION=activation,
            COLUMNS=STEP_COLUMNS,
            num_warps=2,
        )
    return out


def check_width(weight: Tensor) -> None:
    """weight [channels, K]. Raises UnsupportedShape for a K without a kernel."""
    if not 2 <= weight.shape[1] <= MAX_WIDTH:
        raise UnsupportedShape(f"a convolution over {weight.shape[1]} rows; the kernel takes 2 to {MAX_WIDTH}")


def bucket(count: int) -> int:
    """Room for chunks or captures, in few sizes, since each is compiled separately."""
    room: int = max(triton.next_power_of_2(count), 16)
    return room


def convolve_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: RowLayout,
    conv: Tensor,
    out: Tensor,
    rest: Tensor | None = None,
    rest_channels: int = 0,
    activation: bool = True,
) -> None:
    """Fills the rows of all tiles of `out` [R, channels]; see `_convolve_tiles`. `conv` stays as it is.

    x [R, channels], strided only in dimension 0
    """
    channels, width = weight.shape
    num_chunks = len(layout.chunk_tile)
    _convolve_tiles[(triton.cdiv(channels, TILE_COLUMNS), layout.num_tiles)](
        x,
        weight,
        weight if bias is None else bias,
        conv,
        out,
        out if rest is None else rest,
        layout.chunk_tile,
        layout.chunk_len,
        layout.chunk_slot,
        layout.chunk_fresh,
        num_chunks,
        conv.stride(0),
        X_STRIDE=x.stride(0),
        CHANNELS=channels,
        REST_CHANNELS=0 if rest is None else rest_channels,
        WIDTH=width,
        BIAS=bias is not None,
        ACTIVATION=activation,
        CHUNKS=bucket(num_chunks),
        TILE=TILE,
        COLUMNS=TILE_COLUMNS,
        num_warps=4,
    )


def save_windows(x: Tensor, layout: RowLayout, conv: Tensor) -> None:
    """Writes the windows after all chunks and captures; what `convolve_tiles` reads of the old ones is gone after it.

    x [R, channels], strided only in dimension 0
    """
    _, rows, channels = conv.shape
    num_chunks = len(layout.chunk_tile)
    _save_windows[(triton.cdiv(channels, WINDOW_COLUMNS), num_chunks + len(layout.capture_chunk))](
        x,
        conv,
        layout.chunk_tile,
        layout.chunk_len,
        layout.chunk_slot,
        layout.chunk_fresh,
        layout.capture_chunk,
        layout.capture_tiles,
        layout.capture_slot,
        num_chunks,
        conv.stride(0),
        X_STRIDE=x.stride(0),
        CHANNELS=channels,
        WIDTH=rows + 1,
        TILE=TILE,
        ROWS=triton.next_power_of_2(rows),
        COLUMNS=WINDOW_COLUMNS,
        num_warps=4,
    )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_CHUNKS = {name: "*i64" for name in ("chunk_tile", "chunk_len", "chunk_slot", "chunk_fresh")}
_CAPTURES = {name: "*i64" for name in ("capture_chunk", "capture_tiles", "capture_slot")}
_SIZES = {"CHANNELS": 5376, "WIDTH": 4}  # Mamba-2 2.7B: 80 heads of 64, one group of 128
_ROWS = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "windows": "*bf16", "out": "*bf16"}

SPECS = [
    Spec(
        _convolve_tiles,
        signature={**_ROWS, "rest": "*bf16", **_CHUNKS, "num_chunks": "i32", "window_stride": "i32:16"},
        constexprs={
            **_SIZES,
            "X_STRIDE": 10576,
            "REST_CHANNELS": 5248,
            "BIAS": True,
            "ACTIVATION": True,
            "CHUNKS": 16,
            "TILE": TILE,
            "COLUMNS": TILE_COLUMNS,
        },
        limits={arch: Limit(registers=168) for arch in (80, 90)},
    ),
    Spec(
        _save_windows,
        signature={
            "x": "*bf16",
            "windows": "*bf16",
            **_CHUNKS,
            **_CAPTURES,
            "num_chunks": "i32",
            "window_stride": "i32:16",
        },
        constexprs={**_SIZES, "X_STRIDE": 10576, "TILE": TILE, "ROWS": 4, "COLUMNS": WINDOW_COLUMNS},
        limits={arch: Limit(registers=64) for arch in (80, 90)},
    ),
    Spec(
        _convolve_step,
        signature={**_ROWS, "decode_slot": "*i64", "first_row": "i32", "window_stride": "i32:16"},
        constexprs={**_SIZES, "X_STRIDE": 5376, "BIAS": True, "ACTIVATION": True, "COLUMNS": STEP_COLUMNS},
        num_warps=2,
        limits={arch: Limit(registers=64) for arch in (80, 90)},
    ),
]
