"""Quantized model folders, each written by the public writer of its format, and what the writer itself makes of them.

A writer gives a folder and the weights that its own code reads back, by name: the reference of the tests.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import checkpoints
from tests.models.case import Case
from tests.models.cases.falcon_h1 import FALCON
from tests.models.cases.granitemoehybrid import GRANITE

Weights = dict[str, Tensor]

# Sides that words of codes, and groups of 32, divide.
SIDES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_hidden_layers": 2,
    "mamba_n_heads": 16,
    "mamba_d_head": 8,
}
CASES = [
    Case(
        "granite",
        "GraniteMoeHybrid",
        {**GRANITE, **SIDES, "layer_types": ["mamba", "attention"], "attention_multiplier": 0.25},
    ),
    Case("falcon_h1", "FalconH1", {**FALCON, **SIDES, "num_hidden_layers": 1, "mamba_d_ssm": 128}),
]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def write_compressed(model: nn.Module, folder: Path, groups: Mapping[str, object], **config: object) -> Weights:
    """By compressed-tensors: scales from the largest weight of each group, as its observers take them."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    model = copy.deepcopy(model)
    settings = QuantizationConfig(config_groups=dict(groups), ignore=["lm_head"], **config)
    apply_quantization_config(model, settings)
    expected: Weights = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        args = scheme.weights
        low, high = bounds(module.weight, args)
        scale, zero = calculate_qparams(low, high, args)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
        zero = getattr(module, "weight_zero_point", None)
        expected[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, args).detach().clone()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    checkpoints.save(model, folder)
    compressor.update_config(str(folder))
    return expected


def write_float8(model: nn.Module, folder: Path, **settings: object) -> Weights:
    """By the conversion of transformers' own FP8 quantizer, which its loading and saving run."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(**settings)
    checkpoints.save(model, folder)
    weights = load_file(folder / "model.safetensors")
    holder = SimpleNamespace(quantization_config=config)
    there, back = Fp8Quantize(holder), Fp8Dequantize(holder)
    expected: Weights = {}
    for name in [name for name in weights if name.removesuffix(".weight") in linears(model)]:
        new = there.convert({name: weights.pop(name)})
        if len(new) > 1:  # the others have sides that blocks do not divide, and stay as they are
            expected[name] = back._dequantize_one(new[name], new[f"{name}_scale_inv"], torch.float32)
        weights |= new
    assert expected
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.edit_config(folder, quantization_config=config.to_dict())
    return expected


def bounds(weight: Tensor, args: object) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group, in the shape of the scales."""
    w = weight.detach()
    if args.strategy == "tensor":
        return w.amin().view(1), w.amax().view(1)
    if args.strategy == "channel":
        return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if args.strategy == "block":
        high, wide = args.block_structure
        rows, columns = -(-w.shape[0] // high), -(-w.shape[1] // wide)
        blocks = nn.functional.pad(w, (0, columns * wide - w.shape[1], 0, rows * high - w.shape[0]))
        blocks = blocks.view(rows, high, columns, wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = w.view(len(w), -1, args.group_size)
    return groups.amin(2), groups.amax(2)


def read_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())
