"""Each operation against `reference`, over tables of shapes and of batches: for tests, and for the check of a GPU."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.problems import (
    CPU,
    AttentionProblem,
    ConvProblem,
    GatedDeltaProblem,
    KimiDeltaProblem,
    LinearAttentionProblem,
    Mamba1Problem,
    Mamba2Problem,
    Piece,
    Problem,
    RgLruProblem,
    Stream,
    cache_on,
    run_batch,
    token,
)

# Share of the output's root mean square. float32: sums of up to a few hundred terms in another order, each step
# rounding at 6e-8. bfloat16: the result is rounded at 2^-9 = 2e-3, and a backend may round an intermediate once more.
# float16: rounded at 2^-12 = 2.4e-4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}

SHAPES: Mapping[str, Callable[[torch.dtype, torch.Generator], Problem]] = {
    "mamba2": Mamba2Problem,
    "mamba2 head 64, state 128": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=64, d_state=128, num_heads=3),
    "mamba2 head 128, state 64": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=128, d_state=64, num_heads=2),
    "mamba2 state 16, groups 2": lambda dtype, rng: Mamba2Problem(dtype, rng, d_state=16, num_groups=2, norm_groups=2),
    "mamba2 head 24, width 3": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=24, width=3, bias=False),
    "mamba2 clamped dt": lambda dtype, rng: Mamba2Problem(dtype, rng, dt_min=0.02, dt_max=0.1),
    "mamba2 state 20": lambda dtype, rng: Mamba2Problem(dtype, rng, d_state=20, head_dim=8, num_heads=5),
    "mamba2 without norm": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=20, num_groups=2, norm=False),
    "mamba2 norm first": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=12, norm_groups=2, norm_first=True),
    "conv": ConvProblem,
    "conv width 2, no bias": lambda dtype, rng: ConvProblem(dtype, rng, width=2, channels=7, bias=False),
    "conv width 3, no activation": lambda dtype, rng: ConvProblem(dtype, rng, width=3, activation=False),
    "mamba1": Mamba1Problem,
    "mamba1 state 128": lambda dtype, rng: Mamba1Problem(dtype, rng, channels=24, d_state=128),
    "mamba1 state 7": lambda dtype, rng: Mamba1Problem(dtype, rng, channels=9, d_state=7),
    "delta": lambda dtype, rng: GatedDeltaProblem(dtype),
    "delta head 128, state 128": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=2, head_dim=128, d_state=128),
    "delta one head, state 7": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=1, num_groups=1, d_state=7),
    "delta beta 2": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=6, head_dim=10, d_state=20, max_beta=2.0),
    "linear attention": LinearAttentionProblem,
    "linear attention 3 heads, 7 to 20": lambda dtype, rng: LinearAttentionProblem(
        dtype, rng, num_heads=3, head_dim=20, d_state=7
    ),
    "rg_lru": RgLruProblem,
    "rg_lru 13 channels": lambda dtype, rng: RgLruProblem(dtype, rng, channels=13),
    "kimi delta": lambda dtype, rng: KimiDeltaProblem(dtype),
    "kimi delta state 128": lambda dtype, rng: KimiDeltaProblem(dtype, num_heads=2, head_dim=128, d_state=128),
    "kimi delta forgets all": lambda dtype, rng: KimiDeltaProblem(dtype, head_dim=9, d_state=20, most=300.0),
    "attention": lambda dtype, rng: AttentionProblem(dtype),
    "attention one head each": lambda dtype, rng: AttentionProblem(dtype, num_heads=3, num_kv_heads=3, head_dim=16),
    "attention 12 to 4 of 64": lambda dtype, rng: AttentionProblem(dtype, num_heads=12, num_kv_heads=4, head_dim=64),
    "attention head 128": lambda dtype, rng: AttentionProblem(dtype, num_heads=4, num_kv_heads=2, head_dim=128),
    "attention 6 to 1 of 40": lambda dtype, rng: AttentionProblem(dtype, num_heads=6, num_kv_heads=1, head_dim=40),
    "attention window 20": lambda dtype, rng: AttentionProblem(dtype, window=20),
    "attention window 100": lambda dtype, rng: AttentionProblem(dtype, window=100, head_dim=64),
}

# Chunks of one call: (stream, start, end, captures); then its decodes: (stream, position).
Chunks = Sequence[tuple[int, int, int, tuple[tuple[int, int], ...]]]
Decodes = Sequence[tuple[int, int]]
Calls = Sequence[tuple[Chunks, Decodes]]

BATCHES: Mapping[str, Calls] = {
    "one token": [([(0, 0, 1, ())], [])],
    "two tokens": [([(0, 0, 2, ())], [])],
    "63 tokens": [([(0, 0, 63, ())], [])],
    "64 tokens": [([(0, 0, 64, ((64, 8),))], [])],
    "65 tokens": [([(0, 0, 65, ((64, 8),))], [])],
    "130 tokens, two captures": [([(0, 0, 130, ((64, 8), (128, 9)))], [])],
    "resumed": [([(0, 0, 64, ())], []), ([(0, 64, 130, ((64, 8),))], [])],
    "resumed for one token": [([(0, 0, 128, ())], []), ([(0, 128, 129, ())], [])],
    "decoded after one token": [([(0, 0, 1, ())], []), ([], [(0, 1)]), ([], [(0, 2)])],
    "unequal lengths": [([(0, 0, 130, ()), (1, 0, 1, ()), (2, 0, 65, ((64, 8),))], [])],
    "prefill and decode": [
        ([(0, 0, 65, ()), (1, 0, 64, ())], []),
        ([(2, 0, 70, ((64, 9),)), (1, 64, 66, ())], [(0, 65)]),
        ([(3, 0, 3, ())], [(0, 66), (1, 66), (2, 70)]),
    ],
    "five decodes": [
        ([(i, 0, n, ()) for i, n in enumerate((64, 1, 130, 63, 5))], []),
        ([], [(0, 64), (1, 1), (2, 130), (3, 63), (4, 5)]),
    ],
}


def play(ops: Ops, problem: Problem, calls: Calls, device: torch.device = CPU) -> tuple[list[Tensor], list[Tensor]]:
    """-> the output [tokens, ...] of each piece of each call, and the cache [20, ...] at the end; NaN if unwritten.

    The problem's weights are on `device`, and so is what comes back.
    """
    streams, cache = _streams(problem), cache_on(device, problem, 20, float("nan"))
    outputs: list[Tensor] = []
    for chunks, decodes in calls:
        pieces = [Piece(streams[i], start, end, captures) for i, start, end, captures in chunks]
        outputs += run_batch(ops, problem, cache, pieces, [token(streams[i], at) for i, at in decodes])
    return outputs, cache


def _streams(problem: Problem) -> list[Stream]:
    """Pages are spread over the pool in no order."""
    rng = torch.Generator().manual_seed(3)
    pages = torch.randperm(20, generator=rng).tolist()
    return [Stream(problem.inputs(140, rng), slot, pages[4 * slot : 4 * slot + 4]) for slot in range(5)]


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of found - expected, each [...], as a share of that of `expected`, to compare with TOLERANCE.

    Infinite for another type or shape, and where only one of them is NaN.
    """
    written = ~expected.isnan()
    if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(~found.isnan(), written):
        return float("inf")
    if not written.any():
        return 0.0
    error, size = (t[written].double().square().mean().sqrt().item() for t in (found - expected, expected))
    return error / max(size, 1e-7)
