"""Operations on rows: norms, gated activations, rotary positions, and moving rows of pages.

A row's sums stay inside one program and run in a fixed order: over the values of a block by a tree that only the
block's size decides, over the blocks from left to right. How many rows a launch has decides how many programs there
are, and nothing else; it is therefore never a specialised argument.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.triton_kernels.conv import narrow

BLOCK = 1024  # values of a program
NORM_BLOCK = 4096  # a longer row takes several of these
NUM_WARPS = 4

# gelu with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
_GELU_LINEAR = tl.constexpr(1.5957691216057308)
_GELU_CUBIC = tl.constexpr(0.07135481282553504)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x, weight, out, eps, num_rows, x_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (row blocks). A program norms ROWS rows: once over a row for its mean square, once more to scale it."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        mask = there[:, None] & (start + columns < WIDTH)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + (start + columns)[None, :], mask, 0.0).to(tl.float32)
        squares += tl.sum(values * values, 1)
    scale = tl.rsqrt(squares / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        mask = there[:, None] & (start + columns < WIDTH)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + (start + columns)[None, :], mask, 0.0).to(tl.float32)
        gain = tl.load(weight + start + columns, start + columns < WIDTH, 0.0).to(tl.float32)
        y = values * scale[:, None] * gain[None, :]
        tl.store(out + rows[:, None] * WIDTH + (start + columns)[None, :], narrow(y, out.dtype.element_ty), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, d], weight [d] of any float dtype -> x / sqrt(mean(x^2) + eps) * weight."""
    x = _with_unit_stride(x)
    num_rows, width = x.shape
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        block = min(NORM_BLOCK, triton.next_power_of_2(width))
        rows = max(1, BLOCK // block)
        grid = (triton.cdiv(num_rows, rows),)
        _rms_norm_kernel[grid](
            *(x, weight.contiguous(), out, eps, num_rows, x.stride(0)),
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gated_kernel(
    x, out, num_rows, x_stride, WIDTH: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (row blocks, column blocks). A program computes act(gate) * up for ROWS x BLOCK values."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    source = x + rows[:, None] * x_stride + columns[None, :]
    gate = tl.load(source, mask, 0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask, 0.0).to(tl.float32)
    if KIND == "silu":
        y = gate / (1.0 + tl.exp(-gate))
    elif KIND == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF))
    else:
        y = gate / (1.0 + tl.exp(gate * (gate * gate * -_GELU_CUBIC - _GELU_LINEAR)))
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], narrow(y * up, out.dtype.element_ty), mask)


def gated(x: Tensor, kind: str) -> Tensor:
    """x [R, 2 * d] -> act(x[:, :d]) * x[:, d:]; kind: "silu", "gelu" (erf) or "gelu_tanh"."""
    assert kind in ("silu", "gelu", "gelu_tanh")
    x = _with_unit_stride(x)
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        block = min(BLOCK, triton.next_power_of_2(width))
        rows = BLOCK // block
        grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, block))
        _gated_kernel[grid](
            x, out, num_rows, x.stride(0), WIDTH=width, KIND=kind, ROWS=rows, BLOCK=block, num_warps=NUM_WARPS
        )
    return out


@triton.jit
def _rotate(a, b, angle):
    """(a, b) rotated by the angle."""
    cos, sin = tl.cos(angle), tl.sin(angle)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=["num_rows"])
def _rotary_kernel(
    x,
    positions,
    inv_freq,
    out,
    num_rows,
    x_stride,
    head_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows, head blocks). A program rotates HEAD_BLOCK heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    pairs = tl.arange(0, BLOCK)
    mask = (heads < HEADS)[:, None] & (pairs < HALF)[None, :]
    source = x + row * x_stride + heads[:, None] * head_stride + pairs[None, :]
    a = tl.load(source, mask, 0.0).to(tl.float32)
    b = tl.load(source + HALF, mask, 0.0).to(tl.float32)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + pairs, pairs < HALF, 0.0)
    a, b = _rotate(a, b, angle[None, :])
    target = out + row * (2 * HEADS * HALF) + heads[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(target, narrow(a, out.dtype.element_ty), mask)
    tl.store(target + HALF, narrow(b, out.dtype.element_ty), mask)


def rotary(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [R, heads, d], positions [R] int64, inv_freq [d / 2] float32 -> pairs (i, i + d / 2) rotated."""
    x = _with_unit_stride(x)
    num_rows, num_heads, size = x.shape
    out = torch.empty(num_rows, num_heads, size, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size // 2)
        head_block = min(triton.next_power_of_2(num_heads), max(1, BLOCK // block))
        grid = (num_rows, triton.cdiv(num_heads, head_block))
        _rotary_kernel[grid](
            *(x, positions.contiguous(), inv_freq.contiguous(), out, num_rows, x.stride(0), x.stride(1)),
            HEADS=num_heads,
            HALF=size // 2,
            HEAD_BLOCK=head_block,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _relocate_kernel(
    k,
    v,
    source_rows,
    target_rows,
    delta,
    inv_freq,
    num_rows,
    k_page_stride,
    v_page_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows, head blocks). A program moves HEAD_BLOCK heads of one row; [FIRST, FIRST + 2 * HALF) are rotated."""
    row = tl.program_id(0)
    source, target = tl.load(source_rows + row), tl.load(target_rows + row)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    columns = tl.arange(0, BLOCK)
    mask = (heads < tl.where(target >= 0, HEADS, 0))[:, None] & (columns < SIZE)[None, :]
    inside = heads[:, None] * SIZE + columns[None, :]
    from_page, from_row = source // PAGE_ROWS, source % PAGE_ROWS * (HEADS * SIZE)
    to_page, to_row = target // PAGE_ROWS, target % PAGE_ROWS * (HEADS * SIZE)
    v_source, v_target = v + from_page * v_page_stride + from_row, v + to_page * v_page_stride + to_row
    tl.store(v_target + inside, tl.load(v_source + inside, mask), mask)
    k_source, k_target = k + from_page * k_page_stride + from_row, k + to_page * k_page_stride + to_row
    old = tl.load(k_source + inside, mask)
    if HALF > 0:
        shift = tl.load(delta + row)
        pair = columns - FIRST
        rotated = (pair >= 0) & (pair < tl.where(shift != 0, 2 * HALF, 0))
        is_first = pair < HALF
        partner = tl.load(k_source + inside + tl.where(is_first, HALF, -HALF)[None, :], mask & rotated[None, :], 0.0)
        speed = tl.load(inv_freq + tl.where(is_first, pair, pair - HALF), rotated, 0.0)
        angle = shift.to(tl.float32) * speed
        sin = tl.where(is_first, -tl.sin(angle), tl.sin(angle))
        y = old.to(tl.float32) * tl.cos(angle)[None, :] + partner.to(tl.float32) * sin[None, :]
        old = tl.where(rotated[None, :], narrow(y, old.dtype), old)
    tl.store(k_target + inside, old, mask)


def relocate_keys(
    kv: KVTensors, source_rows: Tensor, target_rows: Tensor, delta: Tensor, inv_freq: Tensor | None, first: int = 0
) -> None:
    """Copies KV rows to other rows and rotates the copied keys by `delta` positions. See `reference.relocate_keys`."""
    num_rows, (_, _, num_heads, size) = len(source_rows), kv.k.shape
    if num_rows:
        block = triton.next_power_of_2(size)
        head_block = min(triton.next_power_of_2(num_heads), max(1, BLOCK // block))
        _relocate_kernel[num_rows, triton.cdiv(num_heads, head_block)](
            *(kv.k, kv.v, source_rows.contiguous(), target_rows.contiguous(), delta.contiguous()),
            delta if inv_freq is None else inv_freq.contiguous(),
            *(num_rows, kv.k.stride(0), kv.v.stride(0)),
            HEADS=num_heads,
            SIZE=size,
            FIRST=first,
            HALF=0 if inv_freq is None else len(inv_freq),
            PAGE_ROWS=TILE,
            HEAD_BLOCK=head_block,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_CHEAP = {80: Limit(registers=80), 90: Limit(registers=80)}
# Cosines of angles beyond 1e5 take a path with 28 bytes of local memory.
_TURNING = {80: Limit(registers=128, spills=32), 90: Limit(registers=128, spills=32)}
_STRIDED = {"num_rows": "i32", "x_stride": "i32:16"}
_MOVES = {"source_rows": "*i64", "target_rows": "*i64", "num_rows": "i32"}

SPECS = [
    Spec(
        _rms_norm_kernel,
        dict(x="*bf16", weight="*bf16", out="*bf16", eps="fp32", **_STRIDED),
        {"WIDTH": 8192, "ROWS": 1, "BLOCK": NORM_BLOCK},
        num_warps=NUM_WARPS,
        limits=_CHEAP,
    ),
    Spec(
        _rms_norm_kernel,
        dict(x="*bf16", weight="*bf16", out="*bf16", eps="fp32", **_STRIDED),
        {"WIDTH": 128, "ROWS": 8, "BLOCK": 128},
        num_warps=NUM_WARPS,
        limits=_CHEAP,
        label="of heads",
    ),
    *(
        Spec(
            _gated_kernel,
            dict(x="*bf16", out="*bf16", **_STRIDED),
            {"WIDTH": 14336, "KIND": kind, "ROWS": 1, "BLOCK": BLOCK},
            num_warps=NUM_WARPS,
            limits=_CHEAP,
            label=kind,
        )
        for kind in ("silu", "gelu", "gelu_tanh")
    ),
    Spec(
        _rotary_kernel,
        dict(x="*bf16", positions="*i64", inv_freq="*fp32", out="*bf16", head_stride="i32:16", **_STRIDED),
        {"HEADS": 40, "HALF": 64, "HEAD_BLOCK": 16, "BLOCK": 64},
        num_warps=NUM_WARPS,
        limits=_TURNING,
    ),
    Spec(
        _relocate_kernel,
        dict(
            _MOVES, k="*bf16", v="*bf16", delta="*i64", inv_freq="*fp32", k_page_stride="i32:16", v_page_stride="i32:16"
        ),
        {"HEADS": 8, "SIZE": 128, "FIRST": 0, "HALF": 64, "PAGE_ROWS": TILE, "HEAD_BLOCK": 8, "BLOCK": 128},
        num_warps=NUM_WARPS,
        limits=_TURNING,
    ),
]
