"""Quantized checkpoints of other tools serve the model that the tool itself reads back from them."""

import copy
import json
import re
import shutil
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from hybrid_cache.api.cli.model_info import examine
from hybrid_cache.api.server.launch import Loaded
from hybrid_cache.api.server.process import hello
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.config import Config
from hybrid_cache.models.quant_methods.compressed import CompressedTensors
from hybrid_cache.models.quant_methods.gptq import Gptq
from hybrid_cache.models.quant_methods.named import method_of
from tests.models import checkpoints, quantizers
from tests.models.driver import Driver
from tests.models.hostile import HOSTILE

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


@pytest.fixture(params=[1 << 22, 1 << 12], ids=["whole", "by rows"])
def block(request, monkeypatch):
    """Matrices are dequantized a few rows at a time."""
    monkeypatch.setattr("hybrid_cache.models.quant_methods.method.BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("case", quantizers.CASES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_compressed_tensors(case, scheme, references, tmp_path):
    model = references(case)
    weights = quantizers.write_compressed(model, tmp_path, {"group_0": {"targets": ["Linear"], **scheme}})
    check(model, tmp_path, weights)


KEPT = {"W4A16 in groups": 4, "W4A16 with zero points": 8, "W4A16 by row": 4, "W8A16": 8, "FP8 by row": None}


@pytest.mark.parametrize("scheme", KEPT)
def test_codes_that_are_whole_numbers_are_multiplied_as_they_are(scheme, references, tmp_path, caplog):
    """A code less its zero point may take one bit more."""
    case = quantizers.CASES[0]
    quantizers.write_compressed(references(case), tmp_path, {"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}})
    file = tmp_path / "model.safetensors"
    save_file({n: t.half() if n.endswith("_scale") else t for n, t in load_file(file).items()}, file)  # as others do
    with caplog.at_level("INFO", logger="hybrid_cache"):
        found = served(tmp_path, dtype="bfloat16")
    assert ("matrices are multiplied as they are stored" in caplog.text) == (KEPT[scheme] is not None)
    exact, rounded = served(tmp_path, dtype="float32"), served(tmp_path, dtype="bfloat16", weights="bf16")
    assert (found - exact).norm() <= 0.03 * exact.norm()
    assert torch.equal(found, rounded) == (KEPT[scheme] is None)


def test_a_scheme_for_each_module_by_name_else_by_class(references, tmp_path):
    model = references(quantizers.CASES[0])
    groups = {
        "group_0": {"targets": ["Linear"], **SCHEMES["W4A16 in groups"]},
        "group_1": {"targets": ["re:.*out_proj$", "model.layers.1.self_attn.o_proj"], **SCHEMES["W8A16"]},
    }
    weights = quantizers.write_compressed(model, tmp_path, groups)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mamba.out_proj.weight_packed"].shape[1] == 2 * 16  # inputs 128
    assert stored["model.layers.0.mamba.in_proj.weight_packed"].shape[1] == 64 // 8
    check(model, tmp_path, weights)


def test_names_of_targets_may_be_those_of_another_class(references, tmp_path):
    """vLLM looks modules up by the names in the file's config, and finds none for a part of a larger model."""
    model = references(quantizers.CASES[0])
    weights = quantizers.write_compressed(
        model, tmp_path, {"group_0": {"targets": ["Linear"], **SCHEMES["FP8 by row"]}}
    )
    stored = quantizers.read_config(tmp_path)["quantization_config"]
    stored["config_groups"]["group_0"]["targets"] = ["re:^thinker[.]model[.]layers.*proj$"]
    checkpoints.edit_config(tmp_path, quantization_config=stored)
    check(model, tmp_path, weights)


def test_an_embedding_may_be_quantized_too(references, tmp_path):
    model = references(quantizers.CASES[0])
    groups = {"group_0": {"targets": ["Linear", "Embedding"], **SCHEMES["W4A16 in groups"]}}
    weights = quantizers.write_compressed(model, tmp_path, groups)
    assert "model.embed_tokens.weight" in weights
    assert "model.embed_tokens.weight_packed" in load_file(tmp_path / "model.safetensors")
    check(model, tmp_path, weights)


def test_matrices_under_names_of_no_method_are_refused_by_name(tmp_path, references):
    """transformers 5.10 left such experts as they were born, without a word."""
    model = references(quantizers.CASES[0])
    quantizers.write_compressed(model, tmp_path, {"group_0": {"targets": ["Linear"], **SCHEMES["W4A16 in groups"]}})
    prefix = "model.layers.1.shared_mlp.input_linear"
    edit_weights(tmp_path, lambda w: w.update({f"{prefix}_packed": w.pop(f"{prefix}.weight_packed")}))
    with pytest.raises(ModelError, match=rf"weight {prefix}\.weight is stored beside compre.*{prefix}_packed"):
        loading.load(tmp_path, ops=OPS)


def test_experts_packed_in_one_tensor_are_refused_by_name(tmp_path, references):
    model = references(next(case for case in checkpoints.CASES if case.name == "jamba with experts"))
    quantizers.write_compressed(model, tmp_path, {"group_0": {"targets": ["Linear"], **SCHEMES["W8A16"]}})

    def join(weights):
        for name in [name for name in weights if ".experts." in name]:
            packed = weights.pop(name)
            weights[f"{name.partition('.experts.')[0]}.experts.gate_up_proj_packed"] = packed[None]

    edit_weights(tmp_path, join)
    with pytest.raises(UnsupportedModel, match=r"experts\.\S+ is stored beside compre.*experts.gate_up_proj_packed"):
        loading.load(tmp_path, ops=OPS)


def test_float8_of_delta_nets(references, tmp_path):
    """Qwen3.5's and Qwen3-Next's projections for gates are narrower than a block."""
    case = next(case for case in checkpoints.FIRST_CASES if case.family == "Qwen3_5")
    model = references(case)
    weights = quantizers.write_float8(model, tmp_path, weight_block_size=(8, 8))
    assert any("linear_attn" in name for name in weights)
    check(model, tmp_path, weights)


def test_experts_are_matrices_like_others(references, tmp_path):
    model = references(next(case for case in checkpoints.CASES if case.name == "jamba with experts"))
    weights = quantizers.write_compressed(model, tmp_path, {"group_0": {"targets": ["Linear"], **SCHEMES["W8A16"]}})
    check(model, tmp_path, weights)


FLOAT8 = {
    "blocks": {"weight_block_size": (32, 16)},
    "blocks, scales that are powers of two": {"weight_block_size": (16, 32), "scale_fmt": "ue8m0"},
    "whole matrices": {"weight_block_size": None},
}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("case", quantizers.CASES, ids=str)
@pytest.mark.parametrize("settings", FLOAT8.values(), ids=FLOAT8)
def test_float8_by_transformers(case, settings, references, tmp_path):
    model = references(case)
    check(model, tmp_path, quantizers.write_float8(model, tmp_path, **settings))


def respelled(folder, **quantization):
    """Float8 with one scale a matrix, as AutoFP8 and ModelOpt call it, and with the scales of activations."""
    path = folder / "model.safetensors"
    weights = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in load_file(path).items()}
    beside = {name.replace("weight", "input"): torch.ones(1) for name in weights if name.endswith("weight_scale")}
    beside |= {"model.layers.1.self_attn.k_proj.k_scale": torch.ones(1)}
    save_file({**weights, **beside}, path, metadata={"format": "pt"})
    checkpoints.edit_config(folder, quantization_config=quantization or None)


AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    "quantization", [AUTOFP8, FBGEMM, MODELOPT, {}], ids=["AutoFP8", "FBGEMM", "ModelOpt", "beside"]
)
def test_float8_under_other_names(quantization, references, tmp_path):
    model = references(quantizers.CASES[0])
    weights = quantizers.write_float8(model, tmp_path, weight_block_size=None)
    respelled(tmp_path, **quantization)
    if not quantization:
        inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        text = json.dumps({"producer": {"name": "modelopt", "version": "0.35.0"}, "quantization": inner})
        (tmp_path / "hf_quant_config.json").write_text(text)
    check(model, tmp_path, weights)


@pytest.mark.usefixtures("block")
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


def test_compressed_tensors_with_inputs_in_an_order_of_their_own():
    """What llm-compressor wrote with `actorder: group` before the library gave that up."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    torch.manual_seed(3)
    codes, group = torch.randint(-8, 8, (32, 64), dtype=torch.int8), torch.randperm(64) // 16
    scale, zeros = torch.rand(32, 4), torch.randint(-8, 8, (32, 4), dtype=torch.int8)
    args = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 16,
        "symmetric": False,
        "actorder": "group",
    }
    method = CompressedTensors(
        {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
    )
    parts = {
        ".weight_packed": pack_to_int32(codes, 4),
        ".weight_zero_point": pack_to_int32(zeros, 4, packed_dim=0),
        ".weight_scale": scale,
        ".weight_g_idx": group.int(),
    }
    weight = method.decode("model.layers.0.x.weight", parts, (32, 64), torch.float32)
    torch.testing.assert_close(weight, (codes.float() - zeros.float()[:, group]) * scale[:, group])


# What is said


def test_what_is_not_done_is_said(references, tmp_path, caplog):
    groups = {"group_0": {"targets": ["Linear"], **SCHEMES["W8A8"]}}
    quantizers.write_compressed(references(quantizers.CASES[0]), tmp_path, groups)
    with caplog.at_level("INFO", logger="hybrid_cache"):
        loading.load(tmp_path, ops=OPS)
    said = "compressed-tensors, W8A8 int by channel; only weights are quantized here: activations are not"
    assert said in caplog.text
    assert said in "; ".join(examine(tmp_path, 1 << 30).quantized)


def test_whoever_starts_a_server_is_told():
    folder = WRITTEN / "granite-gptq"
    info = loading.describe(loading.load_config(folder))
    loaded = Loaded("granite-gptq", folder, loading.load(folder, ops=OPS), OPS, info)
    console = Console(file=StringIO(), width=100)
    console.print(hello(loaded, [], EngineConfig(), "all of it", "http://here", "granite-gptq"))
    assert "weights  GPTQ, 4 bits, groups of 32" in console.file.getvalue()


def test_the_fingerprint_changes_with_what_the_codes_mean(tmp_path):
    folder = shutil.copytree(WRITTEN / "granite-gptq", tmp_path / "model")
    before = loading.load(folder, ops=OPS).fingerprint
    stored = quantizers.read_config(folder)["quantization_config"]
    checkpoints.edit_config(folder, quantization_config={**stored, "checkpoint_format": "gptq_v2"})
    assert loading.load(folder, ops=OPS).fingerprint != before


def test_a_folder_whose_quantization_is_named_beside_its_config(tmp_path):
    for name, file in (("granite-gptq", "quantize_config.json"), ("granite-awq", "quant_config.json")):
        folder = shutil.copytree(WRITTEN / name, tmp_path / name)
        (folder / file).write_text(json.dumps(quantizers.read_config(folder)["quantization_config"]))
        checkpoints.edit_config(folder, quantization_config=None)
        assert torch.equal(served(folder), served(WRITTEN / name))


def test_what_is_refused_beside_the_config_is_no_supported_model(tmp_path):
    folder = shutil.copytree(WRITTEN / "granite-gptq", tmp_path / "model")
    checkpoints.edit_config(folder, quantization_config=None)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    report = examine(folder, 1 << 30)
    assert (report.supported, report.facts) == (False, None)
    assert "quant_algo is 'NVFP4', supported: 'FP8'" in report.reason


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def set_groups(weights, number):
    del weights[f"{PROJ}.g_idx"]
    weights[f"{PROJ}.scales"] = torch.ones(number, 64, dtype=torch.float16)
    weights[f"{PROJ}.qzeros"] = torch.zeros(number, 8, dtype=torch.int32)


def set_quantization(**changes):
    return lambda f: checkpoints.edit_config(
        f, quantization_config={**quantizers.read_config(f)["quantization_config"], **changes}
    )


PROJ = "model.layers.1.self_attn.q_proj"
REFUSED = {
    "a kernel's own layout": (set_quantization(checkpoint_format="marlin"), "checkpoint_format is 'marlin', supported"),
    "another method": (
        set_quantization(quant_method="bitsandbytes"),
        "quant_method is 'bitsandbytes', supported: auto-round, awq, compressed-tensors, fbgemm_fp8, fp8, gptq, "
        "hybrid-cache, modelopt; serve what it was made from, or a ",
    ),
    "mlx": (
        lambda f: checkpoints.edit_config(f, quantization_config=None, quantization={"group_size": 64, "bits": 4}),
        "config.json: quantization has no quant_method, as MLX writes it, which is not read: serve what it was made ",
    ),
    "nvfp4": (
        set_quantization(quant_method="compressed-tensors", format="nvfp4-pack-quantized"),
        "quantization_config.format is 'nvfp4-pack-quantized', supported: pack-quantized, ",
    ),
    "nvfp4 by another tool": (
        set_quantization(quant_method="modelopt", quant_algo="NVFP4"),
        "quant_algo is 'NVFP4', supported: 'FP8'",
    ),
    "rotated weights": (
        set_quantization(quant_method="compressed-tensors", transform_config={"config_groups": {"u": {}}}),
        "quantization_config.transform_config is {'config_groups': {'u': {}}}, which is not supported",
    ),
    "schemes that are none": (
        set_quantization(quant_method="compressed-tensors", config_groups={"group_0": {"targets": 3}}),
        "quantization_config is not understood: ",
    ),
    "no schemes": (set_quantization(quant_method="compressed-tensors", config_groups={}), "quantizes no weights"),
    "scales that are missing": (
        lambda f: edit_weights(f, lambda w: w.pop(f"{PROJ}.scales")),
        f"missing weight: {PROJ}.scales, a part of a quantized matrix",
    ),
    "scales of another type": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.scales": w[f"{PROJ}.scales"].int()})),
        f"weight {PROJ}.scales is I32, supported: BF16, F16, F32",
    ),
    "words of another matrix": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.qweight": w[f"{PROJ}.qweight"][:5].contiguous()})),
        f"weight {PROJ}.weight [64, 64] cannot be stored as ",
    ),
    "zeros of another matrix": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.qzeros": w[f"{PROJ}.qzeros"][:1].contiguous()})),
        f"weight {PROJ}.qzeros has shape [1, 8], expected [2, 8]",
    ),
    "a group that is not there": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.g_idx": w[f"{PROJ}.g_idx"] + 1})),
        f"weight {PROJ}.weight: g_idx names group 2, there are 2",
    ),
    "a group before the first": (
        lambda f: edit_weights(f, lambda w: w[f"{PROJ}.g_idx"].sub_(1)),
        f"weight {PROJ}.weight: g_idx names group -1, there are 2",
    ),
    "groups that do not divide the inputs": (
        lambda f: edit_weights(f, lambda w: set_groups(w, 3)),
        f"weight {PROJ}.weight [64, 64] cannot be stored as qweight [8, 64], qzeros [3, 8], scales [3, 64]",
    ),
    "no groups": (
        lambda f: edit_weights(f, lambda w: set_groups(w, 0)),
        f"weight {PROJ}.qzeros has shape [0, 8], a part of a quantized matrix",
    ),
    "words that are one number": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.qweight": torch.tensor(1, dtype=torch.int32)})),
        f"weight {PROJ}.qweight has shape [], a part of a quantized matrix",
    ),
    "a scale that is one number": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.scales": torch.tensor(1.0)})),
        f"weight {PROJ}.weight [64, 64] cannot be stored as ",
    ),
    "a matrix stored twice": (
        lambda f: edit_weights(f, lambda w: w.update({f"{PROJ}.weight": torch.zeros(64, 64)})),
        f"weights are stored plainly and quantized: {PROJ}.weight",
    ),
    "a method that nobody names": (
        lambda f: checkpoints.edit_config(f, quantization_config=None),
        "mamba.in_proj.weight is stored without a quantization_config as model.layers.0.mamba.in_proj.qweight, ",
    ),
    "a method of other tensors": (
        set_quantization(quant_method="fp8"),
        "mamba.in_proj.weight is stored beside FP8, float8 as model.layers.0.mamba.in_proj.qweight, ",
    ),
    "bits that are a word": (
        set_quantization(bits="4"),
        "granite: config.json: quantization_config.bits is '4', expected a whole number",
    ),
    "scales that are not finite": (
        lambda f: edit_weights(f, lambda w: w[f"{PROJ}.scales"].fill_(float("inf"))),
        f"weight {PROJ}.scales contains values that are not finite",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(damage, message, tmp_path):
    folder = shutil.copytree(WRITTEN / "granite-gptq", tmp_path / "granite")
    damage(folder)
    with pytest.raises(ModelError) as raised:
        loading.load(folder, ops=OPS)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{folder}: ")
    assert "\n" not in str(raised.value)


PACKED = "model.layers.1.self_attn.o_proj"
NOT_DECOMPRESSED = {
    "groups that are not there": (
        lambda w: w.update({f"{PACKED}.weight_g_idx": torch.full((64,), 2, dtype=torch.int32)}),
        {},
        f"weight {PACKED}.weight: g_idx names group 2, there are 2",
    ),
    "zero points that are missing": (
        lambda w: None,
        {"symmetric": False},
        "weight_zero_point, its zero points are not all 0",
    ),
    "packed floats": (lambda w: None, {"type": "float"}, "is packed, and of type float, supported: int"),
    "zero points that are not packed": (
        lambda w: w.update({f"{PACKED}.weight_zero_point": torch.zeros(8, 2)}),
        {},
        f"weight {PACKED}.weight_zero_point is F32, supported: I32",
    ),
    "scales in boxes": (
        lambda w: w.update({f"{PACKED}.weight_scale": w[f"{PACKED}.weight_scale"][None]}),
        {},
        f"weight {PACKED}.weight [64, 64] cannot be stored as ",
    ),
}


@pytest.mark.parametrize(("damage", "args", "message"), NOT_DECOMPRESSED.values(), ids=NOT_DECOMPRESSED)
def test_refuses_what_the_library_would_believe(damage, args, message, references, tmp_path):
    scheme = {"targets": ["Linear"], **SCHEMES["W4A16 in groups"]}
    quantizers.write_compressed(references(quantizers.CASES[0]), tmp_path, {"group_0": scheme})
    edit_weights(tmp_path, damage)
    set_quantization(config_groups={"group_0": {**scheme, "weights": {**scheme["weights"], **args}}})(tmp_path)
    with pytest.raises(ModelError) as raised:
        loading.load(tmp_path, ops=OPS)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


PATTERNS = {
    "none": ("re:(((", "targets has a pattern that is none: missing )"),
    "long": ("re:" + "x" * 1025, "targets has a pattern of 1025 characters, at most 1024 are read"),
    "endless": (r"re:(?:.|.)*(?<=!)", "which takes too long on model.layers."),
}


@pytest.mark.parametrize(("pattern", "message"), PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_of_names_has_bounds(pattern, message, references, tmp_path):
    scheme = {"targets": ["Linear"], **SCHEMES["W8A16"]}
    quantizers.write_compressed(references(quantizers.CASES[0]), tmp_path, {"group_0": scheme})
    set_quantization(config_groups={"group_0": {**scheme, "targets": [pattern]}, "group_1": scheme})(tmp_path)
    begun = time.monotonic()
    with pytest.raises(ModelError, match=re.escape(message)):
        loading.load(tmp_path, ops=OPS)
    assert time.monotonic() - begun < 30


def test_groups_of_the_named_size_may_end_with_a_smaller_one():
    """48 inputs in groups of 32 are 32 and 16, not twice 24."""
    method = Gptq(Config({"bits": 4, "group_size": 32}, ""))
    parts = {
        ".qweight": torch.full((6, 8), 0x22222222, dtype=torch.int32),
        ".qzeros": torch.zeros(2, 1, dtype=torch.int32),
        ".scales": torch.tensor([1.0, 5.0])[:, None].expand(2, 8).contiguous(),
    }
    sizes = {ending: tuple(part.shape) for ending, part in parts.items()}
    assert method.shapes("w", sizes, (8, 48)).keys() >= sizes.keys()
    row = method.decode("w", parts, (8, 48), torch.float32)[0]
    assert row.tolist() == [1.0] * 32 + [5.0] * 16


def test_a_bias_of_zeros_is_left_out_and_another_is_not(tmp_path):
    folder = shutil.copytree(WRITTEN / "granite-gptq", tmp_path / "model")
    edit_weights(folder, lambda w: w.update({f"{PROJ}.bias": torch.zeros(64)}))
    assert torch.equal(served(folder), served(WRITTEN / "granite-gptq"))
    edit_weights(folder, lambda w: w[f"{PROJ}.bias"].fill_(1))
    with pytest.raises(ModelError, match=f"unexpected weights: {PROJ}.bias"):
        loading.load(folder, ops=OPS)


def test_the_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(
        UnsupportedModel, match=r"needs the package compressed-tensors: pip install 'hybrid-cache\[quan"
    ):
        CompressedTensors({"config_groups": {}})


GROUP = {"targets": ["Linear"], **SCHEMES["W4A16 in groups"]}
SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "quantization": {"quant_algo": "FP8"}},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": GROUP},
        **dict.fromkeys(("ignore", "sparsity_config", "transform_config", "kv_cache_scheme", "quantization_status")),
    },
}
ARGS = (*GROUP["weights"], "block_structure", "dynamic", "actorder", "zp_dtype", "scale_dtype")


def hostile_settings(settings):
    """With one field of them that is absurd, and of the first group and its weights."""
    for value in HOSTILE:
        yield from ({**settings, field: value} for field in settings)
        if "config_groups" in settings:
            for field in (*GROUP, "input_activations", "format"):
                yield {**settings, "config_groups": {"group_0": {**GROUP, field: value}}}
            for field in ARGS:
                group = {**GROUP, "weights": {**GROUP["weights"], field: value}}
                yield {**settings, "config_groups": {"group_0": group}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_absurd_settings_are_read_or_refused_in_one_line(settings):
    assert method_of({"quantization_config": settings}) is not None
    said = [message for each in hostile_settings(settings) if (message := refusal(each)) is not None]
    assert len(said) > 100
    assert all("\n" not in message and len(message) < 1000 for message in said)


def refusal(settings):
    try:
        method_of({"quantization_config": settings})
    except ModelError as e:
        return str(e)
