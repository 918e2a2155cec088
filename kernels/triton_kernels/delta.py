"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), also with a decay for each column (Kimi Team 2025).

A token writes beta (v - h k), its share of the error of what the state says at its key. What a tile's tokens write is
the solution of a triangular system, whose matrix needs neither the state nor the values. A prefill has three steps:

1. products, grid (tiles, heads) or (tiles, heads, blocks of rows): of keys with keys and of queries with keys, with the
   decay between the two tokens inside
2. the inverse of the triangular matrix, grid (tiles, heads): of the blocks of BLOCK rows on its diagonal by forward
   substitution, then of twice as many rows, then of all
3. the states, grid (chunks, heads, blocks of the values' columns): from tile to tile, what is said, what is written,
   and the state after it

Sums run over one tile in a fixed order, and over tiles in theirs. No factor is ever larger than one, so nothing
overflows where columns forget all, and a decay is a sum of what it consists of, never a difference of two sums.

Tensor cores multiply bfloat16. A float32 operand is the sum of three of those, its parts; what comes as bfloat16 is
one. Products of parts that float32 would keep are summed up in float32, the smallest first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.triton_kernels.scan import (
    COUNTS,
    INDICES,
    counted,
    find_capture,
    inlined,
    running_sum,
    summed,
)
from hybrid_cache.kernels.unsupported import UnsupportedShape

BLOCK = 16  # rows
PART = 32  # columns of keys that are looked at together, with their products with earlier blocks
COLUMNS = 32  # of the values that a program over a chunk takes
FEW_COLUMNS = 16  # the same where its operands need more registers
COLUMNS_DECODE = 32
MAX_D_STATE = 256

_INTERPRET = tl.constexpr(knobs.runtime.interpret)
_TILE = tl.constexpr(TILE)
_BLOCK = tl.constexpr(BLOCK)
_BLOCKS = tl.constexpr(TILE // BLOCK)
_CHUNKS_AT_ONCE = tl.constexpr(64)
_EPS = tl.constexpr(1e-6)
_COUNTS = [
    "num_chunks",
    "num_captures",
    "num_decode",
    "first_row",
]  # they differ from batch to batch: never compiled in


@inlined
def _split(x):
    """-> three of bfloat16 whose sum is x of float32."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@inlined
def _add_dot(a, b, total):
    if _INTERPRET:  # it cannot multiply bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@inlined
def _dot_parts(a, b):
    """a @ b of float32, both split; what is below float32's last bit is left out. Small products come first."""
    total = tl.full([a[0].shape[0], b[0].shape[1]], 0.0, tl.float32)
    total = _add_dot(a[1], b[1], _add_dot(a[2], b[0], _add_dot(a[0], b[2], total)))
    return _add_dot(a[0], b[0], _add_dot(a[1], b[0], _add_dot(a[0], b[1], total)))


@inlined
def _dot_rows(rows, b):
    """rows @ b, where b is float32, split, and rows are as they came."""
    if rows.dtype == tl.bfloat16:
        total = tl.full([rows.shape[0], b[0].shape[1]], 0.0, tl.float32)
        total = _add_dot(rows, b[0], _add_dot(rows, b[1], _add_dot(rows, b[2], total)))
    else:
        total = _dot_parts(_split(rows.to(tl.float32)), b)
    return total


@inlined
def _dot_pairs(a, b):
    """a @ b^T, both as they came."""
    if a.dtype == tl.bfloat16:
        return _add_dot(a, tl.trans(b), tl.full([a.shape[0], b.shape[0]], 0.0, tl.float32))
    else:
        return _dot_parts(_split(a.to(tl.float32)), _split(tl.trans(b.to(tl.float32))))


@inlined
def _store_parts(target, stride, x, mask):
    """The three parts of x of float32, `stride` apart."""
    parts = _split(x)
    tl.store(target, parts[0], mask)
    tl.store(target + stride, parts[1], mask)
    tl.store(target + 2 * stride, parts[2], mask)


@inlined
def _load_parts(source, stride):
    return tl.load(source), tl.load(source + stride), tl.load(source + 2 * stride)


@inlined
def _squares(x):
    """x [rows, N] -> sum(x^2) of each row."""
    x = x.to(tl.float32)
    return summed(x * x, 1)


@inlined
def _sums_behind(x, stride, at, num_rows, column):
    """For each of the rows `at`, to which x points, the sum of those after it; the last is row `num_rows` - 1."""
    return running_sum(tl.load(x + stride, (at < num_rows - 1)[:, None] & column, 0.0), 0, True)


@inlined
def _tokens_of_tile(tile, chunk_tile, chunk_len, num_chunks):
    """How many rows of a tile are tokens."""
    chunk = -1
    first = 0
    while first < num_chunks:
        at = first + tl.arange(0, _CHUNKS_AT_ONCE)
        there = at < num_chunks
        chunk += summed(tl.where(there & (tl.load(chunk_tile + at, there, 0) <= tile), 1, 0), 0)
        first += _CHUNKS_AT_ONCE
    before = (tile - tl.load(chunk_tile + chunk)) * _TILE
    return tl.minimum(tl.load(chunk_len + chunk) - before, _TILE).to(tl.int32)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _gated_products_kernel(
    q,
    k,
    g,
    beta,
    kk_out,
    qk_out,
    factors_out,
    chunk_tile,
    chunk_len,
    num_chunks,
    q_stride,
    k_stride,
    g_stride,
    beta_stride,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid (tiles, heads). Products with the decay between two tokens, and below the diagonal of kk_out with beta.

    kk_out [tiles, H, TILE, TILE]   qk_out [tiles, H, 3, TILE, TILE], in parts
    factors_out [tiles, H, 4, TILE]: for keys and queries as they came, to read the state before the tile; for keys, to
    write to the state after it; the decay from before the tile to a token
    """
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_tokens = _tokens_of_tile(tile, chunk_tile, chunk_len, num_chunks)
    i = tl.arange(0, _TILE)
    there = i < num_tokens
    q += tile * _TILE * q_stride + head // HEADS_PER_GROUP * D_STATE
    k += tile * _TILE * k_stride + head // HEADS_PER_GROUP * D_STATE
    kk, qk = tl.full([_TILE, _TILE], 0.0, tl.float32), tl.full([_TILE, _TILE], 0.0, tl.float32)
    q_squares, k_squares = tl.full([_TILE], 0.0, tl.float32), tl.full([_TILE], 0.0, tl.float32)
    for start in counted(0, N, PART, num_stages=1, disable_licm=True):
        n = start + tl.arange(0, PART)
        inside = there[:, None] & (n < D_STATE)[None, :]
        queries = tl.load(q + (i[:, None] * q_stride + n[None, :]), inside, 0.0)
        keys = tl.load(k + (i[:, None] * k_stride + n[None, :]), inside, 0.0)
        q_squares += _squares(queries)
        k_squares += _squares(keys)
        kk += _dot_pairs(keys, keys)
        qk += _dot_pairs(queries, keys)
    q_factor, k_factor = tl.rsqrt(q_squares + _EPS) * (D_STATE**-0.5), tl.rsqrt(k_squares + _EPS)

    decay = tl.load(g + tile * _TILE * g_stride + head + i * g_stride, there, 0.0)
    strength = tl.load(beta + tile * _TILE * beta_stride + head + i * beta_stride, there, 0.0)
    later = i[:, None] > i[None, :]
    steps = tl.where(later, decay[:, None], 0.0)
    from_start, to_end = tl.exp(running_sum(decay, 0)), tl.exp(summed(steps, 0))
    between = tl.where(later | (i[:, None] == i[None, :]), tl.exp(running_sum(steps, 0)), 0.0) * k_factor[None, :]
    place = i[:, None] * _TILE + i[None, :]
    kk_out += (tile * HEADS + head) * (_TILE * _TILE)
    qk_out += (tile * HEADS + head) * (3 * _TILE * _TILE)
    tl.store(kk_out + place, kk * between * (strength * k_factor)[:, None])
    _store_parts(qk_out + place, _TILE * _TILE, qk * between * q_factor[:, None], place >= 0)
    factors = factors_out + (tile * HEADS + head) * (4 * _TILE) + i
    tl.store(factors, k_factor * from_start)
    tl.store(factors + _TILE, q_factor * from_start)
    tl.store(factors + 2 * _TILE, k_factor * to_end)
    tl.store(factors + 3 * _TILE, from_start)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _kimi_products_kernel(
    q,
    k,
    g,
    beta,
    kk_out,
    qk_out,
    rows_out,
    decay_out,
    chunk_tile,
    chunk_len,
    num_chunks,
    q_stride,
    k_stride,
    g_stride,
    beta_stride,
    HEADS: tl.constexpr,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid (tiles, heads, blocks of rows). kk_out, qk_out as in `_gated_products_kernel`.

    rows_out [tiles, H, 3, 3, TILE, N]: keys and queries that read the state before the tile, keys that write to the one
    after it, each in parts   decay_out [tiles, H, N]: from before the tile to after it

    A product within the block is computed pair by pair, its decay summed up from token to token. Products with earlier
    blocks have their decay split at this block's start.
    """
    tile, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_tokens = _tokens_of_tile(tile, chunk_tile, chunk_len, num_chunks)
    i, j, n = tl.arange(0, _BLOCK), tl.arange(0, _TILE), tl.arange(0, N)
    first = block * _BLOCK
    there = first + i < num_tokens
    num_earlier = tl.minimum(first, num_tokens)
    q += tile * _TILE * q_stride + head * D_STATE
    k += tile * _TILE * k_stride + head * D_STATE
    g += tile * _TILE * g_stride + head * D_STATE
    beta += tile * _TILE * beta_stride + head
    strength = tl.load(beta + (first + i) * beta_stride, there, 0.0)

    # with this block's own tokens
    inside = there[:, None] & (n < D_STATE)[None, :]
    queries = tl.load(q + ((first + i)[:, None] * q_stride + n[None, :]), inside, 0.0).to(tl.float32)
    keys = tl.load(k + ((first + i)[:, None] * k_stride + n[None, :]), inside, 0.0).to(tl.float32)
    q_factor, k_factor = tl.rsqrt(_squares(queries) + _EPS) * (D_STATE**-0.5), tl.rsqrt(_squares(keys) + _EPS)
    kk, qk = tl.full([_BLOCK, _BLOCK], 0.0, tl.float32), tl.full([_BLOCK, _BLOCK], 0.0, tl.float32)
    between = tl.full([_BLOCK, N], 0.0, tl.float32)
    for back in counted(0, tl.minimum(num_tokens - first, _BLOCK), disable_licm=True):
        seen = inside & (i >= back)[:, None]
        source = (first + i - back)[:, None]
        key = tl.load(k + (source * k_stride + n[None, :]), seen, 0.0).to(tl.float32) * tl.exp(between)
        here = i[None, :] == i[:, None] - back
        kk = tl.where(here, summed(keys * key, 1)[:, None], kk)
        qk = tl.where(here, summed(queries * key, 1)[:, None], qk)
        between += tl.load(g + (source * g_stride + n[None, :]), seen, 0.0)
    kk_out += (tile * HEADS + head) * (_TILE * _TILE) + (first + i)[:, None] * _TILE
    qk_out += (tile * HEADS + head) * (3 * _TILE * _TILE) + (first + i)[:, None] * _TILE
    near = first + i[None, :]
    tl.store(kk_out + near, kk * (strength * k_factor)[:, None] * k_factor[None, :])
    _store_parts(qk_out + near, _TILE * _TILE, qk * q_factor[:, None] * k_factor[None, :], near >= 0)

    # with earlier blocks, and with what is before and after the tile
    far_kk, far_qk = tl.full([_BLOCK, _TILE], 0.0, tl.float32), tl.full([_BLOCK, _TILE], 0.0, tl.float32)
    squares = tl.full([_TILE], 0.0, tl.float32)
    for start in counted(0, N, PART, num_stages=1, disable_licm=True):
        part = start + tl.arange(0, PART)
        column = (part < D_STATE)[None, :]
        cells, earlier = there[:, None] & column, (j < num_earlier)[:, None] & column
        own, whole = (first + i)[:, None], j[:, None]
        decay = tl.load(g + (own * g_stride + part[None, :]), cells, 0.0)
        own_keys = tl.load(k + (own * k_stride + part[None, :]), cells, 0.0).to(tl.float32) * k_factor[:, None]
        own_queries = tl.load(q + (own * q_stride + part[None, :]), cells, 0.0).to(tl.float32) * q_factor[:, None]
        from_block = tl.exp(running_sum(decay, 0))
        until_block = tl.exp(_sums_behind(g + (whole * g_stride + part[None, :]), g_stride, j, num_earlier, column))
        others = tl.load(k + (whole * k_stride + part[None, :]), earlier, 0.0).to(tl.float32)
        squares += _squares(others)
        until = _split(tl.trans(others * until_block))
        far_kk += _dot_parts(_split(own_keys * from_block), until)
        far_qk += _dot_parts(_split(own_queries * from_block), until)

        decays = tl.load(g + (whole * g_stride + part[None, :]), (j < num_tokens)[:, None] & column, 0.0)
        before = tl.exp(summed(tl.where((j < first)[:, None], decays, 0.0), 0))[None, :]
        behind = tl.exp(summed(tl.where((j >= first + _BLOCK)[:, None], decays, 0.0), 0))[None, :]
        num_own = tl.minimum(num_tokens - first, _BLOCK)
        to_end = tl.exp(_sums_behind(g + (own * g_stride + part[None, :]), g_stride, i, num_own, column))
        rows = rows_out + (tile * HEADS + head) * (9 * _TILE * N) + own * N + part[None, :]
        everywhere = part[None, :] >= 0
        _store_parts(rows, _TILE * N, own_keys * from_block * before, everywhere)
        _store_parts(rows + 3 * _TILE * N, _TILE * N, own_queries * from_block * before, everywhere)
        _store_parts(rows + 6 * _TILE * N, _TILE * N, own_keys * to_end * behind, everywhere)
        if block == 0:
            tl.store(decay_out + (tile * HEADS + head) * N + part, tl.exp(summed(decays, 0)))
    far_factor = tl.rsqrt(squares + _EPS)[None, :]
    far = ((j < first) | (j >= first + _BLOCK))[None, :]  # zeros after this block
    tl.store(kk_out + j[None, :], far_kk * strength[:, None] * far_factor, far)
    _store_parts(qk_out + j[None, :], _TILE * _TILE, far_qk * far_factor, far)


@inlined
def _merge(matrix, HALF: tl.constexpr):
    """Completes a triangle's inverse from those of its two halves; what is left of the second half is still L."""
    i, j = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    upper = matrix + i * _TILE + j
    lower = upper + HALF * _TILE
    product = tl.dot(tl.load(lower), tl.load(upper, i >= j, 0.0), input_precision="ieee")
    product = tl.dot(tl.load(lower + HALF, i >= j, 0.0), product, input_precision="ieee")
    tl.debug_barrier()
    tl.store(lower, -product)


@triton.jit
def _inverse_kernel(kk, inverse_out, HEADS: tl.constexpr):
    """Grid (tiles, heads). inverse_out [tiles, H, 3, TILE, TILE]: the parts of 1 / (1 + L).

    kk [tiles, H, TILE, TILE] has L below its diagonal, and is overwritten.
    """
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    kk += head * (_TILE * _TILE)
    block, i = tl.arange(0, _BLOCKS)[:, None, None], tl.arange(0, _BLOCK)
    row, column = i[None, :, None], i[None, None, :]
    place = block * (_BLOCK * _TILE + _BLOCK) + row * _TILE + column
    everywhere = block >= 0
    near = tl.load(kk + place, (row > column) & everywhere, 0.0)  # [blocks, BLOCK, BLOCK]
    inverse = tl.where((row == column) & everywhere, 1.0, 0.0)
    for step in range(_BLOCK - 1):
        factor = summed(tl.where(column == step, near, 0.0), 2)
        done = summed(tl.where(row == step, inverse, 0.0), 1)
        inverse -= factor[:, :, None] * done[:, None, :]
    tl.debug_barrier()
    tl.store(kk + place, inverse)
    tl.debug_barrier()
    for first in tl.static_range(0, _TILE, 2 * _BLOCK):
        _merge(kk + first * (_TILE + 1), _BLOCK)
    tl.debug_barrier()
    _merge(kk, 2 * _BLOCK)
    tl.debug_barrier()
    whole = tl.arange(0, _TILE)
    place, lower = whole[:, None] * _TILE + whole[None, :], whole[:, None] >= whole[None, :]
    inverse = tl.load(kk + place, lower, 0.0)
    _store_parts(inverse_out + head * (3 * _TILE * _TILE) + place, _TILE * _TILE, inverse, place >= 0)


@inlined
def _tile(
    h,
    tile,
    num_tokens,
    queries,
    keys,
    v,
    beta,
    y,
    inverse,
    qk,
    extra,
    decay_out,
    q_stride,
    k_stride,
    v_stride,
    beta_stride,
    p,
    p_there,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    EACH_COLUMN: tl.constexpr,
):
    """-> h [N, P] after a tile of one head, whose y it stores; pointers are those of the head."""
    i, n = tl.arange(0, _TILE), tl.arange(0, N)
    row = tile * _TILE
    there = i < num_tokens
    place = i[:, None] * _TILE + i[None, :]
    inverse += tile * (HEADS * 3 * _TILE * _TILE)
    qk += tile * (HEADS * 3 * _TILE * _TILE)
    h_parts = _split(h)
    if EACH_COLUMN:
        extra += tile * (HEADS * 9 * _TILE * N)
        cells = i[:, None] * N + n[None, :]
        said = _dot_parts(_load_parts(extra + cells, _TILE * N), h_parts)
        y_before = _dot_parts(_load_parts(extra + 3 * _TILE * N + cells, _TILE * N), h_parts)
        kept = tl.load(decay_out + tile * (HEADS * N) + n)[:, None]
    else:
        extra += tile * (HEADS * 4 * _TILE)
        inside = there[:, None] & (n < D_STATE)[None, :]
        key_rows = tl.load(keys + row * k_stride + (i[:, None] * k_stride + n[None, :]), inside, 0.0)
        query_rows = tl.load(queries + row * q_stride + (i[:, None] * q_stride + n[None, :]), inside, 0.0)
        said = _dot_rows(key_rows, h_parts) * tl.load(extra + i)[:, None]
        y_before = _dot_rows(query_rows, h_parts) * tl.load(extra + _TILE + i)[:, None]
        kept = tl.load(extra + 4 * _TILE - 1)
    inside = there[:, None] & p_there[None, :]
    values = tl.load(v + row * v_stride + (i[:, None] * v_stride + p[None, :]), inside, 0.0).to(tl.float32)
    strength = tl.load(beta + row * beta_stride + i * beta_stride, there, 0.0)
    right = strength[:, None] * (values - said)
    written = _dot_parts(_load_parts(inverse + place, _TILE * _TILE), _split(right))
    written_parts = _split(written)
    out = y_before + _dot_parts(_load_parts(qk + place, _TILE * _TILE), written_parts)
    target = y + row * (HEADS * HEAD_DIM) + (i[:, None] * (HEADS * HEAD_DIM) + p[None, :])
    tl.store(target, out.to(y.dtype.element_ty), p_there[None, :])
    if EACH_COLUMN:
        cells = i[None, :] * N + n[:, None]  # transposed
        return h * kept + _dot_parts(_load_parts(extra + 6 * _TILE * N + cells, _TILE * N), written_parts)
    else:
        written *= tl.load(extra + 2 * _TILE + i)[:, None]
        return h * kept + _dot_rows(tl.trans(key_rows), _split(written))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _chunk_kernel(
    q,
    k,
    v,
    beta,
    state,
    y,
    inverse,
    qk,
    extra,
    decay_out,
    chunk_tile,
    chunk_len,
    chunk_slot,
    chunk_fresh,
    capture_chunk,
    capture_tiles,
    capture_slot,
    num_captures,
    q_stride,
    k_stride,
    v_stride,
    beta_stride,
    state_stride,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH_COLUMN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (chunks, heads, column blocks of the values). A program walks along a chunk with its state, [N, COLUMNS].

    inverse, qk [tiles, H, 3, TILE, TILE]: see `_inverse_kernel`, `_gated_products_kernel`
    extra: factors_out, or with EACH_COLUMN rows_out
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_tile, length = tl.load(chunk_tile + chunk), tl.load(chunk_len + chunk).to(tl.int32)
    slot = tl.load(chunk_slot + chunk)
    p, n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, N)
    p_there = p < HEAD_DIM
    state += head * (HEAD_DIM * D_STATE)
    place = p[None, :] * D_STATE + n[:, None]
    inside = p_there[None, :] & (n < D_STATE)[:, None]
    kept = p < tl.where(tl.load(chunk_fresh + chunk) != 0, 0, HEAD_DIM)
    h = tl.load(state + slot * state_stride + place, kept[None, :] & (n < D_STATE)[:, None], 0.0)
    q += head // HEADS_PER_GROUP * D_STATE
    k += head // HEADS_PER_GROUP * D_STATE
    v += head * HEAD_DIM
    y += head * HEAD_DIM
    inverse += head * (3 * _TILE * _TILE)
    qk += head * (3 * _TILE * _TILE)
    extra += head * (9 * _TILE * N if EACH_COLUMN else 4 * _TILE)
    decay_out += head * N
    for tile in counted(0, (length + _TILE - 1) // _TILE, num_stages=STAGES, disable_licm=True):
        h = _tile(
            h,
            first_tile + tile,
            tl.minimum(length - tile * _TILE, _TILE),
            q,
            k,
            v,
            beta + head,
            y,
            inverse,
            qk,
            extra,
            decay_out,
            q_stride,
            k_stride,
            v_stride,
            beta_stride,
            p,
            p_there,
            HEADS,
            HEAD_DIM,
            D_STATE,
            N,
            EACH_COLUMN,
        )
        if (tile + 1) * _TILE <= length:
            capture = find_capture(chunk, tile + 1, capture_chunk, capture_tiles, capture_slot, num_captures)
            if capture >= 0:
                tl.store(state + capture * state_stride + place, h, inside)
    tl.store(state + slot * state_stride + place, h, inside)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def _decode_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    y,
    decode_slot,
    num_decode,
    first_row,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    state_stride,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH_COLUMN: tl.constexpr,
):
    """Grid (decode and padding rows, heads, column blocks of the values). A program takes one token."""
    i, head = tl.program_id(0), tl.program_id(1)
    row = (first_row + i).to(tl.int64)
    p, n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, N)
    p_there, n_there = p < HEAD_DIM, n < D_STATE
    out = tl.full([COLUMNS], 0.0, tl.float32)
    if i < num_decode:
        inside = p_there[:, None] & n_there[None, :]
        place = head * (HEAD_DIM * D_STATE) + p[:, None] * D_STATE + n[None, :]
        source = state + tl.load(decode_slot + i) * state_stride + place
        h = tl.load(source, inside, 0.0)
        group = head // HEADS_PER_GROUP * D_STATE
        query = tl.load(q + row * q_stride + group + n, n_there, 0.0).to(tl.float32)
        key = tl.load(k + row * k_stride + group + n, n_there, 0.0).to(tl.float32)
        query *= tl.rsqrt(summed(query * query, 0) + _EPS) * (D_STATE**-0.5)
        key *= tl.rsqrt(summed(key * key, 0) + _EPS)
        value = tl.load(v + row * v_stride + head * HEAD_DIM + p, p_there, 0.0).to(tl.float32)
        if EACH_COLUMN:
            h *= tl.exp(tl.load(g + row * g_stride + head * D_STATE + n, n_there, 0.0))[None, :]
        else:
            h *= tl.exp(tl.load(g + row * g_stride + head))
        error = value - summed(h * key[None, :], 1)
        h += (tl.load(beta + row * beta_stride + head) * error)[:, None] * key[None, :]
        tl.store(source, h, inside)
        out = summed(h * query[None, :], 1)
    tl.store(y + row * (HEADS * HEAD_DIM) + head * HEAD_DIM + p, out.to(y.dtype.element_ty), p_there)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """See `Ops.gated_delta`. Padding rows come back as zeros."""
    return _delta(q, k, v, g, beta, layout, state, each_column=False)


def kimi_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor) -> Tensor:
    """See `Ops.kimi_delta`. Padding rows come back as zeros."""
    return _delta(q, k, v, g, beta, layout, state, each_column=True)


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    layout: RowLayout,
    state: Tensor,
    *,
    each_column: bool,
) -> Tensor:
    (num_rows, heads, head_dim), (_, groups, d_state) = v.shape, k.shape
    if d_state > MAX_D_STATE:
        raise UnsupportedShape(f"delta rule with keys of {d_state}, limit {MAX_D_STATE}")
    q, k, v, g, beta = (_with_dense_rows(x) for x in (q, k, v, g.float(), beta.float()))
    y = torch.empty(num_rows, heads, head_dim, dtype=v.dtype, device=v.device)
    sizes = {"HEADS": heads, "D_STATE": d_state, "N": max(16, triton.next_power_of_2(d_state))}
    per_group = {"HEADS_PER_GROUP": heads // groups}
    if layout.num_tiles:
        _prefill(q, k, v, g, beta, layout, state, y, sizes, per_group, each_column)
    first_row = layout.num_tiles * TILE
    if num_rows > first_row:
        _decode_kernel[num_rows - first_row, heads, triton.cdiv(head_dim, COLUMNS_DECODE)](
            *(q, k, v, g, beta, state, y, layout.decode_slot, layout.num_decode, first_row),
            *(*(x.stride(0) for x in (q, k, v, g, beta)), state.stride(0)),
            **sizes,
            **per_group,
            HEAD_DIM=head_dim,
            COLUMNS=COLUMNS_DECODE,
            EACH_COLUMN=each_column,
            num_warps=4,
        )
    return y


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    layout: RowLayout,
    state: Tensor,
    y: Tensor,
    sizes: dict[str, int],
    per_group: dict[str, int],
    each_column: bool,
) -> None:
    heads, head_dim, padded = sizes["HEADS"], v.shape[2], sizes["N"]
    kk = v.new_empty(layout.num_tiles, heads, TILE, TILE, dtype=torch.float32)
    inverse, qk = v.new_empty(2, layout.num_tiles, heads, 3, TILE, TILE, dtype=torch.bfloat16).unbind(0)
    chunks = (layout.chunk_tile, layout.chunk_len)
    strides = [x.stride(0) for x in (q, k, g, beta)]
    if each_column:
        extra = v.new_empty(layout.num_tiles, heads, 3, 3, TILE, padded, dtype=torch.bfloat16)
        decay = v.new_empty(layout.num_tiles, heads, padded, dtype=torch.float32)
        _kimi_products_kernel[layout.num_tiles, heads, TILE // BLOCK](
            *(q, k, g, beta, kk, qk, extra, decay, *chunks, len(layout.chunk_tile), *strides),
            **sizes,
            PART=min(PART, padded),
            num_warps=4,
        )
    else:
        extra = decay = v.new_empty(layout.num_tiles, heads, 4, TILE, dtype=torch.float32)
        _gated_products_kernel[layout.num_tiles, heads](
            *(q, k, g, beta, kk, qk, extra, *chunks, len(layout.chunk_tile), *strides),
            **sizes,
            **per_group,
            PART=min(PART, padded),
            num_warps=8,
        )
    _inverse_kernel[layout.num_tiles, heads](kk, inverse, HEADS=heads, num_warps=4)
    columns = _columns(v, padded, each_column)
    _chunk_kernel[len(layout.chunk_tile), heads, triton.cdiv(head_dim, columns)](
        *(q, k, v, beta, state, y, inverse, qk, extra, decay, *chunks, layout.chunk_slot, layout.chunk_fresh),
        *(layout.capture_chunk, layout.capture_tiles, layout.capture_slot, len(layout.capture_chunk)),
        *(*(x.stride(0) for x in (q, k, v, beta)), state.stride(0)),
        **sizes,
        **per_group,
        HEAD_DIM=head_dim,
        COLUMNS=columns,
        EACH_COLUMN=each_column,
        STAGES=_stages(v, padded, each_column),
        num_warps=4,
    )


def _columns(v: Tensor, padded: int, each_column: bool) -> int:
    before_hopper = v.is_cuda and torch.cuda.get_device_capability(v.device) < (9, 0)
    return FEW_COLUMNS if padded > 128 or (each_column and before_hopper) else COLUMNS


def _stages(v: Tensor, padded: int, each_column: bool) -> int:
    """2 where the next tile's operands fit into shared memory together with those of this one."""
    return 2 if not each_column and padded <= 128 and v.element_size() == 2 else 1


def _with_dense_rows(x: Tensor) -> Tensor:
    """x [R, ...] with each row's values next to each other; rows may have any stride."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


_TYPES = (
    dict.fromkeys(("q", "k", "v", "y", "qk", "qk_out", "rows_out", "inverse", "inverse_out", "extra"), "*bf16")
    | dict.fromkeys(("g", "beta", "state", "kk", "kk_out", "factors_out", "decay_out"), "*fp32")
    | dict.fromkeys(("chunk_tile", "chunk_len", "chunk_slot", "chunk_fresh", "decode_slot"), "*i64")
    | dict.fromkeys(("capture_chunk", "capture_tiles", "capture_slot"), "*i64")
    | dict.fromkeys(("num_chunks", "num_captures", "num_decode", "first_row"), "i32")
    | {f"{name}_stride": "i32:16" for name in ("q", "k", "v", "g", "beta", "state")}
)


_DOTS = {80: Limit(tensor_cores=True), 90: Limit(tensor_cores=True)}
_SIZES = {"HEADS": 32, "D_STATE": 128, "N": 128, "HEAD_DIM": 128, "PART": PART, "COLUMNS": COLUMNS}
_GATED = _SIZES | {"HEADS_PER_GROUP": 2, "EACH_COLUMN": False, "STAGES": 2}
_KIMI = _SIZES | {"HEADS_PER_GROUP": 1, "EACH_COLUMN": True, "STAGES": 1}


def _spec(
    kernel: Any, label: str = "", sizes: dict[str, Any] = _GATED, num_warps: int = 4, limits: dict[int, Limit] = _DOTS
) -> Spec:
    signature = {name: _TYPES[name] for name in kernel.arg_names if name in _TYPES}
    if label == "gated" and "extra" in signature:
        signature["extra"] = "*fp32"
    constexprs = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    return Spec(kernel, signature, constexprs, num_warps, limits=limits, label=label)


SPECS = [
    _spec(_gated_products_kernel, num_warps=8),
    _spec(_kimi_products_kernel),
    _spec(_inverse_kernel, limits={80: Limit(96), 90: Limit(96)}),
    _spec(_chunk_kernel, "gated"),
    _spec(_chunk_kernel, "kimi", _KIMI, limits=_DOTS | {80: Limit(spills=1 << 20)}),  # not used before Hopper
    _spec(_chunk_kernel, "kimi before Hopper", _KIMI | {"COLUMNS": FEW_COLUMNS}),
    _spec(_decode_kernel, "gated", limits={}),
    _spec(_decode_kernel, "kimi", _KIMI, limits={}),
]
