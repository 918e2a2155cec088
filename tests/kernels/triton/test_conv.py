"""The convolution in Triton against the reference, and bit for bit against itself."""

import pytest
import torch

from hybrid_cache.kernels import reference, selfcheck
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.problems import ConvProblem, Piece, Stream, run_batch, token
from hybrid_cache.kernels.triton_kernels import conv
from hybrid_cache.kernels.unsupported import UnsupportedShape
from tests.kernels.quick import in_both_dtypes
from tests.kernels.test_against_reference import BATCHES, assert_close, play


class ConvOps:
    """`Ops` as far as these tests go."""

    packs = False
    causal_conv = staticmethod(conv.causal_conv)


SHAPES = {
    "width 4": {},
    "width 2, no bias": {"width": 2, "channels": 7, "bias": False},
    "width 3, no activation": {"width": 3, "activation": False},
    "width 8, two blocks of channels": {"width": 8, "channels": 70},
}
# Captures, a chunk shorter than a window after a fresh one and after a resumed one, decode rows after each of them.
MIXED = [
    ([(0, 0, 129, ((64, 8), (128, 9))), (1, 0, 64, ())], []),
    ([(2, 0, 1, ()), (1, 64, 66, ())], [(0, 129)]),
    ([], [(0, 130), (1, 66), (2, 1)]),
]


def problem_of(shape, dtype):
    return ConvProblem(dtype, torch.Generator().manual_seed(0), **SHAPES[shape])


def compare(problem, calls):
    outputs, cache = play(ConvOps, problem, calls)
    expected_outputs, expected_cache = play(reference, problem, calls)
    for found, right in zip([*outputs, *cache], [*expected_outputs, *expected_cache], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("batch", BATCHES)
def test_all_batches_agree_with_the_reference(batch):
    compare(problem_of("width 4", torch.float32), BATCHES[batch])


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(SHAPES), ids=str)
def test_all_shapes_agree_with_the_reference(shape, dtype):
    compare(problem_of(shape, dtype), MIXED)


def test_no_bit_depends_on_cuts_company_places_or_unused_memory(monkeypatch):
    monkeypatch.setattr(selfcheck, "CUTS", ((1, 3),))
    assert selfcheck.mismatches(ConvOps, problem_of("width 4", torch.bfloat16)) == []


def test_windows_hold_the_rows_themselves():
    problem = problem_of("width 8, two blocks of channels", torch.bfloat16)
    stream = Stream(problem.inputs(80, torch.Generator().manual_seed(1)), 1, [0, 1])
    rows = stream.inputs[0]
    cache = problem.cache(4, float("nan"))
    run_batch(ConvOps, problem, cache, [Piece(stream, 0, TILE + 3, ((TILE, 2),))])
    assert torch.equal(cache[0][1], rows[TILE + 3 - 7 : TILE + 3])
    assert torch.equal(cache[0][2], rows[TILE - 7 : TILE])
    assert cache[0][0].isnan().all()
    run_batch(ConvOps, problem, cache, [], [token(stream, TILE + 3)])
    assert torch.equal(cache[0][1], rows[TILE + 4 - 7 : TILE + 4])


def test_a_view_of_wider_rows_is_taken():
    problem = problem_of("width 4", torch.float32)
    stream = Stream(problem.inputs(70, torch.Generator().manual_seed(1)), 0, [0, 1])

    class Wider:
        packs = False

        @staticmethod
        def causal_conv(x, *others):
            return conv.causal_conv(torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]], *others)

    pieces = [Piece(stream, 0, 70)]
    found, expected = (run_batch(ops, problem, problem.cache(1, 0.0), pieces) for ops in (Wider, ConvOps))
    assert torch.equal(*found, *expected)


@pytest.mark.parametrize("width", [1, 9])
def test_other_widths_are_refused(width):
    problem = ConvProblem(torch.float32, torch.Generator().manual_seed(0), width=width)
    stream = Stream(problem.inputs(1, torch.Generator().manual_seed(1)), 0, [0])
    with pytest.raises(UnsupportedShape, match=f"over {width} rows"):
        run_batch(ConvOps, problem, problem.cache(1, 0.0), [Piece(stream, 0, 1)])
