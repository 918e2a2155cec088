"""Products with weights against `kernels/reference.py`, and the bits of a row in any company."""

import pytest
import torch

from hybrid_cache.kernels import reference
from hybrid_cache.kernels.triton_kernels import matmul, rows
from hybrid_cache.kernels.triton_kernels.matmul import Block, TritonExperts, TritonLinear
from tests.kernels.test_against_reference import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request):
    return request.param


def silu_mul(x):
    return rows.gated(x, "silu")


def linear_problem(num_rows, size_in, size_out, dtype):
    rng = torch.Generator().manual_seed(size_in)
    x, weight = (torch.randn(n, size_in, generator=rng).to(dtype) for n in (num_rows, size_out))
    return x, weight, torch.randn(size_out, generator=rng).to(dtype)


# rows, inner size, outputs
SIZES = [(1, 100, 36), (70, 256, 130), (64, 17, 300)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_linear_agrees_with_the_reference(size, with_bias, dtype):
    x, weight, bias = linear_problem(*size, dtype)
    bias = bias if with_bias else None
    linear = TritonLinear(weight.to(DEVICE), None if bias is None else bias.to(DEVICE))
    assert (linear.in_features, linear.out_features) == size[1:]
    assert_close(linear(x.to(DEVICE)).cpu(), reference.linear(x, weight, bias))


@pytest.mark.parametrize("block", sorted({b for blocks in matmul.HALF_BLOCKS.values() for b in blocks}, key=str))
def test_each_block_size_computes_the_product(block):
    """Group after group of row blocks; the last ones are not full."""
    x, weight, bias = linear_problem(9 * block.m + 3, 72, block.n + 5, torch.float16)
    found = matmul.multiply(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), block)
    assert_close(found.cpu(), reference.linear(x, weight, bias))


def test_a_view_of_rows_is_multiplied_as_it_is(dtype):
    x, weight, _ = linear_problem(6, 64, 40, dtype)
    wide = torch.cat([x, x], dim=1).to(DEVICE)
    linear = TritonLinear(weight.to(DEVICE), None)
    assert torch.equal(linear(wide[:, 64:]), linear(x.to(DEVICE)))
    assert torch.equal(linear(x.T.contiguous().T.to(DEVICE)), linear(x.to(DEVICE)))


def test_a_row_has_the_same_bits_in_any_company(dtype):
    x, weight, bias = (t.to(DEVICE) for t in linear_problem(200, 200, 72, dtype))
    linear = TritonLinear(weight, bias)
    together = linear(x)
    for part in (slice(0, 1), slice(5, 21), slice(63, 128), slice(196, 200)):
        assert torch.equal(linear(x[part]), together[part])
    x[7] = torch.nan
    found = linear(x)
    assert found[7].isnan().all()
    assert torch.equal(found[8:], together[8:])


def test_more_rows_take_larger_blocks():
    large, medium, small = blocks = (Block(128, 128, 64, 8, 4), Block(64, 128, 64, 4, 4), Block(64, 32, 128, 4, 4))
    assert [matmul.block_for(blocks, n, 4096) for n in (4, 64, 128, 256)] == [small, small, medium, large]
    assert matmul.block_for(blocks, 1, 100) == small
    assert matmul.block_for(blocks, 4, 1 << 17) == large


def experts_problem(num_rows, k, dtype, num_experts=6):
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(num_rows, 48, generator=rng).to(dtype)
    w_in = [0.2 * torch.randn(2 * 40, 48, generator=rng).to(dtype) for _ in range(num_experts)]
    w_out = [0.2 * torch.randn(48, 40, generator=rng).to(dtype) for _ in range(num_experts)]
    shares, ids = torch.rand(num_rows, num_experts, generator=rng).topk(k)
    return x, ids, shares, w_in, w_out


def experts_of(w_in, w_out, act):
    return TritonExperts([w.to(DEVICE) for w in w_in], [w.to(DEVICE) for w in w_out], act)


@pytest.mark.parametrize(("num_rows", "k"), [(1, 1), (70, 2), (9, 5)])
def test_experts_agree_with_the_reference(num_rows, k, dtype):
    x, ids, shares, w_in, w_out = experts_problem(num_rows, k, dtype)
    found = experts_of(w_in, w_out, silu_mul)(*(t.to(DEVICE) for t in (x, ids, shares)))
    assert_close(found.cpu(), reference.experts(x, ids, shares, w_in, w_out))


def test_all_rows_may_choose_the_same_expert():
    x, ids, shares, w_in, w_out = experts_problem(150, 1, torch.float32)
    ids[:] = 4
    found = experts_of(w_in, w_out, silu_mul)(*(t.to(DEVICE) for t in (x, ids, shares)))
    assert_close(found.cpu(), reference.experts(x, ids, shares, w_in, w_out))


def test_another_activation_agrees_with_the_reference():
    x, ids, shares, w_in, w_out = experts_problem(9, 2, torch.float32)
    w_in = [w[:40].contiguous() for w in w_in]
    found = experts_of(w_in, w_out, torch.relu)(*(t.to(DEVICE) for t in (x, ids, shares)))
    assert_close(found.cpu(), reference.experts(x, ids, shares, w_in, w_out, torch.relu))


def test_a_row_of_experts_has_the_same_bits_in_any_company(dtype):
    x, ids, shares, w_in, w_out = experts_problem(70, 2, dtype)
    experts = experts_of(w_in, w_out, silu_mul)
    together = experts(*(t.to(DEVICE) for t in (x, ids, shares)))
    for part in (slice(0, 1), slice(5, 21), slice(66, 70)):
        assert torch.equal(experts(*(t[part].to(DEVICE) for t in (x, ids, shares))), together[part])
    assert experts(x[:0].to(DEVICE), ids[:0].to(DEVICE), shares[:0].to(DEVICE)).shape == (0, 48)
