"""The most likely token of each row of logits, and log-probabilities, in one pass over the logits.

A row is cut into chunks of CHUNK tokens, wherever it lies in the batch; a second launch goes over the chunks' maxima
and sums. NaN counts as infinity. Of equal logits the first wins, as in `torch.argmax`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec

CHUNK = 4096
NUM_WARPS = 8


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
    logits,
    best,
    place,
    total,
    tokens,
    log_probs,
    row_stride,
    NUM_CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows). Merges a row's chunks; the token is given, or the most likely one and written to `tokens`."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    at, there = row * NUM_CHUNKS + chunk, chunk < NUM_CHUNKS
    largest_in = tl.load(best + at, there, float("-inf"))
    largest = tl.max(largest_in, 0)
    if GIVEN:
        token = tl.load(tokens + row)
    else:
        token = tl.min(tl.where(there & (largest_in == largest), tl.load(place + at, there, VOCAB), VOCAB), 0)
        tl.store(tokens + row, token.to(tl.int64))
    finite = tl.maximum(tl.minimum(largest, 3.4e38), -3.4e38)
    finite_in = tl.maximum(tl.minimum(largest_in, 3.4e38), -3.4e38)
    sums = tl.load(total + at, there, 0.0) * tl.exp(finite_in - finite)
    value = tl.load(logits + row * row_stride + token).to(tl.float32)
    tl.store(log_probs + row, value - finite - tl.log(tl.sum(sums, 0)))


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [S, V] -> the most likely tokens [S] int64, and their log-probabilities [S] float32."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return tokens, _merged(logits, tokens, given=False)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [S, V], tokens [S] int64 -> log-probabilities [S] float32."""
    return _merged(logits, tokens.contiguous(), given=True)


def _merged(logits: Tensor, tokens: Tensor, *, given: bool) -> Tensor:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, CHUNK)
    best, total = (torch.empty(num_rows, num_chunks, device=logits.device) for _ in range(2))
    place = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    log_probs = torch.empty(num_rows, device=logits.device)
    if num_rows:
        _chunks_kernel[num_rows, num_chunks](
            logits, best, place, total, logits.stride(0), VOCAB=vocab, CHUNK=CHUNK, num_warps=NUM_WARPS
        )
        _rows_kernel[(num_rows,)](
            *(logits, best, place, total, tokens, log_probs, logits.stride(0)),
            NUM_CHUNKS=num_chunks,
            GIVEN=given,
            VOCAB=vocab,
            BLOCK=triton.next_power_of_2(num_chunks),
            num_warps=1,
        )
    return log_probs


_PARTS = {"logits": "*fp32", "best": "*fp32", "place": "*i32", "total": "*fp32", "row_stride": "i32:16"}
_LIMITS = {80: Limit(registers=64), 90: Limit(registers=64)}

SPECS = [
    Spec(_chunks_kernel, _PARTS, {"VOCAB": 151936, "CHUNK": CHUNK}, num_warps=NUM_WARPS, limits=_LIMITS),
    Spec(
        _rows_kernel,
        {**_PARTS, "tokens": "*i64", "log_probs": "*fp32"},
        {"NUM_CHUNKS": 38, "GIVEN": False, "VOCAB": 151936, "BLOCK": 64},
        num_warps=1,
        limits=_LIMITS,
    ),
]
