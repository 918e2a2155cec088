"""Files that llama.cpp's converter and quantiser wrote; see `tests/models/data/gguf/README.md`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.models.driver import Driver

DATA = Path(__file__).parents[1] / "data" / "gguf"
FILES = ("granite-h-f16", "granite-h-q8_0", "falcon-h1-q4_k_m")
# By how much logits may differ, norm of the difference by norm: from the same numbers in transformers, from the
# checkpoint before it was rounded, and from llama.cpp, which rounds activations as well.
SAME_NUMBERS = 1e-5
OF_FORMAT = {"granite-h-f16": 2e-3, "granite-h-q8_0": 0.06, "falcon-h1-q4_k_m": 0.2}
OF_ACTIVATIONS = {"granite-h-f16": 2e-3, "granite-h-q8_0": 0.03, "falcon-h1-q4_k_m": 0.03}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=FILES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def expected(name):
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def logits(name, expected):
    driver = Driver(loading.load(DATA / f"{name}.gguf", dtype="float32", ops=dispatch.select()))
    _, rows = driver.prefill(expected["tokens"].tolist())
    return driver.logits(rows[-4:])


def test_logits_are_those_of_transformers_with_the_decoded_weights(logits, expected):
    assert relative(logits, expected["decoded"]) < SAME_NUMBERS


def test_logits_are_within_the_error_of_the_format(name, logits, expected):
    assert relative(logits, expected["unquantised"]) < OF_FORMAT[name]


def test_logits_are_those_of_llama_cpp_within_its_rounding(name, logits, expected):
    assert relative(logits, expected["llama_cpp"]) < OF_ACTIVATIONS[name]


def test_a_format_of_few_bits_is_computed_in_bfloat16_if_nobody_says_otherwise():
    dtypes = [loading.load_config(DATA / f"{name}.gguf")["dtype"] for name in FILES]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]


def test_the_tokenizer_and_template_are_those_of_the_checkpoint():
    text = TextModel.load(DATA / "granite-h-f16.gguf")
    words = text.tokenizer.decode([4, 470, 471, 6])
    assert text.tokenizer.encode(words) == [4, 470, 471, 6]
    assert text.tokenizer.special_ids == set(range(7))
    assert (text.tokenizer.bos_id, text.tokenizer.eos_id, text.defaults.eos_ids) == (1, 2, (2,))
    assert "default" in text.chat_templates
