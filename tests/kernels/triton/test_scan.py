"""Mamba-1 and the RG-LRU in Triton against the reference, and bit for bit against themselves."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hybrid_cache.kernels import reference, selfcheck
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.problems import Mamba1Problem, Piece, RgLruProblem, Stream, run_batch, token
from hybrid_cache.kernels.triton_kernels import scan
from hybrid_cache.kernels.unsupported import UnsupportedShape
from tests.kernels.quick import in_both_dtypes
from tests.kernels.test_against_reference import assert_close, play

# A prompt is always resumed from a captured state too.
CUTS = [(), pytest.param(((1, 2),), marks=pytest.mark.slow)]

# Share of the output's root mean square. Triton's interpreter cuts off what does not fit into bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# A chunk with a capture, one that is resumed for less than a tile, one of one token, and decode rows after them.
CALLS = [
    ([(0, 0, 65, ((64, 8),)), (1, 0, 64, ())], []),
    ([(2, 0, 1, ()), (1, 64, 66, ())], [(0, 65)]),
    ([], [(0, 66), (1, 66), (2, 1)]),
]
SHORT = [([(0, 0, 3, ())], []), ([], [(0, 3)])]

MAMBA1 = {
    "9 channels, state 7": ({"channels": 9, "d_state": 7}, CALLS),
    "40 channels, state 16": ({"channels": 40}, SHORT),
    "24 channels, state 128": ({"channels": 24, "d_state": 128}, SHORT),
}
RG_LRU = {"13 channels": ({"channels": 13}, CALLS), "300 channels": ({"channels": 300}, SHORT)}


class ScanOps:
    """`Ops` as far as these tests go."""

    packs = False
    mamba1_scan = staticmethod(scan.mamba1_scan)
    rg_lru = staticmethod(scan.rg_lru)


def random():
    return torch.Generator().manual_seed(0)


def compare(problem, calls):
    outputs, cache = play(ScanOps, problem, calls)
    expected_outputs, expected_cache = play(reference, problem, calls)
    for found, right in zip(outputs, expected_outputs, strict=True):
        size = right.float().square().mean().sqrt()
        assert (found.float() - right.float()).square().mean().sqrt() <= TOLERANCE[found.dtype] * size
    for found, right in zip(cache, expected_cache, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(MAMBA1), ids=str)
def test_mamba1_agrees_with_the_reference(shape, dtype):
    sizes, calls = MAMBA1[shape]
    compare(Mamba1Problem(dtype, random(), **sizes), calls)


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(RG_LRU), ids=str)
def test_rg_lru_agrees_with_the_reference(shape, dtype):
    sizes, calls = RG_LRU[shape]
    compare(RgLruProblem(dtype, random(), **sizes), calls)


@pytest.mark.parametrize("kind", [Mamba1Problem, RgLruProblem])
def test_half_precision_rows_are_taken(kind):
    compare(kind(torch.float16, random(), channels=9), SHORT)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", [Mamba1Problem, RgLruProblem])
def test_no_bit_depends_on_cuts_company_places_or_unused_memory(kind, cuts, monkeypatch):
    monkeypatch.setattr(selfcheck, "PROMPT", 2 * TILE + 6)
    monkeypatch.setattr(selfcheck, "CUTS", cuts)
    monkeypatch.setattr(selfcheck, "NUM_DECODES", 1)
    assert selfcheck.mismatches(ScanOps, kind(torch.bfloat16, random(), channels=9)) == []


@pytest.mark.parametrize("kind", [Mamba1Problem, RgLruProblem])
def test_rows_of_no_token_come_back_as_zeros(kind):
    problem = kind(torch.float32, random(), channels=9)
    rows = []

    class Watched:
        packs = False

        @staticmethod
        def mamba1_scan(*arguments):
            rows.append(scan.mamba1_scan(*arguments))
            return rows[-1]

        @staticmethod
        def rg_lru(*arguments):
            rows.append(scan.rg_lru(*arguments))
            return rows[-1]

    stream = Stream(problem.inputs(4, random()), 0, [0])
    cache = problem.cache(1, 0.0)
    run_batch(Watched, problem, cache, [Piece(stream, 0, 3)], padding=float("nan"))
    run_batch(Watched, problem, cache, [], [token(stream, 3)], padding=float("nan"))
    assert not rows[0][3:].any()
    assert not rows[1][1:].any()


def test_views_of_wider_rows_are_taken():
    problem = Mamba1Problem(torch.float32, random(), channels=9, d_state=7)
    stream = Stream(problem.inputs(3, random()), 0, [0])

    class Wider:
        packs = False

        @staticmethod
        def mamba1_scan(x, dt, B, C, z, *others):
            parts = [x, dt, B, C, z]
            views = torch.cat(parts, dim=1).split_with_sizes([part.shape[1] for part in parts], dim=1)
            return scan.mamba1_scan(*views, *others)

    found, expected = [], []
    for ops, results in ((Wider, found), (ScanOps, expected)):
        cache = problem.cache(1, 0.0)
        results += run_batch(ops, problem, cache, [Piece(stream, 0, 2)])
        results += run_batch(ops, problem, cache, [], [token(stream, 2)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_of_1024_is_refused():
    problem = Mamba1Problem(torch.float32, random(), channels=2, d_state=1024)
    with pytest.raises(UnsupportedShape, match="a state of 1024"):
        play(ScanOps, problem, SHORT)


@triton.jit
def softplus_kernel(x, y, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    tl.store(y + at, scan.softplus(tl.load(x + at)))


def test_a_small_dt_keeps_its_digits():
    x = torch.tensor([-80.0, -30.0, -16.0, -8.0, -4.0, -2.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 9.0, 19.0, 21.0, 60.0])
    y = torch.empty_like(x)
    softplus_kernel[(1,)](x, y, NUM=len(x))
    torch.testing.assert_close(y.double(), F.softplus(x.double(), threshold=100), rtol=1e-6, atol=0.0)
