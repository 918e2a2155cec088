"""Each backend against `kernels/reference.py`, over a table of batches and a table of shapes."""

import pytest
import torch

from hybrid_cache.kernels import reference
from hybrid_cache.kernels.problems import Piece, Stream, run_batch, token

# Share of the output's root mean square. float32: sums of up to a few hundred terms in another order, each step
# rounding at 6e-8. bfloat16: the result is rounded at 2^-9 = 2e-3, and a backend may round an intermediate once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}

# name -> calls; a call is (chunks, decodes); a chunk is (stream, start, end, captures), a decode (stream, position)
BATCHES = {
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


def streams_of(problem):
    """Pages are spread over the pool in no order."""
    rng = torch.Generator().manual_seed(3)
    pages = torch.randperm(20, generator=rng).tolist()
    return [Stream(problem.inputs(140, rng), slot, pages[4 * slot : 4 * slot + 4]) for slot in range(5)]


def play(ops, problem, calls):
    """-> the output of each piece of each call, and the cache at the end. What nobody wrote stays NaN."""
    streams, cache = streams_of(problem), problem.cache(20, float("nan"))
    outputs = []
    for chunks, decodes in calls:
        pieces = [Piece(streams[i], start, end, captures) for i, start, end, captures in chunks]
        outputs += run_batch(ops, problem, cache, pieces, [token(streams[i], at) for i, at in decodes])
    return outputs, cache


def assert_close(found, expected):
    written = ~expected.isnan()
    assert torch.equal(~found.isnan(), written)
    if written.any():
        error, size = ((t[written].double()).square().mean().sqrt() for t in (found - expected, expected))
        assert error <= TOLERANCE[found.dtype] * size + 1e-12


@pytest.fixture(scope="module")
def expected():
    """What the reference said, by shape and dtype: it is slow, and all backends are held against the same."""
    return {}


def test_a_backend_agrees_with_the_reference(ops, problem, shape, dtype, expected):
    if (shape, dtype) not in expected:
        expected[shape, dtype] = [play(reference, problem, calls) for calls in BATCHES.values()]
    for calls, (expected_outputs, expected_cache) in zip(BATCHES.values(), expected[shape, dtype], strict=True):
        outputs, cache = play(ops, problem, calls)
        for found, right in zip([*outputs, *cache], [*expected_outputs, *expected_cache], strict=True):
            assert_close(found, right)


ROWS = 70


@pytest.mark.parametrize("width", [6, 64, 200, 1536])
def test_operations_on_rows_agree_with_the_reference(ops, dtype, width):
    rng = torch.Generator().manual_seed(width)
    x = (3 * torch.randn(ROWS, width, generator=rng)).to(dtype)
    weight = torch.rand(width, generator=rng).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_close(ops.silu_mul(x), reference.silu_mul(x))
    assert_close(ops.gelu_mul(x), reference.gelu_mul(x))
    assert_close(ops.gelu_tanh_mul(x), reference.gelu_tanh_mul(x))
    view = torch.cat([x, x], dim=1)[:, 3 : 3 + width]
    assert_close(ops.rms_norm(view, weight, 1e-5), reference.rms_norm(view, weight, 1e-5))


@pytest.mark.parametrize("head_dim", [2, 16, 20, 64, 128])
def test_rotary_agrees_with_the_reference(ops, dtype, head_dim):
    rng = torch.Generator().manual_seed(head_dim)
    x = torch.randn(ROWS, 5, head_dim, generator=rng).to(dtype)[:, :4]
    positions = torch.randint(0, 5000, (ROWS,), generator=rng)
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    found = ops.rotary(x, positions, inv_freq)
    assert_close(found, reference.rotary(x, positions, inv_freq))


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_agrees_with_the_reference(ops, dtype, with_bias):
    rng = torch.Generator().manual_seed(1)
    x, weight = torch.randn(ROWS, 100, generator=rng).to(dtype), torch.randn(36, 100, generator=rng).to(dtype)
    bias = torch.randn(36, generator=rng).to(dtype) if with_bias else None
    linear = ops.linear(weight, bias)
    assert (linear.in_features, linear.out_features) == (100, 36)
    assert_close(linear(x), reference.linear(x, weight, bias))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_agree_with_the_reference(ops, dtype, k):
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(ROWS, 48, generator=rng).to(dtype)
    w_in = [0.2 * torch.randn(2 * 40, 48, generator=rng).to(dtype) for _ in range(6)]
    w_out = [0.2 * torch.randn(48, 40, generator=rng).to(dtype) for _ in range(6)]
    shares, ids = torch.rand(ROWS, 6, generator=rng).topk(k)
    found = ops.experts(w_in, w_out)(x, ids, shares)
    assert_close(found, reference.experts(x, ids, shares, w_in, w_out))


def test_experts_with_another_activation_agree_with_the_reference(ops, dtype):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 48, generator=rng).to(dtype)
    w_in = [0.2 * torch.randn(40, 48, generator=rng).to(dtype) for _ in range(6)]
    w_out = [0.2 * torch.randn(48, 40, generator=rng).to(dtype) for _ in range(6)]
    shares, ids = torch.rand(ROWS, 6, generator=rng).topk(2)
    found = ops.experts(w_in, w_out, torch.relu)(x, ids, shares)
    assert_close(found, reference.experts(x, ids, shares, w_in, w_out, torch.relu))
