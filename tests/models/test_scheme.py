"""Models whose weights are rounded to few bits when they are read."""

import pytest
import torch

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.codes import Coded
from hybrid_cache.models import loading
from hybrid_cache.models.scheme import Scheme
from tests.models.driver import Driver

PROMPT = [*range(3, 100)]
LOSS = {"int8": 0.03, "int4": 0.4}  # norm of the change of the logits by theirs


def logits(**options):
    driver = Driver(loading.load(loading.embedded_path(), **options))
    return driver.logits(driver.prefill(PROMPT)[1])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("weights", LOSS)
def test_the_embedded_model_stays_close(backend, weights):
    ops = dispatch.select(backend)
    plain, coded = logits(ops=ops), logits(ops=ops, weights=weights)
    change = (coded - plain).norm() / plain.norm()
    assert 0.2 * LOSS[weights] * 0.1 < change <= LOSS[weights]


def test_backends_multiply_with_the_same_weights():
    native, torch_ = (logits(ops=dispatch.select(name), weights="int4") for name in ("native", "torch"))
    assert (native - torch_).norm() <= 0.02 * torch_.norm()


def test_each_scheme_is_another_model_and_so_are_rows_without_one():
    ops = dispatch.select("torch")
    prints = {w: loading.load(loading.embedded_path(), ops=ops, weights=w).fingerprint for w in ("bf16", *LOSS)}
    assert len(set(prints.values())) == 3
    assert prints["bf16"] == loading.load(loading.embedded_path(), ops=ops).fingerprint


def test_names_that_are_none_and_rows_in_float32_are_refused():
    ops = dispatch.select("torch")
    with pytest.raises(ModelError, match="weights 'int3' are not supported; supported: auto, bf16, int8, int4"):
        logits(ops=ops, weights="int3")
    with pytest.raises(ModelError, match="weights int4 need rows in bfloat16, these are float32"):
        logits(ops=ops, weights="int4", dtype="float32")


def test_the_head_keeps_eight_bits_and_inputs_that_are_no_groups_all():
    scheme, matrix = Scheme.named("int4", torch.bfloat16), torch.randn(40, 64).bfloat16()
    head, projection = scheme.head(matrix), scheme.matrix(matrix)
    assert isinstance(head, Coded)
    assert isinstance(projection, Coded)
    assert (head.bits, projection.bits) == (8, 4)
    assert isinstance(scheme.matrix(torch.randn(40, 48).bfloat16()), torch.Tensor)
    with pytest.raises(ModelError, match="beyond scales"):
        scheme.matrix(torch.full((1, 32), 1e9).bfloat16())
