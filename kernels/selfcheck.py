"""Does a backend keep the two promises of `ops` here: on this CPU, with these libraries, for these shapes?

Each probe computes the same rows twice, by themselves and in another batch, and compares bits.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
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
    move,
    run_batch,
    token,
)

NUM_ROWS = (1, 2, 3, 4, 5, 17, TILE, TILE + 1, 3 * TILE + 4, 5 * TILE)
CUTS = ((3,), (1, 3), (1, 2, 3))  # tiles of the first call, first two calls ... of a prompt of less than four tiles
PROMPT = 3 * TILE + 9
OFF_GRID = (TILE - 27, TILE + 36)  # tokens of the prompt before each cut
NUM_DECODES = 3


def check_exact(
    ops: Ops,
    dtype: torch.dtype,
    linears: Sequence[tuple[int, int]] = ((768, 384), (1536, 96), (192, 50)),
    problems: Sequence[Problem] | None = None,
) -> list[str]:
    """Names of the probes that failed; empty if `ops` is exact. `linears` are (in, out) sizes."""
    rng = torch.Generator().manual_seed(0)
    failed = [f"{name} in {dtype}" for name, probe in _row_probes(ops, dtype, rng) if not rows_agree(probe)]
    for size in sorted(set(linears)):
        if not rows_agree(_linear(ops, dtype, *size, rng)):
            failed.append(f"linear {size[0]} -> {size[1]} in {dtype}")
    for problem in _problems(dtype, rng) if problems is None else problems:
        here = move(problem, ops.device)
        failed += [f"{problem.name} in {dtype}: {what}" for what in mismatches(ops, here, ops.device)]
    return failed


def rows_agree(probe: Callable[[slice], Tensor]) -> bool:
    """Are rows the same whatever the number of rows in the call?

    probe(rows) -> [len(rows), ...], for a slice of 5 TILE rows.
    """
    total = NUM_ROWS[-1]
    expected = torch.cat([probe(slice(start, start + TILE)) for start in range(0, total, TILE)])
    slices = [slice(start, start + n) for n in NUM_ROWS for start in {0, total - n}]
    return all(torch.equal(probe(rows), expected[rows]) for rows in slices)


def mismatches(ops: Ops, problem: Problem, device: torch.device = CPU) -> list[str]:
    """What differs between one sequence by itself in one call, and the same in several calls, other slots and batches.

    The problem's weights are on `device`.
    """
    rng = torch.Generator().manual_seed(1)
    places = ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [8, 9, 10, 11]))
    inputs = ([x.to(device) for x in problem.inputs(PROMPT + NUM_DECODES, rng)] for _ in places)
    alone, *others = (Stream(rows, slot, pages) for rows, (slot, pages) in zip(inputs, places, strict=True))
    expected = _run(ops, problem, alone, cuts=(), others=[], filler=0.0, device=device)
    elsewhere = alone.moved(5, [13, 3, 12, 15])
    failed = []
    for cuts in ((), *CUTS):
        for others_here, company in (([], "alone"), (others, "with others")):
            found = _run(ops, problem, elsewhere, cuts, others_here, float("nan"), device)
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                failed.append(f"cut at tiles {cuts}, {company}")
    if not _resumes(ops, problem, alone, expected, device):
        failed.append("resumed from a captured state")
    if ops.packs and not _takes_cuts(ops, problem, alone, device):
        failed.append(f"a chunk with cuts {OFF_GRID}")
    return failed


def _run(
    ops: Ops,
    problem: Problem,
    stream: Stream,
    cuts: Sequence[int],
    others: Sequence[Stream],
    filler: float,
    device: torch.device,
) -> list[Tensor]:
    """-> outputs of the prompt, of each decode step, and the cache rows at the end."""
    cache = cache_on(device, problem, 16, filler)
    prompt = []
    bounds = [0, *(TILE * cut for cut in cuts), PROMPT]
    for step, (start, end) in enumerate(pairwise(bounds)):
        company = [Piece(other, start, min(end, PROMPT - 5)) for other in others]
        chunks = [*company[:1], Piece(stream, start, end, captures=_captures(start, end)), *company[1:]]
        outputs = run_batch(ops, problem, cache, chunks, padding=float(step))
        prompt.append(outputs[min(1, len(others))])
    steps = []
    for position in range(PROMPT, PROMPT + NUM_DECODES):
        decodes = [*(token(other, position) for other in others), token(stream, position)]
        steps.append(run_batch(ops, problem, cache, [], decodes, padding=1.0)[-1])
    return [torch.cat(prompt), *steps, *_kept(problem, cache, stream)]


def _captures(start: int, end: int) -> tuple[tuple[int, int], ...]:
    """The state at the prompt's second tile boundary goes to slot 9."""
    return ((2 * TILE - start, 9),) if start < 2 * TILE <= end else ()


def _resumes(ops: Ops, problem: Problem, stream: Stream, expected: Sequence[Tensor], device: torch.device) -> bool:
    cache = cache_on(device, problem, 16, float("nan"))
    run_batch(ops, problem, cache, [Piece(stream, 0, PROMPT, captures=((2 * TILE, 9),))])
    found = run_batch(ops, problem, cache, [Piece(stream.moved(9, stream.pages), 2 * TILE, PROMPT)])
    return torch.equal(found[0], expected[0][2 * TILE :])


def _takes_cuts(ops: Ops, problem: Problem, stream: Stream, device: torch.device) -> bool:
    """One call whose tiles end off the grid against several calls, and the states there."""
    whole, parts = (cache_on(device, problem, 16, 0.0) for _ in range(2))
    slots = dict(zip(OFF_GRID, (9, 10), strict=True))
    found = run_batch(ops, problem, whole, [Piece(stream, 0, PROMPT, tuple(slots.items()), OFF_GRID)])[0]
    expected = []
    for start, end in pairwise((0, *OFF_GRID, PROMPT)):
        captures = ((end - start, slots[end]),) if end in slots else ()
        expected += run_batch(ops, problem, parts, [Piece(stream, start, end, captures)])
    return all(torch.equal(a, b) for a, b in zip([found, *whole], [torch.cat(expected), *parts], strict=True))


def _kept(problem: Problem, cache: Sequence[Tensor], stream: Stream) -> list[Tensor]:
    if problem.name == "attention":
        return [pages[stream.pages].flatten(0, 1)[: PROMPT + NUM_DECODES] for pages in cache]
    return [slots[slot] for slots in cache for slot in (stream.slot, 9)]


def _row_probes(ops: Ops, dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[str, Callable[[slice], Tensor]]]:
    device = ops.device
    x = torch.randn(NUM_ROWS[-1], 2 * 104, generator=rng).to(device, dtype)
    weight = torch.rand(2 * 104, generator=rng).to(device, dtype)
    heads = x[:, :192].reshape(-1, 6, 32)
    positions = torch.randint(0, 4000, (len(x),), generator=rng).to(device)
    inv_freq = 1e4 ** -(torch.arange(16, device=device) / 16)
    yield "rms_norm", lambda rows: ops.rms_norm(x[rows], weight, 1e-5)
    yield "silu_mul", lambda rows: ops.silu_mul(x[rows])
    yield "gelu_mul", lambda rows: ops.gelu_mul(x[rows])
    yield "gelu_tanh_mul", lambda rows: ops.gelu_tanh_mul(x[rows])
    yield "rotary", lambda rows: ops.rotary(heads[rows], positions[rows], inv_freq)
    w_in, w_out = (0.1 * torch.randn(5, *size, generator=rng).to(device, dtype) for size in ((96, 208), (208, 48)))
    experts = ops.experts(list(w_in), list(w_out))
    scores = torch.rand(len(x), 5, generator=rng).to(device)
    shares, ids = scores.topk(2)
    yield "experts", lambda rows: experts(x[rows], ids[rows], shares[rows])


def _linear(
    ops: Ops, dtype: torch.dtype, size_in: int, size_out: int, rng: torch.Generator
) -> Callable[[slice], Tensor]:
    block = torch.randn(min(size_out, 512), size_in, generator=rng).to(ops.device, dtype)
    linear = ops.linear(block.repeat(-(-size_out // 512), 1)[:size_out])
    x = torch.randn(NUM_ROWS[-1], size_in, generator=rng).to(ops.device, dtype)
    return lambda rows: linear(x[rows])


def _problems(dtype: torch.dtype, rng: torch.Generator) -> list[Problem]:
    return [
        Mamba2Problem(dtype, rng),
        ConvProblem(dtype, rng),
        Mamba1Problem(dtype, rng),
        LinearAttentionProblem(dtype, rng),
        RgLruProblem(dtype, rng),
        GatedDeltaProblem(dtype),
        KimiDeltaProblem(dtype),
        AttentionProblem(dtype),
    ]
