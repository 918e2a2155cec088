"""Causal attention over pages of TILE tokens: prefill by tiles, decode by splits of the sequence.

Three steps, each with launches of its own. Rows of K and V go into the pages. Each prefill tile runs over its pages in
order, with a running maximum and sum (Dao et al. 2022, arXiv 2205.14135). Each decode row is cut into splits of
PAGES_PER_SPLIT pages at absolute positions, whose partial results are merged in the order of the splits (as in
Flash-Decoding, Dao et al. 2023); a split whose pages several decode rows share is computed once for all of them
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099; see `kernels/shared_prefix.py`).

Why no bit of a row depends on the batch:

- Prefill: a token has the same row of its tile, and the tile the same pages, whatever was cached or cut. Pages are
  visited one by one, from the first that the window reaches.
- Decode: where splits begin depends only on positions, and a split always runs over its PAGES_PER_SPLIT pages, from
  the first. The queries of a block (the heads of one KV head, for one row or for many) are stacked in the M dimension
  of products of one fixed size, DECODE_M, padded with zeros. Each row of a product, and each maximum and sum along a
  row, is made only of that row's numbers, in an order that the block's shape fixes and the index in M does not change.
  So a row gets the same bits in a block of its own and in a shared one: these are programs of the same compiled kernel,
  with other lists of rows. Arguments that depend on the batch are not specialised on.
- Pages of a shared split are full, and lie before the last page of each of its rows. Tokens that a row does not see
  weigh exactly zero: they multiply its sums by one and add zeros.

Rows of a page that hold no token may hold NaN; they are never loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.decode_schedule import PAGES_PER_SPLIT, DecodeSchedule
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.shared_prefix import schedule_shared
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.unsupported import UnsupportedShape

INTERPRET: bool = triton.knobs.runtime.interpret

MAX_HEAD_DIM = 256
DECODE_M = 64  # queries in a block of decode work: (row, head) pairs
MERGE_SPLITS = 16  # partial results that are merged at a time
WRITE_ROWS, WRITE_COLUMNS = (64 if INTERPRET else 4), 1024  # of a program that copies into the pages

_LOG2_E = log2(2.718281828459045)

# What changes from batch to batch must not lead to another compiled kernel.
_INDICES = ["kv_rows", "chunk_tile", "chunk_tiles", "chunk_start", "chunk_len", "page_table", "decode_len", "schedule"]
_NUMBERS = ["num_rows", "num_chunks", "table_stride", "num_pages", "num_splits"]
_NUMBERS += ["first_table", "first_row", "scheduled", "schedule_rows"]


@triton.jit
def _attend(
    q,
    k_page,
    v_page,
    held,
    visible,
    best,
    total,
    acc,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One page more, of which tokens `held` are loaded: -> running maximum, sum, and weighted values.

    q [M, padded head_dim]   held [TILE]   visible [M, TILE]   best, total [M], best with `scale` inside, for exp2
    The interpreter can neither multiply bfloat16 nor round to it, and stays in float32.
    """
    token = tl.arange(0, held.shape[0]) * (KV_HEADS * HEAD_DIM)
    column = tl.arange(0, q.shape[1])
    inside = column < HEAD_DIM
    k = tl.load(k_page + token[None, :] + column[:, None], mask=held[None, :] & inside[:, None], other=0.0)
    v = tl.load(v_page + token[:, None] + column[None, :], mask=held[:, None] & inside[None, :], other=0.0)
    if INTERPRET:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, k, input_precision=PRECISION)
    scores = tl.where(visible, scores * scale, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(new_best == -float("inf"), 0.0, new_best)  # while nothing was seen
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(best - base)
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_best, total, acc


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def write_rows_kernel(
    k,
    v,
    k_pages,
    v_pages,
    kv_rows,
    num_rows,
    k_stride,
    v_stride,
    k_page_stride,
    v_page_stride,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS rows, blocks of COLUMNS of a row's kv_heads * head_dim). Copies into the pages."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(kv_rows + row, mask=row < num_rows, other=-1)
    mask = (target >= 0)[:, None] & (column < WIDTH)[None, :]
    page, place = target // TILE, (target % TILE) * WIDTH
    source = row.to(tl.int64)[:, None]
    keys = tl.load(k + source * k_stride + column[None, :], mask=mask)
    values = tl.load(v + source * v_stride + column[None, :], mask=mask)
    tl.store(k_pages + (page * k_page_stride + place)[:, None] + column[None, :], keys, mask=mask)
    tl.store(v_pages + (page * v_page_stride + place)[:, None] + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def prefill_kernel(
    q,
    k_pages,
    v_pages,
    out,
    chunk_tile,
    chunk_tiles,
    chunk_start,
    chunk_len,
    page_table,
    num_chunks,
    q_stride,
    k_page_stride,
    v_page_stride,
    table_stride,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (heads / STACK, tiles). STACK heads of one KV head for one tile, stacked in M; writes zeros to padding rows.

    Late tiles, which have more pages before them, start first.
    """
    first_head = tl.program_id(0) * STACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    chunk = tl.full((), -1, tl.int32)  # the last one that starts at this tile or before
    base = 0
    while base < num_chunks:
        index = base + tl.arange(0, 64)
        starts = tl.load(chunk_tile + index, mask=index < num_chunks, other=2147483647)
        chunk += tl.sum((starts <= tile).to(tl.int32), 0)
        base += 64
    tile_of_chunk = tile - tl.load(chunk_tile + chunk)
    if tile_of_chunk >= tl.load(chunk_tiles + chunk):
        return
    num_tokens = (tl.load(chunk_len + chunk) - tile_of_chunk * TILE).to(tl.int32)  # from the first row of the tile
    start = (tl.load(chunk_start + chunk) + tile_of_chunk * TILE).to(tl.int32)
    table = page_table + chunk.to(tl.int64) * table_stride

    stacked = tl.arange(0, STACK * TILE)
    query = stacked % TILE
    column = tl.arange(0, COLUMNS)
    is_token = query < num_tokens
    row = (tile.to(tl.int64) * TILE + query)[:, None]
    head_column = ((first_head + stacked // TILE) * HEAD_DIM)[:, None] + column[None, :]
    inside = (is_token[:, None]) & (column < HEAD_DIM)[None, :]
    queries = tl.load(q + row * q_stride + head_column, mask=inside, other=0.0)
    k_pages += (first_head // GROUP) * HEAD_DIM
    v_pages += (first_head // GROUP) * HEAD_DIM

    best = tl.full((STACK * TILE,), -float("inf"), tl.float32)
    total = tl.zeros((STACK * TILE,), tl.float32)
    acc = tl.zeros((STACK * TILE, COLUMNS), tl.float32)
    last_page = (start + tl.minimum(num_tokens, TILE) - 1) // TILE  # the page after, where a chunk starts off the grid
    first_page = last_page * 0
    if WINDOW:
        first_page = tl.maximum(start - WINDOW + 1, 0) // TILE
    if INTERPRET:  # whose `range` does not take a loaded number in each version
        while first_page <= last_page:
            best, total, acc = _attend_before(
                queries, k_pages, v_pages, table, first_page, start, num_tokens, best, total, acc,
                k_page_stride, v_page_stride, scale, WINDOW, KV_HEADS, HEAD_DIM, TILE, PRECISION, INTERPRET,
            )  # fmt: skip
            first_page += 1
    else:
        for index in range(first_page, last_page + 1):
            best, total, acc = _attend_before(
                queries, k_pages, v_pages, table, index, start, num_tokens, best, total, acc,
                k_page_stride, v_page_stride, scale, WINDOW, KV_HEADS, HEAD_DIM, TILE, PRECISION, INTERPRET,
            )  # fmt: skip
    y = tl.where(is_token[:, None], acc / total[:, None], 0.0)
    out_row = out + row * (tl.num_programs(0) * STACK * HEAD_DIM)
    tl.store(out_row + head_column, y.to(out.dtype.element_ty), mask=(column < HEAD_DIM)[None, :])


@triton.jit
def _attend_before(
    queries,
    k_pages,
    v_pages,
    table,
    index,
    start,
    num_tokens,
    best,
    total,
    acc,
    k_page_stride,
    v_page_stride,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Page `index` of a tile whose first position is `start`: one before it, or its own, with `num_tokens` tokens."""
    page = tl.load(table + index)
    token = tl.arange(0, TILE)
    ahead = start - index * TILE  # positions from the page to the tile
    held = token < ahead + num_tokens
    distance = ahead + (tl.arange(0, queries.shape[0]) % TILE)[:, None] - token[None, :]
    visible = distance >= 0
    if WINDOW:
        visible &= distance < WINDOW
    return _attend(
        queries, k_pages + page * k_page_stride, v_pages + page * v_page_stride, held, visible, best, total, acc, scale,
        KV_HEADS, HEAD_DIM, PRECISION, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def decode_kernel(
    q,
    k_pages,
    v_pages,
    partial,
    partial_sums,
    decode_len,
    page_table,
    schedule,
    first_table,
    table_stride,
    num_pages,
    first_row,
    num_splits,
    scheduled,
    schedule_rows,
    q_stride,
    k_page_stride,
    v_page_stride,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (blocks of work, KV heads * blocks of STACK heads). One split for some rows and STACK heads of each.

    With scheduled = 1, `schedule` holds (split, first, count) for each block and, from `schedule_rows` on, the rows of
    the blocks; a block of no rows leaves at once.
    With scheduled = 0, blocks are all (row, split) in that order; those after a row's end leave at once.

    Writes the weighted values, and the maximum and the sum of the weights, of each (row, head, split).
    """
    block = tl.program_id(0)
    entry = schedule + 3 * block * scheduled
    split = tl.where(scheduled > 0, tl.load(entry), block % num_splits).to(tl.int32)
    first = tl.where(scheduled > 0, tl.load(entry + scheduled), block // num_splits).to(tl.int32)
    count = tl.where(scheduled > 0, tl.load(entry + 2 * scheduled), 1).to(tl.int32)

    head_blocks: tl.constexpr = (GROUP + STACK - 1) // STACK
    kv_head = tl.program_id(1) // head_blocks
    stacked = tl.arange(0, BLOCK)
    place, head = stacked // STACK, (tl.program_id(1) % head_blocks) * STACK + stacked % STACK
    used = (place < count) & (place < BLOCK // STACK) & (head < GROUP)
    head += kv_head * GROUP
    place = tl.where(used, place, 0)
    listed = tl.load(schedule + (schedule_rows + first + place) * scheduled)
    row = tl.where(scheduled > 0, listed, first + place).to(tl.int32)
    length = tl.where(used, tl.load(decode_len + row), 0).to(tl.int32)
    oldest = length * 0  # that a row sees
    if WINDOW:
        oldest = tl.maximum(length - WINDOW, 0)
    start = split * (PAGES * TILE)
    held_from = tl.min(tl.where(used, oldest, 2147483647), 0)
    held_until = tl.max(length, 0)
    if held_until <= start:
        return
    if held_from >= start + PAGES * TILE:
        return

    column = tl.arange(0, COLUMNS)
    inside = used[:, None] & (column < HEAD_DIM)[None, :]
    query_row = (first_row + row).to(tl.int64) * q_stride + head * HEAD_DIM
    queries = tl.load(q + query_row[:, None] + column[None, :], mask=inside, other=0.0)
    k_pages += kv_head * HEAD_DIM
    v_pages += kv_head * HEAD_DIM
    any_row = tl.max(tl.where(stacked == 0, row, 0), 0)  # all rows of the block have the split's pages
    table = page_table + (first_table + any_row).to(tl.int64) * table_stride

    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for index in range(PAGES):
        needed = True
        if INTERPRET:  # pages after the end change nothing, but would take time
            needed = held_until > start + index * TILE
        if needed:
            page = tl.load(table + tl.minimum(split * PAGES + index, num_pages - 1))
            position = start + index * TILE + tl.arange(0, TILE)
            held = (position < held_until) & (position >= held_from)
            visible = position[None, :] < length[:, None]
            if WINDOW:
                visible &= position[None, :] >= oldest[:, None]
            best, total, acc = _attend(
                queries, k_pages + page * k_page_stride, v_pages + page * v_page_stride, held, visible,
                best, total, acc, scale, KV_HEADS, HEAD_DIM, PRECISION, INTERPRET,
            )  # fmt: skip

    target = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + split
    tl.store(partial + target[:, None] * HEAD_DIM + column[None, :], acc, mask=inside)
    tl.store(partial_sums + 2 * target, best, mask=used)
    tl.store(partial_sums + 2 * target + 1, total, mask=used)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def merge_kernel(
    partial,
    partial_sums,
    out,
    decode_len,
    first_row,
    num_splits,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (heads, decode rows). Adds up the row's partial results, SPLITS at a time, in the order of the splits."""
    row, heads = tl.program_id(1), tl.num_programs(0)
    length = tl.load(decode_len + row).to(tl.int32)
    end = (length + SPAN - 1) // SPAN
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0) // SPAN
    source = (row.to(tl.int64) * heads + tl.program_id(0)) * num_splits
    column = tl.arange(0, COLUMNS)
    best = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((COLUMNS,), tl.float32)
    at = first // SPLITS * SPLITS
    while at < end:
        split = at + tl.arange(0, SPLITS)
        there = (split >= first) & (split < end)
        split = tl.where(there, split, first)
        maxima = tl.where(there, tl.load(partial_sums + 2 * (source + split)), -float("inf"))
        sums = tl.where(there, tl.load(partial_sums + 2 * (source + split) + 1), 0.0)
        mask = there[:, None] & (column < HEAD_DIM)[None, :]
        values = tl.load(partial + (source + split)[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
        new_best = tl.maximum(best, tl.max(maxima, 0))
        weights, keep = tl.exp2(maxima - new_best), tl.exp2(best - new_best)
        total = total * keep + tl.sum(sums * weights, 0)
        acc = acc * keep + tl.sum(values * weights[:, None], 0)
        best = new_best
        at += SPLITS
    y = acc / tl.where(total == 0.0, 1.0, total)  # a row of no tokens becomes zeros
    target = out + ((first_row + row).to(tl.int64) * heads + tl.program_id(0)) * HEAD_DIM
    tl.store(target + column, y.to(out.dtype.element_ty), mask=column < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What both attention kernels are specialised on."""

    heads: int
    kv_heads: int
    head_dim: int
    columns: int  # head_dim rounded up to a power of two
    precision: str

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: RowLayout, kv: KVTensors, window: int | None = None
) -> Tensor:
    """As `Ops.attention`. Decode rows follow the layout's decode schedule if it has one."""
    sizes = _sizes(q, k)
    q = _with_dense_rows(q)
    write_rows(_with_dense_rows(k), _with_dense_rows(v), layout, kv)
    ends_in_padding = layout.num_rows > layout.num_tiles * TILE + layout.num_decode
    dtype = torch.float32 if INTERPRET else q.dtype  # the interpreter does not round to bfloat16
    out = (torch.zeros if ends_in_padding else torch.empty)(q.shape, dtype=dtype, device=q.device)
    prefill(q, out, scale, layout, kv, window, sizes)
    decode(q, out, scale, layout, kv, window, sizes, schedule_of(layout))
    return out.to(q.dtype)


def schedule_of(layout: RowLayout) -> DecodeSchedule | None:
    """None for a regular grid: making a schedule from tensors on a GPU would mean waiting for it."""
    schedule: DecodeSchedule | None = layout.decode_schedule
    if schedule is None and layout.decode_len.device.type == "cpu":
        return schedule_shared(layout.page_table[len(layout.chunk_tile) :].numpy(), layout.decode_len.numpy())
    return schedule


def write_rows(k: Tensor, v: Tensor, layout: RowLayout, kv: KVTensors) -> None:
    """Copies rows of k, v [R, kv_heads, d] into the pages at `layout.kv_rows`."""
    width = k.shape[1] * k.shape[2]
    columns = min(WRITE_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(layout.num_rows, WRITE_ROWS), triton.cdiv(width, columns))
    write_rows_kernel[grid](
        k,
        v,
        kv.k,
        kv.v,
        layout.kv_rows,
        layout.num_rows,
        k.stride(0),
        v.stride(0),
        kv.k.stride(0),
        kv.v.stride(0),
        WIDTH=width,
        TILE=TILE,
        ROWS=WRITE_ROWS,
        COLUMNS=columns,
    )


def prefill(
    q: Tensor, out: Tensor, scale: float, layout: RowLayout, kv: KVTensors, window: int | None, sizes: _Sizes
) -> None:
    """Fills the rows of all tiles of `out`. q, out [R, heads, d]."""
    if layout.num_tiles == 0:
        return
    stack, num_warps, num_stages = _prefill_shape(sizes)
    prefill_kernel[sizes.heads // stack, layout.num_tiles](
        q,
        kv.k,
        kv.v,
        out,
        layout.chunk_tile,
        layout.chunk_tiles,
        layout.chunk_start,
        layout.chunk_len,
        layout.page_table,
        len(layout.chunk_tile),
        q.stride(0),
        kv.k.stride(0),
        kv.v.stride(0),
        layout.page_table.stride(0),
        scale * _LOG2_E,
        WINDOW=window or 0,
        KV_HEADS=sizes.kv_heads,
        GROUP=sizes.group,
        STACK=stack,
        HEAD_DIM=sizes.head_dim,
        COLUMNS=sizes.columns,
        TILE=TILE,
        PRECISION=sizes.precision,
        INTERPRET=INTERPRET,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def decode(
    q: Tensor,
    out: Tensor,
    scale: float,
    layout: RowLayout,
    kv: KVTensors,
    window: int | None,
    sizes: _Sizes,
    schedule: DecodeSchedule | None,
) -> None:
    """Fills the decode rows of `out`; without a schedule, each by itself on a regular grid. q, out [R, heads, d]."""
    if layout.num_decode == 0:
        return
    num_pages = layout.page_table.shape[1]
    num_splits = triton.cdiv(num_pages, PAGES_PER_SPLIT)
    shape = (layout.num_decode, sizes.heads, num_splits)
    partial = torch.empty((*shape, sizes.head_dim), dtype=torch.float32, device=q.device)
    partial_sums = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    stack = min(sizes.group, DECODE_M)
    if schedule is None:
        num_blocks, table = layout.num_decode * num_splits, layout.decode_len
    else:
        blocks = schedule.on(q.device, DECODE_M // stack)
        num_blocks, table = blocks.num_blocks, blocks.data
    num_warps, num_stages = _decode_shape(sizes)
    first_row = layout.num_tiles * TILE
    decode_kernel[num_blocks, sizes.kv_heads * triton.cdiv(sizes.group, stack)](
        q,
        kv.k,
        kv.v,
        partial,
        partial_sums,
        layout.decode_len,
        layout.page_table,
        table,
        len(layout.chunk_tile),
        layout.page_table.stride(0),
        num_pages,
        first_row,
        num_splits,
        int(schedule is not None),
        3 * num_blocks,
        q.stride(0),
        kv.k.stride(0),
        kv.v.stride(0),
        scale * _LOG2_E,
        WINDOW=window or 0,
        KV_HEADS=sizes.kv_heads,
        GROUP=sizes.group,
        STACK=stack,
        HEAD_DIM=sizes.head_dim,
        COLUMNS=sizes.columns,
        PAGES=PAGES_PER_SPLIT,
        TILE=TILE,
        BLOCK=DECODE_M,
        PRECISION=sizes.precision,
        INTERPRET=INTERPRET,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    merge_kernel[sizes.heads, layout.num_decode](
        partial,
        partial_sums,
        out,
        layout.decode_len,
        first_row,
        num_splits,
        WINDOW=window or 0,
        HEAD_DIM=sizes.head_dim,
        COLUMNS=sizes.columns,
        SPAN=PAGES_PER_SPLIT * TILE,
        SPLITS=MERGE_SPLITS,
    )


def _sizes(q: Tensor, k: Tensor) -> _Sizes:
    _, heads, head_dim = q.shape
    wide = q.dtype == torch.float32
    most = MAX_HEAD_DIM // 2 if wide else MAX_HEAD_DIM
    if head_dim > most:
        raise UnsupportedShape(f"attention heads of {head_dim} in {q.dtype}, at most {most}")
    columns = max(16, triton.next_power_of_2(head_dim))
    return _Sizes(heads, k.shape[1], head_dim, columns, "tf32x3" if wide else "tf32")


def _with_dense_rows(x: Tensor) -> Tensor:
    """x [R, heads, d]: any stride between rows, none inside."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _prefill_shape(sizes: _Sizes) -> tuple[int, int, int]:
    """-> heads in a program, warps, stages."""
    if sizes.precision == "tf32x3":
        return 1, 8, 1
    if sizes.columns > 128:
        return 1, 8, 2
    return (1, 4, 3) if sizes.group % 2 else (2, 8, 3)


def _decode_shape(sizes: _Sizes) -> tuple[int, int]:
    """-> warps, stages."""
    if sizes.precision == "tf32x3":
        return 8, 1
    return (8, 2) if sizes.columns > 128 else (4, 3)


def _specs(
    rows: str, heads: int, kv_heads: int, head_dim: int, window: int = 0, spills: Mapping[int, int] | None = None
) -> list[Spec]:
    """The kernels as `attention` launches them for rows of this type."""
    spills = spills or {80: 0, 90: 0}
    dtype = {"*bf16": torch.bfloat16, "*fp32": torch.float32}[rows]
    sizes = _sizes(torch.empty(0, heads, head_dim, dtype=dtype), torch.empty(0, kv_heads, head_dim, dtype=dtype))
    stack, prefill_warps, prefill_stages = _prefill_shape(sizes)
    decode_warps, decode_stages = _decode_shape(sizes)
    decode_sizes = {"STACK": sizes.group, "PAGES": PAGES_PER_SPLIT, "BLOCK": DECODE_M}
    pointers = {name: rows for name in ("q", "k", "v", "k_pages", "v_pages", "out")}
    types = {
        **pointers,
        **dict.fromkeys(_INDICES, "*i64"),
        **dict.fromkeys(("partial", "partial_sums"), "*fp32"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "k_page_stride", "v_page_stride"), "i32:16"),
        **dict.fromkeys(_NUMBERS, "i32"),
        "scale": "fp32",
    }
    constants = {
        "WINDOW": window,
        "KV_HEADS": kv_heads,
        "GROUP": sizes.group,
        "HEAD_DIM": head_dim,
        "COLUMNS": sizes.columns,
        "TILE": TILE,
        "PRECISION": sizes.precision,
        "INTERPRET": False,
    }
    label = f"{rows[1:]} {heads}/{kv_heads} of {head_dim}" + (" windowed" if window else "")

    def spec(kernel: Any, num_warps: int, num_stages: int, more: Mapping[str, int]) -> Spec:
        names = kernel.arg_names
        constexprs = {name: value for name, value in (*constants.items(), *more.items()) if name in names}
        signature = {name: types[name] for name in names if name not in constexprs}
        limits = {arch: Limit(spills=most, tensor_cores="PRECISION" in names) for arch, most in spills.items()}
        return Spec(kernel, signature, constexprs, num_warps, num_stages, limits, label)

    return [
        spec(prefill_kernel, prefill_warps, prefill_stages, {"STACK": stack}),
        spec(decode_kernel, decode_warps, decode_stages, decode_sizes),
        spec(merge_kernel, 4, 3, {"SPAN": PAGES_PER_SPLIT * TILE, "SPLITS": MERGE_SPLITS}),
        spec(write_rows_kernel, 4, 3, {"WIDTH": kv_heads * head_dim, "ROWS": WRITE_ROWS, "COLUMNS": WRITE_COLUMNS}),
    ]


SPECS = [
    *_specs("*bf16", 32, 8, 128, spills={80: 64, 90: 0}),
    *_specs("*bf16", 24, 8, 64, window=4096),
    *_specs("*bf16", 16, 1, 256),
    *_specs("*fp32", 16, 16, 64, spills={80: 1024, 90: 64}),  # products of three, for tests and small models
]
