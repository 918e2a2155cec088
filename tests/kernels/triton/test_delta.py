"""The delta rule in Triton against the reference, and bit for bit against itself."""

import pytest
import torch

from hybrid_cache.kernels import reference, selfcheck
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.problems import GatedDeltaProblem, KimiDeltaProblem, Piece, Stream, run_batch, token
from hybrid_cache.kernels.triton_kernels import delta
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
ONE_CHUNK = [([(0, 0, 66, ((64, 8),))], []), ([], [(0, 66)])]
SHORT = [([(0, 0, 35, ())], []), ([], [(0, 35)])]

GATED = {
    "2 heads of a group": ({"num_heads": 2, "num_groups": 1}, CALLS),
    "head 128, state 128": ({"num_heads": 1, "num_groups": 1, "head_dim": 128, "d_state": 128}, SHORT),
    "head 24, state 7": ({"num_heads": 1, "num_groups": 1, "d_state": 7}, SHORT),
    "beta 2": ({"num_heads": 4, "head_dim": 10, "d_state": 20, "max_beta": 2.0}, ONE_CHUNK),
}
KIMI = {
    "head 24, state 16": ({"num_heads": 1}, CALLS),
    "head 40, state 128": ({"num_heads": 1, "head_dim": 40, "d_state": 128}, SHORT),
    "forgets all": ({"num_heads": 2, "head_dim": 9, "d_state": 20, "most": 300.0}, ONE_CHUNK),
}
ONE_HEAD = {GatedDeltaProblem: {"num_heads": 1, "num_groups": 1}, KimiDeltaProblem: {"num_heads": 1}}


class DeltaOps:
    """`Ops` as far as these tests go."""

    packs = False
    gated_delta = staticmethod(delta.gated_delta)
    kimi_delta = staticmethod(delta.kimi_delta)


def compare(problem, calls):
    outputs, cache = play(DeltaOps, problem, calls)
    expected_outputs, expected_cache = play(reference, problem, calls)
    for found, right in zip(outputs, expected_outputs, strict=True):
        size = right.float().square().mean().sqrt()
        assert (found.float() - right.float()).square().mean().sqrt() <= TOLERANCE[found.dtype] * size
    for found, right in zip(cache, expected_cache, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(GATED), ids=str)
def test_gated_delta_agrees_with_the_reference(shape, dtype):
    sizes, calls = GATED[shape]
    compare(GatedDeltaProblem(dtype, **sizes), calls)


@pytest.mark.parametrize(("shape", "dtype"), in_both_dtypes(KIMI), ids=str)
def test_kimi_delta_agrees_with_the_reference(shape, dtype):
    sizes, calls = KIMI[shape]
    compare(KimiDeltaProblem(dtype, **sizes), calls)


@pytest.mark.parametrize("kind", ONE_HEAD)
def test_half_precision_rows_are_taken(kind):
    compare(kind(torch.float16, **ONE_HEAD[kind]), SHORT)


@pytest.mark.parametrize("cuts", CUTS)
# In the interpreter Kimi's kernel takes four times as long; its programs see as little of each other.
@pytest.mark.parametrize("kind", [GatedDeltaProblem, pytest.param(KimiDeltaProblem, marks=pytest.mark.slow)])
def test_no_bit_depends_on_cuts_company_places_or_unused_memory(kind, cuts, monkeypatch):
    monkeypatch.setattr(selfcheck, "PROMPT", 2 * TILE + 6)
    monkeypatch.setattr(selfcheck, "CUTS", cuts)
    monkeypatch.setattr(selfcheck, "NUM_DECODES", 1)
    assert selfcheck.mismatches(DeltaOps, kind(torch.bfloat16, **ONE_HEAD[kind])) == []


def test_equal_keys_with_a_beta_of_2_stay_finite():
    """The triangular matrix is all twos; each token turns the state's sign along the key."""
    problem = GatedDeltaProblem(torch.float32, **ONE_HEAD[GatedDeltaProblem])
    q, k, v, g, beta = problem.inputs(TILE, torch.Generator().manual_seed(0))
    inputs = [q, k[:1].expand(k.shape).clone(), v, torch.zeros_like(g), torch.full_like(beta, 2.0)]
    results = []
    for ops in (DeltaOps, reference):
        cache = problem.cache(1, 0.0)
        results.append([*run_batch(ops, problem, cache, [Piece(Stream(inputs, 0, [0]), 0, TILE)]), *cache])
    for found, right in zip(*results, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("kind", ONE_HEAD)
def test_rows_of_no_token_come_back_as_zeros(kind):
    problem = kind(torch.float32, **ONE_HEAD[kind])
    rows = []

    def watched(operation):
        def run(*arguments):
            rows.append(operation(*arguments))
            return rows[-1]

        return staticmethod(run)

    class Watched:
        packs = False
        gated_delta = watched(delta.gated_delta)
        kimi_delta = watched(delta.kimi_delta)

    stream = Stream(problem.inputs(4, torch.Generator().manual_seed(0)), 0, [0])
    cache = problem.cache(1, 0.0)
    run_batch(Watched, problem, cache, [Piece(stream, 0, 3)], padding=float("nan"))
    run_batch(Watched, problem, cache, [], [token(stream, 3)], padding=float("nan"))
    assert not rows[0][3:].any()
    assert not rows[1][1:].any()


def test_views_of_wider_rows_are_taken():
    problem = GatedDeltaProblem(torch.float32, num_heads=2, num_groups=1)
    stream = Stream(problem.inputs(3, torch.Generator().manual_seed(0)), 0, [0])

    class Wider:
        packs = False

        @staticmethod
        def gated_delta(q, k, v, g, *others):
            flat = [part.flatten(1) for part in (q, k, v, g)]
            views = torch.cat(flat, dim=1).split_with_sizes([part.shape[1] for part in flat], dim=1)
            views = [view.view(part.shape) for view, part in zip(views, (q, k, v, g), strict=True)]
            return delta.gated_delta(*views, *others)

    found, expected = [], []
    for ops, results in ((Wider, found), (DeltaOps, expected)):
        cache = problem.cache(1, 0.0)
        results += run_batch(ops, problem, cache, [Piece(stream, 0, 2)])
        results += run_batch(ops, problem, cache, [], [token(stream, 2)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_of_512_is_refused():
    problem = GatedDeltaProblem(torch.float32, num_heads=1, num_groups=1, d_state=512)
    with pytest.raises(UnsupportedShape, match="keys of 512"):
        play(DeltaOps, problem, SHORT)
