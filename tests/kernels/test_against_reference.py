"""Each backend against `kernels/reference.py`, over a table of batches and a table of shapes."""

import pytest
import torch

from hybrid_cache.kernels import reference
from hybrid_cache.kernels.parity import BATCHES, TOLERANCE, difference, play


def assert_close(found, expected):
    assert difference(found, expected) <= TOLERANCE[found.dtype]


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
