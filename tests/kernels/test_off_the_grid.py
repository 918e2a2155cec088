"""Chunks that start anywhere, and tiles that end anywhere, as choreographies have them.

Other tiles give the same results, if not the same bits. The same tiles give the same bits, in one chunk or in several.
"""

from itertools import pairwise

import pytest
import torch

from hybrid_cache.kernels import native_products, reference
from hybrid_cache.kernels.problems import AttentionProblem, Piece, Stream, run_batch, token
from tests.kernels.test_against_reference import assert_close

CUTS = [(0, 37, 120, 131), (0, 64, 65, 128, 131), (0, 3, 131), (0, 1, 2, 131)]
FIRST_CAPTURE = 4


def pieces_of(ops, problem, stream, cuts):
    """-> all rows, computed piece by piece, then one decode row."""
    cache, rows = problem.cache(4, float("nan")), []
    for start, end in pairwise(cuts):
        rows += run_batch(ops, problem, cache, [Piece(stream, start, end)])
    rows += run_batch(ops, problem, cache, [], [token(stream, cuts[-1])])
    return torch.cat(rows)


def one_chunk(ops, problem, stream, cuts, company=()):
    """-> all rows, from a chunk with cuts, and the cache, with the states captured at the cuts and at the end."""
    captures = tuple((end, FIRST_CAPTURE + i) for i, end in enumerate(cuts[1:]))
    cache = problem.cache(10, float("nan"))
    chunk = Piece(stream, 0, cuts[-1], captures, cuts[1:-1])
    return run_batch(ops, problem, cache, [*company, chunk])[-1], cache


def chunk_by_chunk(ops, problem, stream, cuts):
    """The same from a call for each part."""
    cache, rows = problem.cache(10, 0.0), []
    for i, (start, end) in enumerate(pairwise(cuts)):
        captures = ((end - start, FIRST_CAPTURE + i),)
        rows += run_batch(ops, problem, cache, [Piece(stream, start, end, captures)])
    return torch.cat(rows), cache


def kept(problem, stream, cache, cuts):
    """What the cache holds of a stream, and of the states captured."""
    if problem.name == "attention":
        return [pages[stream.pages].flatten(0, 1)[: cuts[-1]] for pages in cache]
    slots = [stream.slot, *range(FIRST_CAPTURE, FIRST_CAPTURE + len(cuts) - 1)]
    return [states[slots] for states in cache]


@pytest.fixture
def packing(ops):
    if not ops.packs:
        pytest.skip("its chunks have no cuts")
    return ops


@pytest.fixture(scope="module")
def whole_prompts():
    """What the reference said, by shape and dtype: it is slow, and the same for all backends and cuts."""
    return {}


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_prompt_may_be_cut_anywhere(ops, problem, shape, dtype, cuts, whole_prompts):
    stream = Stream(problem.inputs(132, torch.Generator().manual_seed(6)), 0, [2, 0, 3])
    if (shape, dtype) not in whole_prompts:
        whole_prompts[shape, dtype] = pieces_of(reference, problem, stream, (0, 131))
    assert_close(pieces_of(ops, problem, stream, cuts), whole_prompts[shape, dtype])


@pytest.mark.parametrize("window", [20, 64, 100])
def test_windows_reach_over_cuts_anywhere(ops, dtype, window):
    problem = AttentionProblem(dtype, window=window)
    stream = Stream(problem.inputs(132, torch.Generator().manual_seed(7)), 0, [2, 0, 3])
    whole = pieces_of(reference, problem, stream, (0, 131))
    assert_close(pieces_of(ops, problem, stream, (0, 37, 120, 131)), whole)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_chunk_with_cuts_agrees_with_the_reference(packing, problem, cuts):
    stream = Stream(problem.inputs(131, torch.Generator().manual_seed(8)), 0, [2, 0, 3])
    rows, cache = one_chunk(packing, problem, stream, cuts)
    expected_rows, expected_cache = one_chunk(reference, problem, stream, cuts)
    for found, right in zip([rows, *cache], [expected_rows, *expected_cache], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("cuts", [*CUTS, (0, 131), (0, 100, 300), (0, 63, 127, 192, 193)], ids=str)
def test_a_chunk_with_cuts_has_the_bits_of_its_parts(packing, problem, cuts):
    rng = torch.Generator().manual_seed(9)
    stream, other = (Stream(problem.inputs(300, rng), 0, [2, 0, 3, 9, 6]) for _ in range(2))
    company = [Piece(other.moved(1, [5, 4]), 0, 77, cuts=(5, 70))]
    rows, cache = one_chunk(packing, problem, stream, cuts, company)
    elsewhere = stream.moved(2, [7, 9, 8, 0, 1])
    expected_rows, expected_cache = chunk_by_chunk(packing, problem, elsewhere, cuts)
    assert torch.equal(rows, expected_rows)
    states, expected_states = kept(problem, stream, cache, cuts), kept(problem, elsewhere, expected_cache, cuts)
    assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))


@pytest.mark.parametrize("start", [100, 164])
def test_a_state_captured_at_a_cut_is_resumed_from(packing, problem, start):
    stream = Stream(problem.inputs(200, torch.Generator().manual_seed(10)), 0, [2, 0, 3, 1])
    cache = problem.cache(10, float("nan"))
    rows = run_batch(packing, problem, cache, [Piece(stream, 0, 200, ((start, FIRST_CAPTURE),), cuts=(100,))])[0]
    resumed = stream.moved(FIRST_CAPTURE, stream.pages)
    assert torch.equal(run_batch(packing, problem, cache, [Piece(resumed, start, 200)])[0], rows[start:])


def test_cuts_and_threads_change_no_bit(packing, problem, threads, monkeypatch):
    monkeypatch.setattr(native_products, "MIN_VALUES_FOR_THREADS", 0)
    stream = Stream(problem.inputs(300, torch.Generator().manual_seed(11)), 0, [2, 0, 3, 9, 6])
    cuts = (0, 37, 120, 200, 300)
    rows, cache = one_chunk(packing, problem, stream, cuts)
    torch.set_num_threads(1)
    expected_rows, expected_cache = chunk_by_chunk(packing, problem, stream, cuts)
    assert torch.equal(rows, expected_rows)
    states, expected_states = kept(problem, stream, cache, cuts), kept(problem, stream, expected_cache, cuts)
    assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))
