"""Products with codes against decoded weights, and the bits of a row in any company."""

import pytest
import torch
from torch.testing import assert_close

from hybrid_cache.kernels.triton_kernels import low_bit
from hybrid_cache.kernels.triton_kernels.low_bit import TritonCodedLinear
from hybrid_cache.kernels.triton_ops import TritonOps
from tests.kernels.test_low_bit import any_codes, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(weight):
    return type(weight)(weight.bits, weight.codes.to(DEVICE), weight.scales.to(DEVICE))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [(1, 32, 36), (40, 96, 130), (17, 64, 64)], ids=str)
def test_the_product_is_that_of_the_decoded_weights(size, bits, with_bias):
    num_rows, inputs, outputs = size
    weight, x = any_codes(bits, outputs, inputs), drawn(num_rows, inputs, seed=1).bfloat16()
    bias = drawn(outputs).bfloat16() if with_bias else None
    product = TritonCodedLinear(on_device(weight), None if bias is None else bias.to(DEVICE))
    expected = x.double() @ weight.decoded(torch.float64).T + (0 if bias is None else bias.double())
    found = product(x.to(DEVICE)).cpu().double()
    assert_close(found, expected, rtol=2**-8, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", low_bit.BLOCKS, ids=str)
def test_a_row_has_the_same_bits_in_any_company(bits, block):
    weight, x = on_device(any_codes(bits, 70, 64)), drawn(70, 64).bfloat16().to(DEVICE)
    codes = low_bit.pack(weight)
    whole = low_bit.multiply(x, codes, weight.scales, None, bits, block)
    assert torch.equal(low_bit.multiply(x[69:], codes, weight.scales, None, bits, block), whole[69:])
    wide = torch.cat([x, x], dim=1)[:, 64:]
    assert torch.equal(low_bit.multiply(wide, codes, weight.scales, None, bits, block), whole)


def test_the_backend_multiplies_codes_with_it():
    product = TritonOps().linear(on_device(any_codes(4, 40, 64)))
    assert isinstance(product, TritonCodedLinear)
    assert (product.in_features, product.out_features) == (64, 40)
    assert product(drawn(0, 64).bfloat16().to(DEVICE)).shape == (0, 40)
