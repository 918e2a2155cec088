"""Chunks that start anywhere, as choreographies have them: the same results, if not the same bits."""

from itertools import pairwise

import pytest
import torch

from hybrid_cache.kernels import reference
from hybrid_cache.kernels.problems import AttentionProblem, Piece, Stream, run_batch, token
from tests.kernels.test_against_reference import assert_close

CUTS = [(0, 37, 120, 131), (0, 64, 65, 128, 131), (0, 3, 131), (0, 1, 2, 131)]


def pieces_of(ops, problem, stream, cuts):
    """-> all rows, computed piece by piece, then one decode row."""
    cache, rows = problem.cache(4, float("nan")), []
    for start, end in pairwise(cuts):
        rows += run_batch(ops, problem, cache, [Piece(stream, start, end)])
    rows += run_batch(ops, problem, cache, [], [token(stream, cuts[-1])])
    return torch.cat(rows)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_prompt_may_be_cut_anywhere(ops, problem, cuts):
    stream = Stream(problem.inputs(132, torch.Generator().manual_seed(6)), 0, [2, 0, 3])
    whole = pieces_of(reference, problem, stream, (0, 131))
    assert_close(pieces_of(ops, problem, stream, cuts), whole)


@pytest.mark.parametrize("window", [20, 64, 100])
def test_windows_reach_over_cuts_anywhere(ops, dtype, window):
    problem = AttentionProblem(dtype, window=window)
    stream = Stream(problem.inputs(132, torch.Generator().manual_seed(7)), 0, [2, 0, 3])
    whole = pieces_of(reference, problem, stream, (0, 131))
    assert_close(pieces_of(ops, problem, stream, (0, 37, 120, 131)), whole)
