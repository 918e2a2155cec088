"""Mamba-2 and linear attention in Triton against the reference, and bit for bit against themselves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybrid_cache.kernels import reference, selfcheck
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.problems import LinearAttentionProblem, Mamba2Problem, Piece, Stream, run_batch, token
from hybrid_cache.kernels.runs import arrange
from hybrid_cache.kernels.triton_kernels import ssd
from hybrid_cache.kernels.unsupported import UnsupportedShape
from tests.kernels.quick import in_both_dtypes
from tests.kernels.test_against_reference import assert_close, play

# A prompt is always resumed from a captured state too.
CUTS = [(), pytest.param(((1, 2),), marks=pytest.mark.slow)]

SMALL = {"num_heads": 2, "head_dim": 16, "d_state": 16}

# One chunk with captures, one resumed for less than a window, one of one token, and decode rows after each of them.
CALLS = [
    ([(0, 0, 129, ((64, 8), (128, 9))), (1, 0, 64, ())], []),
    ([(2, 0, 1, ()), (1, 64, 66, ())], [(0, 129)]),
    ([], [(0, 130), (1, 66), (2, 1)]),
]
ONE_CHUNK = [([(0, 0, 66, ((64, 8),))], []), ([], [(0, 66)])]

HEAD_24 = {"num_heads": 2, "head_dim": 24, "d_state": 20, "width": 3, "bias": False, "dt_min": 0.02, "dt_max": 0.1}
MAMBA2 = {
    "small, float32": (torch.float32, SMALL, ONE_CHUNK),
    "small": (torch.bfloat16, SMALL, CALLS),
    "head 64, state 128": (torch.bfloat16, {"num_heads": 1, "head_dim": 64, "d_state": 128}, ONE_CHUNK),
    "head 128, state 16": (torch.bfloat16, {"num_heads": 1, "head_dim": 128, "d_state": 16}, ONE_CHUNK),
    "head 8, state 80": (torch.bfloat16, {"num_heads": 1, "head_dim": 8, "d_state": 80}, ONE_CHUNK),
    "2 groups, 2 norms": (
        torch.bfloat16,
        {"num_heads": 4, "d_state": 16, "num_groups": 2, "norm_groups": 2},
        ONE_CHUNK,
    ),
    "head 24, width 3, clamped dt, float32": (torch.float32, HEAD_24, ONE_CHUNK),
    "without norm": (torch.bfloat16, {"num_heads": 2, "head_dim": 20, "d_state": 16, "norm": False}, ONE_CHUNK),
    "norm first": (torch.bfloat16, {**SMALL, "norm_groups": 2, "norm_first": True}, ONE_CHUNK),
}
LINEAR_ATTENTION = {
    "small": ({"num_heads": 2}, CALLS),
    "3 heads, 7 to 20": ({"num_heads": 3, "head_dim": 20, "d_state": 7}, ONE_CHUNK),
    "head 128, state 128": ({"num_heads": 1, "head_dim": 128, "d_state": 128}, ONE_CHUNK),
}


class SsdOps:
    """`Ops` as far as these tests go."""

    packs = False
    mamba2 = staticmethod(ssd.mamba2)
    linear_attention = staticmethod(ssd.linear_attention)


def random():
    return torch.Generator().manual_seed(0)


def compare(problem, calls):
    outputs, cache = play(SsdOps, problem, calls)
    expected_outputs, expected_cache = play(reference, problem, calls)
    for found, right in zip([*outputs, *cache], [*expected_outputs, *expected_cache], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("case", MAMBA2)
def test_mamba2_agrees_with_the_reference(case):
    dtype, sizes, calls = MAMBA2[case]
    compare(Mamba2Problem(dtype, random(), **sizes), calls)


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(LINEAR_ATTENTION), ids=str)
def test_linear_attention_agrees_with_the_reference(shape, dtype):
    sizes, calls = LINEAR_ATTENTION[shape]
    compare(LinearAttentionProblem(dtype, random(), **sizes), calls)


@pytest.mark.parametrize("kind", [Mamba2Problem, LinearAttentionProblem])
def test_half_precision_rows_are_taken(kind):
    problem = kind(torch.float16, random(), **SMALL)
    outputs, cache = play(SsdOps, problem, ONE_CHUNK)
    expected_outputs, expected_cache = play(reference, problem, ONE_CHUNK)
    for found, right in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-3)
    assert_close(cache[-1], expected_cache[-1])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", [Mamba2Problem, LinearAttentionProblem])
def test_no_bit_depends_on_cuts_company_places_or_unused_memory(kind, cuts, monkeypatch):
    monkeypatch.setattr(selfcheck, "PROMPT", 2 * TILE + 9)
    monkeypatch.setattr(selfcheck, "CUTS", cuts)
    monkeypatch.setattr(selfcheck, "NUM_DECODES", 1)
    sizes = {**SMALL, "num_heads": 1}
    assert selfcheck.mismatches(SsdOps, kind(torch.bfloat16, random(), **sizes)) == []


def test_a_small_dt_keeps_its_digits():
    raw = torch.tensor([[-30.0, -16.0, -12.0, -5.0, -1.0, 0.0, 3.0, 19.0, 21.0, 60.0]])
    weights = Mamba2Problem(torch.float32, random(), num_heads=10, head_dim=1, d_state=1).weights
    weights = replace(weights, dt_bias=torch.zeros(10))
    layout, _ = arrange([Piece(Stream([raw], 0, [0]), 0, 1).run(False)], [])
    dt, _, num_rows = ssd._decays(raw, weights, weights.A, layout, 10)
    assert num_rows.tolist() == [1]
    torch.testing.assert_close(dt[0, :, 0].double(), F.softplus(raw[0].double()), rtol=1e-6, atol=0.0)
    assert not dt[0, :, 1:].any()


def test_views_of_wider_rows_are_taken():
    problem = LinearAttentionProblem(torch.float32, random(), num_heads=2)
    stream = Stream(problem.inputs(3, random()), 0, [0])

    class Wider:
        packs = False

        @staticmethod
        def linear_attention(q, k, v, *others):
            q, k, v = torch.cat([q, k, v], dim=2).split([q.shape[2], k.shape[2], v.shape[2]], dim=2)
            return ssd.linear_attention(q, k, v, *others)

    found, expected = [], []
    for ops, results in ((Wider, found), (SsdOps, expected)):
        cache = problem.cache(1, 0.0)
        results += run_batch(ops, problem, cache, [Piece(stream, 0, 2)])
        results += run_batch(ops, problem, cache, [], [token(stream, 2)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_width_is_refused():
    problem = Mamba2Problem(torch.float32, random(), **SMALL, width=9)
    stream = Stream(problem.inputs(1, random()), 0, [0])
    with pytest.raises(UnsupportedShape, match="over 9 rows"):
        run_batch(SsdOps, problem, problem.cache(1, 0.0), [Piece(stream, 0, 1)])
