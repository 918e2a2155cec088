"""What the C code promises beyond `test_exactness.py`: bits do not depend on threads, nor on how rows lie in memory."""

import pytest
import torch

from hybrid_cache.kernels import native_ops
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.parity import BATCHES, play
from hybrid_cache.kernels.runs import Run, arrange
from tests.kernels.compiler import compiler_needed

pytestmark = compiler_needed


class Views:
    """A problem whose rows come as parts of wider rows, or, with `turned`, with columns that lie apart."""

    def __init__(self, problem, turned):
        self._problem, self._turned = problem, turned
        self.name, self.inputs, self.cache = problem.name, problem.inputs, problem.cache

    def apply(self, ops, inputs, layout, cache):
        return self._problem.apply(ops, [self._view(x) for x in inputs], layout, cache)

    def _view(self, x):
        if self._turned:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(problem):
    """Outputs and cache; what nobody wrote is NaN, and then -1."""
    outputs, cache = play(NativeOps(), problem, BATCHES["prefill and decode"])
    return [x.nan_to_num(nan=-1.0) for x in (*outputs, *cache)]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_any_number_of_threads_gives_the_same_bits(problem, num_threads, monkeypatch):
    monkeypatch.setattr(native_ops, "MIN_VALUES_FOR_THREADS", 0)
    num_threads(1)
    alone = bits(problem)
    num_threads(3)
    assert same(bits(problem), alone)


@pytest.mark.parametrize("turned", [False, True], ids=["parts", "turned"])
def test_rows_may_be_views(problem, turned):
    assert same(bits(Views(problem, turned)), bits(problem))


def test_rows_of_no_token_come_out_as_zeros(problem):
    """Padding behind a chunk of 70 tokens, and behind a decode row."""
    layout, _ = arrange([Run(0, 70, 0, 0, True, [0, 1], [])], [Run(0, 1, 64, 1, False, [2, 3], [])], packed=False)
    cache = problem.cache(4, 0.0)
    inputs = problem.inputs(layout.num_rows, torch.Generator().manual_seed(6))
    for x in inputs:
        x[70:128] = float("nan")
    out = problem.apply(NativeOps(), inputs, layout, cache)
    assert out[:70].isfinite().all()
    assert out[128].isfinite().all()
    assert not out[70:128].any()
