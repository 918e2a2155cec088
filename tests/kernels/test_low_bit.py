"""Products with weights of 4 and 8 bits: their values, and that a row's bits do not depend on its neighbours."""

import pytest
import torch
from torch.testing import assert_close

from hybrid_cache.kernels import native_products
from hybrid_cache.kernels.codes import GROUP, Coded, can_code, coded, joined
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.native_products import NativeLinear
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.kernels.compiler import compiler_needed

SHAPES = [(1, 32), (64, 32), (100, 96), (130, 2080), (700, 256)]
BOUND = {4: 0.1, 8: 0.01}  # relative, of what is rounded


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_codes(bits, out, inputs, seed=0):
    """Every code, and scales of both signs, zero, and the smallest and largest there are."""
    half, rng = 1 << bits - 1, torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (out, inputs), generator=rng).to(torch.int8)
    scales = torch.randn(out, inputs // GROUP, generator=rng).half() / half
    scales.view(-1)[::7] = 0
    scales.view(-1)[1::11] = 2**-24
    return Coded(bits, codes, scales)


def ops_with_low_bits():
    ops = NativeOps()
    if not ops._has_low_bit:
        pytest.skip("needs AVX512-BF16 and VBMI")
    return ops


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_rounded_to_the_nearest_code(bits, shape):
    weight = drawn(*shape)
    found = coded(weight, bits)
    half = 1 << bits - 1
    assert found.codes.min() >= -half
    assert found.codes.max() <= half - 1
    error = (found.decoded() - weight).abs().view(shape[0], -1, GROUP)
    step = found.scales.float().abs()[:, :, None]
    assert bool((error <= 1.001 * step).all())  # the code above the highest is not there
    assert error.norm() <= BOUND[bits] * weight.norm()
    again = coded(found.decoded(), bits)
    assert torch.equal(again.decoded(), found.decoded())


def test_zeros_stay_zeros_and_what_scales_cannot_hold_is_refused():
    assert not coded(torch.zeros(3, 64), 4).decoded().any()
    with pytest.raises(ValueError, match="1e\\+09 are beyond scales"):
        coded(torch.full((1, 32), 1e9), 4)
    with pytest.raises(ValueError, match=r"\[2, 33\].*multiple of 32"):
        coded(torch.zeros(2, 33), 4)
    assert not can_code((2, 33))
    assert not can_code((0, 32))
    assert not can_code((2, 2, 32))


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_joined_as_codes_where_all_are_of_one_kind(bits):
    parts = [any_codes(bits, n, 64, seed=n) for n in (3, 70)]
    whole = joined(parts)
    assert isinstance(whole, Coded)
    assert torch.equal(whole.decoded(), torch.cat([part.decoded() for part in parts]))
    mixed = joined([parts[0], drawn(2, 64).bfloat16()])
    assert isinstance(mixed, torch.Tensor)
    assert mixed.dtype is torch.bfloat16
    assert torch.equal(mixed[:3], parts[0].decoded(torch.bfloat16))


@compiler_needed
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_the_decoded_weights(bits, shape, with_bias):
    weight, bias = any_codes(bits, *shape), drawn(shape[0]) if with_bias else None
    x = drawn(150, shape[1], seed=1).bfloat16()
    expected = x.double() @ weight.decoded(torch.float64).T + (0 if bias is None else bias.double())
    tolerance = {"rtol": 2**-8, "atol": 1e-4 * float(expected.abs().max())}
    assert_close(TorchOps().linear(weight, bias)(x).double(), expected, **tolerance)
    assert_close(ops_with_low_bits().linear(weight, bias)(x).double(), expected, **tolerance)


@compiler_needed
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_rows_gives_the_same_bits(bits, shape, threads, monkeypatch):
    """Few rows are multiplied with codes, many with panels that are expanded first."""
    monkeypatch.setattr(native_products, "MIN_VALUES_FOR_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    product = ops_with_low_bits().linear(any_codes(bits, *shape))
    x = drawn(300, shape[1], seed=2).bfloat16()
    expected = torch.cat([product(row[None]) for row in x])
    for num_rows in (0, 2, 3, 4, 5, 6, 7, 13, 31, 32, 33, 127, 128, 130, 300):
        for first in (0, 300 - num_rows):
            rows = slice(first, first + num_rows)
            assert torch.equal(product(x[rows]), expected[rows])
    apart = torch.cat([x, x], dim=1)[:, : shape[1]]
    assert torch.equal(product(apart), expected)


@compiler_needed
def test_the_last_outputs_lie_in_the_same_memory():
    product = ops_with_low_bits().linear(any_codes(4, 200, 64))
    x = drawn(5, 64).bfloat16()
    assert torch.equal(product.tail(64)(x), product(x)[:, 64:])
    assert product.tail(65) is None


@compiler_needed
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_of_codes_give_what_each_gives_alone(bits):
    ops = ops_with_low_bits()
    w_in = [any_codes(bits, 128, 96, seed=i) for i in range(3)]
    w_out = [any_codes(bits, 96, 64, seed=9 + i) for i in range(3)]
    x = drawn(40, 96).bfloat16()
    ids = torch.randint(3, (40, 1), generator=torch.Generator().manual_seed(3))
    found = ops.experts(w_in, w_out)(x, ids, torch.ones(40, 1))
    for i in range(3):
        rows = ids[:, 0] == i
        alone = ops.linear(w_out[i])(ops.silu_mul(ops.linear(w_in[i])(x[rows])))
        assert torch.equal(found[rows], alone)


@compiler_needed
def test_a_weight_of_four_bits_takes_four_and_a_half():
    product = ops_with_low_bits().linear(any_codes(4, 640, 320))
    assert isinstance(product, NativeLinear)
    assert product._weight.nbytes * 8 == 4.5 * 640 * 320


@compiler_needed
def test_a_cpu_without_the_instructions_multiplies_with_decoded_weights(monkeypatch):
    ops = NativeOps()
    monkeypatch.setattr(ops, "_has_low_bit", False)
    weight, x = any_codes(4, 70, 64), drawn(3, 64).bfloat16()
    assert not isinstance(ops.linear(weight), NativeLinear)
    assert torch.equal(ops.linear(weight)(x), TorchOps().linear(weight)(x))
