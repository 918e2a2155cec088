"""Quantized checkpoints of other tools serve the model that the tool itself reads back from them."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.config import Config
from hybrid_cache.models.quant_methods.gptq import Gptq
from tests.models import checkpoints, quantizers
from tests.models.driver import Driver

OPS = dispatch.select("torch")
WRITTEN = Path(__file__).parent / "quantized"
TOKENS = list(range(3, 80))


def served(folder, **options):
    driver = Driver(loading.load(folder, ops=OPS, **options))
    return driver.logits(driver.prefill(TOKENS)[1])


def dequantized(model, weights):
    """transformers' model with these weights put in."""
    model = copy.deepcopy(model)
    missing = set(weights) - set(model.state_dict())
    assert not missing
    model.load_state_dict({**model.state_dict(), **weights})
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), use_cache=False).logits[0]


def check(model, folder, weights):
    """As the reference with the weights that the writer reads back, and not as the one that it was made from."""
    expected, plain = dequantized(model, weights), dequantized(model, {})
    found, size = served(folder), plain.abs().max()
    assert (found - expected).abs().max() <= 1e-3 * size
    assert 3e-3 * size < (found - plain).abs().max() < size


INT = {"type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
SCHEMES = {
    "W4A16 in groups": {"weights": {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}},
    "W4A16 with zero points": {
        "weights": {"type": "int", "symmetric": False, "num_bits": 4, "strategy": "group", "group_size": 32}
    },
    "W4A16 by row": {"weights": {**INT, "num_bits": 4, "strategy": "channel"}},
    "W3A16 by row with zero points": {
        "weights": {"type": "int", "symmetric": False, "num_bits": 3, "strategy": "channel"}
    },
    "W8A16": {"weights": {**INT, "num_bits": 8, "strategy": "channel"}},
    "W8A8": {"weights": {**INT, "num_bits": 8, "strategy": "channel"}, "input_activations": {**DYNAMIC, "type": "int"}},
    "W8A8 with zero points": {
        "weights": {"type": "int", "symmetric": False, "num_bits": 8, "strategy": "channel"},
        "input_activations": {**DYNAMIC, "type": "int"},
    },
    "FP8 by tensor": {
        "weights": {**FLOAT, "strategy": "tensor"},
        "input_activations": {**FLOAT, "strategy": "tensor", "dynamic": False},
    },
    "FP8 by row": {"weights": {**FLOAT, "strategy": "channel"}, "input_activations": {**DYNAMIC, "type": "float"}},
    "FP8 by block": {
        "weights": {**FLOAT, "strategy": "block", "block_structure": [32, 16]},
        "input_activations": {**DYNAMIC, "type": "float"},
    },
    "FP8 weights only": {"weights": {**FLOAT, "strategy": "channel"}},
}


@pytest.fixture(autouse=True, params=[1 << 22, 1 << 12], ids=["whole", "by rows"])
def block(request, monkeypatch):
    """Matrices are dequantized a few rows at a time."""
    monkeypatch.setattr("hybrid_cache.models.quant_methods.method.BLOCK", request.param)


@pytest.mark.parametrize("case", quantizers.CASES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_compressed_tensors(case, scheme, references, tmp_path):
    model = references(case)
    weights = quantizers.write_compressed(model, tmp_path, {"group_0": {"targets": ["Linear"], **scheme}})
    check(model, tmp_path, weights)


@pytest.mark.parametrize("name", ["granite-gptq", "falcon_h1-gptq", "granite-awq", "falcon_h1-awq"])
def test_gptq_and_awq_are_what_another_reader_makes_of_them(name):
    expected = load_file(WRITTEN / name / "expected.safetensors")["logits"]
    assert (
        served(WRITTEN / name, dtype="float32")[-len(expected) :] - expected
    ).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["granite-gptq", "falcon_h1-awq"])
def test_the_writers_own_format_has_the_same_tensors(name, tmp_path):
    """AutoRound's `auto_round` format, which it writes as GPTQ or AWQ."""
    folder = shutil.copytree(WRITTEN / name, tmp_path / "model")
    stored = quantizers.read_config(folder)["quantization_config"]
    packing = f"auto_round:auto_{name.rpartition('-')[2]}"
    checkpoints.edit_config(
        folder, quantization_config={**stored, "quant_method": "auto-round", "packing_format": packing}
    )
    assert torch.equal(served(folder), served(WRITTEN / name))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_inputs_in_an_order_of_their_own(bits, version):
    tensors = load_file(WRITTEN / "gptqmodel.safetensors")
    parts = {f".{name}": tensors[f"{version}.{bits}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    config = Config({"bits": bits, "group_size": 16, "checkpoint_format": version})
    weight = Gptq(config).decode("w", parts, (32, 64), torch.float32)
    torch.testing.assert_close(weight, tensors[f"{bits}.weight"].float(), rtol=1e-3, atol=0)
    other = Gptq(Config({"bits": bits, "checkpoint_format": "gptq" if version == "gptq_v2" else "gptq_v2"}))
    assert not torch.allclose(other.decode("w", parts, (32, 64), torch.float32), weight, atol=1e-3)
