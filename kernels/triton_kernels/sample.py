"""The next token of each row of logits: `Ops.sample`, `Ops.log_sum_exp` and `Ops.mask_tokens`.

A row is cut into chunks of CHUNK tokens, wherever it lies in the batch; a second launch goes over the chunks' maxima
and sums. Rows that draw take a third one, with a program for each row. It finds the smallest weight that stays by
halving the range of its bits, which are in the order of the weights: the sort of a whole vocabulary is left out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.ops import Draws
from hybrid_cache.kernels.sampling import check_words
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec

CHUNK = 4096
NUM_WARPS = 8

_HALVINGS = tl.constexpr(30)  # of the numbers up to the bits of 1.0, which is the largest weight
_ABOVE_ONE = tl.constexpr(0x3F800001)


@triton.jit
def _chunks_kernel(logits, best, place, total, row_stride, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (rows, chunks). A chunk's largest logit, where it is, and the sum of exp(logit - largest)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + token, token < VOCAB, float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    largest = tl.max(x, 0)
    finite = tl.maximum(tl.minimum(largest, 3.4e38), -3.4e38)  # infinity - infinity is not a number
    at = row * tl.num_programs(1) + chunk
    tl.store(best + at, largest)
    tl.store(place + at, tl.min(tl.where(x == largest, token, VOCAB), 0))
    tl.store(total + at, tl.sum(tl.exp(x - finite), 0))


@triton.jit
def _rows_kernel(
    best, place, total, tokens, largest, log_sums, NUM_CHUNKS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (rows). Merges a row's chunks: its most likely token, the logit of that, and log(sum(exp(logits)))."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    at, there = row * NUM_CHUNKS + chunk, chunk < NUM_CHUNKS
    largest_in = tl.load(best + at, there, float("-inf"))
    most = tl.max(largest_in, 0)
    token = tl.min(tl.where(there & (largest_in == most), tl.load(place + at, there, VOCAB), VOCAB), 0)
    finite = tl.maximum(tl.minimum(most, 3.4e38), -3.4e38)
    finite_in = tl.maximum(tl.minimum(largest_in, 3.4e38), -3.4e38)
    sums = tl.load(total + at, there, 0.0) * tl.exp(finite_in - finite)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(largest + row, most)
    tl.store(log_sums + row, most + tl.log(tl.sum(sums, 0)))


@triton.jit
def _measure(weights, least, COUNTS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """How many weights [VOCAB] are at least `least`, or their sum."""
    columns = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], tl.float32)
    for start in range(0, VOCAB, CHUNK):
        w = tl.load(weights + start + columns, start + columns < VOCAB, 0.0)
        there = (w >= least) & (start + columns < VOCAB)
        sums += tl.where(there, 1.0 if COUNTS else w, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _threshold(weights, target, COUNTS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The largest number for which `_measure` is at least `target`; 0 if there is none."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], _ABOVE_ONE, tl.int32)
    for _ in range(_HALVINGS):
        middle = low + (high - low) // 2
        enough = _measure(weights, middle.to(tl.float32, bitcast=True), COUNTS, VOCAB, CHUNK) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _draw_kernel(
    logits,
    weights,
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    point,
    tokens,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (rows). Replaces the most likely token of a row that has a temperature."""
    row = tl.program_id(0).to(tl.int64)
    heat, most = tl.load(temperature + row), tl.load(largest + row)
    if (heat > 0) & (tl.abs(most) < float("inf")):
        columns = tl.arange(0, CHUNK)
        weights += row * VOCAB
        for start in range(0, VOCAB, CHUNK):
            there = start + columns < VOCAB
            x = tl.load(logits + row * row_stride + start + columns, there, float("-inf")).to(tl.float32)
            tl.store(weights + start + columns, tl.exp((x - most) / heat), there)
        tl.debug_barrier()  # a thread reads what others wrote
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        least = tl.full([], 0.0, tl.float32)
        if (k > 0) & (k < VOCAB):
            least = _threshold(weights, k.to(tl.float32), True, VOCAB, CHUNK)
        if p < 1:
            total_of_largest = _measure(weights, least, False, VOCAB, CHUNK)
            least = tl.maximum(least, _threshold(weights, p * total_of_largest, False, VOCAB, CHUNK))
        least = tl.maximum(least, tl.load(min_p + row))

        total = tl.full([], 0.0, tl.float64)
        for start in range(0, VOCAB, CHUNK):
            w = tl.load(weights + start + columns, start + columns < VOCAB, 0.0)
            total += tl.sum(tl.where(w >= least, w, 0.0), 0).to(tl.float64)
        rest, passed = tl.load(point + row) * total, tl.full([], 0.0, tl.float64)
        token = tl.full([], 0, tl.int32)
        for start in range(0, VOCAB, CHUNK):
            w = tl.load(weights + start + columns, start + columns < VOCAB, 0.0)
            w = tl.where(w >= least, w, 0.0)
            here = tl.sum(w, 0).to(tl.float64)
            if (passed <= rest) & (here > 0):  # the last such chunk has the token
                beyond = tl.cumsum(w, 0) > (rest - passed).to(tl.float32)
                first = tl.min(tl.where(beyond & (w > 0), columns, CHUNK), 0)
                last = tl.max(tl.where(w > 0, columns, 0), 0)
                token = start + tl.minimum(first, last)
            passed += here
        tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _mask_kernel(logits, rows, words, row_stride, VOCAB: tl.constexpr, NUM_WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (masks, chunks). Writes -inf where the bit of a token is not set."""
    mask = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = token < VOCAB
    word = tl.load(words + mask * NUM_WORDS + token // 32, there, -1)
    barred = there & ((word >> (token % 32) & 1) == 0)
    tl.store(logits + tl.load(rows + mask) * row_stride + token, float("-inf"), barred)


def mask_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """See `Ops.mask_tokens`."""
    check_words(logits, rows, words)
    if len(rows):
        vocab = logits.shape[1]
        _mask_kernel[len(rows), triton.cdiv(vocab, CHUNK)](
            *(logits, rows.contiguous(), words, logits.stride(0)),
            VOCAB=vocab,
            NUM_WORDS=words.shape[1],
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """logits [S, V] of any float dtype -> tokens [S] int64."""
    logits = _with_unit_stride(logits)
    tokens, largest, _ = _merged(logits)
    num_rows, vocab = logits.shape
    if num_rows and not draws.greedy:
        _draw_kernel[(num_rows,)](
            *(logits, torch.empty(num_rows, vocab, device=logits.device), largest),
            *(x.contiguous() for x in (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.point)),
            *(tokens, logits.stride(0)),
            VOCAB=vocab,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )
    return tokens


def log_sum_exp(logits: Tensor) -> Tensor:
    """logits [S, V] -> [S] float32."""
    return _merged(_with_unit_stride(logits))[2]


def _merged(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> the most likely tokens, their logits, log(sum(exp(logits)))."""
    num_rows, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, CHUNK)
    best, total = (torch.empty(num_rows, num_chunks, device=logits.device) for _ in range(2))
    place = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    largest, log_sums = (torch.empty(num_rows, device=logits.device) for _ in range(2))
    if num_rows:
        _chunks_kernel[num_rows, num_chunks](
            logits, best, place, total, logits.stride(0), VOCAB=vocab, CHUNK=CHUNK, num_warps=NUM_WARPS
        )
        _rows_kernel[(num_rows,)](
            *(best, place, total, tokens, largest, log_sums),
            NUM_CHUNKS=num_chunks,
            VOCAB=vocab,
            BLOCK=triton.next_power_of_2(num_chunks),
            num_warps=1,
        )
    return tokens, largest, log_sums


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


_PARTS = {"best": "*fp32", "place": "*i32", "total": "*fp32"}
_LIMITS = {80: Limit(registers=64), 90: Limit(registers=64)}
_ROWS = {"tokens": "*i64", "largest": "*fp32"}

SPECS = [
    Spec(
        _chunks_kernel,
        {**_PARTS, "logits": "*fp32", "row_stride": "i32:16"},
        {"VOCAB": 151936, "CHUNK": CHUNK},
        num_warps=NUM_WARPS,
        limits=_LIMITS,
    ),
    Spec(
        _rows_kernel,
        {**_PARTS, **_ROWS, "log_sums": "*fp32"},
        {"NUM_CHUNKS": 38, "VOCAB": 151936, "BLOCK": 64},
        num_warps=1,
        limits=_LIMITS,
    ),
    Spec(
        _mask_kernel,
        {"logits": "*fp32", "rows": "*i64", "words": "*i32", "row_stride": "i32:16"},
        {"VOCAB": 151936, "NUM_WORDS": 4748, "CHUNK": CHUNK},
        num_warps=NUM_WARPS,
        limits=_LIMITS,
    ),
    Spec(
        _draw_kernel,
        {
            **_ROWS,
            **dict.fromkeys(("logits", "weights", "temperature", "top_p", "min_p"), "*fp32"),
            "top_k": "*i64",
            "point": "*fp64",
            "row_stride": "i32:16",
        },
        {"VOCAB": 151936, "CHUNK": CHUNK},
        num_warps=NUM_WARPS,
        limits={80: Limit(registers=128), 90: Limit(registers=128)},
    ),
]
