"""Checkpoints as GGUF files: names from the table of the package `gguf`, transformations as llama.cpp's converter has
them, so that what reads such files is not tested with its own inverse only."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCH = {
    "bamba": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "falcon_mamba": "mamba",
    "granitemoehybrid": "granitehybrid",
    "jamba": "jamba",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "llama": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "nemotron_h": "nemotron_h_moe",
    "qwen3": "qwen3",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}
KEYS = {  # fields of config.json by what GGUF calls them
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("num_dense_layers",),
    "moe_latent_size": ("moe_latent_size",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"),
    "ssm.state_size": ("mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim"),
    "ssm.group_count": ("mamba_n_groups", "n_groups", "linear_num_key_heads"),
    "ssm.time_step_rank": (
        "mamba_dt_rank",
        "time_step_rank",
        "mamba_n_heads",
        "mamba_num_heads",
        "num_heads",
        "linear_num_value_heads",
    ),
}
WITHOUT = {"falcon-h1": ("embedding_scale",), "mamba": ("attention.key_length",), "mamba2": ("attention.key_length",)}
Named = Iterator[tuple[str, Tensor]]


def write(
    folder: Path,
    path: Path,
    *,
    kinds: Callable[[str, Tensor], str] | None = None,
    more: Mapping[str, Tensor] | None = None,
    **values: object,
) -> Path:
    """A checkpoint of transformers as a GGUF file.

    kinds: which of ggml's types a tensor is stored in, by its name there; float32 if left out
    more: tensors by their names there   values: with . written as __, None leaves one out
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCH[config["model_type"]]
    weights = load_file(folder / "model.safetensors")
    if arch == "granitehybrid" and not any(".mamba." in name for name in weights):
        arch = "granitemoe" if config["num_local_experts"] else "granite"
    tensors = dict(_renamed(arch, config, weights)) | _frequencies(config) | dict(more or {})
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (_values(arch, config, weights) | _changed(values)).items():
        if value is not None:
            add_value(writer, name, value)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor, kinds(name, tensor) if kinds else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, name: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    values = tensor.float().contiguous().numpy()
    if kind == "F32":
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)


def _changed(values: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in values.items()}


def _values(arch: str, config: Mapping[str, object], weights: Mapping[str, Tensor]) -> dict[str, object]:
    def field(names: tuple[str, ...]) -> object:
        return next((config[name] for name in names if config.get(name) is not None), None)

    found = {name: field(names) for name, names in KEYS.items() if name not in WITHOUT.get(arch, ())}
    values = {f"{arch}.{name}": value for name, value in found.items()}
    values[f"{arch}.block_count"] = num_layers(weights)
    if arch == "lfm2":  # as it is, whatever it was computed from
        values[f"{arch}.feed_forward_length"] = len(weights["model.layers.0.feed_forward.w1.weight"])
    values[f"{arch}.context_length"] = values[f"{arch}.context_length"] or 1 << 20
    values[f"{arch}.ssm.inner_size"] = _inner(config)
    if config["model_type"] == "falcon_mamba":
        values[f"{arch}.ssm.dt_b_c_rms"] = True
    rope = config.get("rope_parameters") or {}
    values[f"{arch}.rope.freq_base"] = rope.get("rope_theta")
    if arch == "granitehybrid":
        values[f"{arch}.rope.scaling.finetuned"] = config["model_type"] == "bamba"
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    head_dim = config.get("head_dim") or config.get("hidden_size") // (config.get("num_attention_heads") or 1)
    values[f"{arch}.rope.dimension_count"] = int(head_dim * (1.0 if rotated is None else rotated))
    return values


def num_layers(weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(m[1]) for name in weights if (m := re.search(r"layers\.(\d+)\.", name)))


def _inner(config: Mapping[str, object]) -> int | None:
    match config["model_type"]:
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
            return config["linear_num_value_heads"] * config["linear_value_head_dim"]
        case "nemotron_h":
            return config["mamba_num_heads"] * config["mamba_head_dim"]
        case "falcon_h1" if config["mamba_d_ssm"]:
            return config["mamba_d_ssm"]
        case "mamba" | "falcon_mamba":
            return config["intermediate_size"]
        case "mamba2":
            return config["num_heads"] * config["head_dim"]
    return config["mamba_expand"] * config["hidden_size"] if "mamba_expand" in config else None


def _renamed(arch: str, config: Mapping[str, object], weights: Mapping[str, Tensor]) -> Named:
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, num_layers(weights))
    for name, tensor in _stacked(weights).items():
        for new, part in _transformed(name, tensor, config):
            found = table.get_name(new, try_suffixes=(".weight", ".bias"))
            assert found is not None, f"{new} has no name in GGUF"
            yield found, part


def _stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts in one tensor each, under the names that the converter gives those."""
    expert = re.compile(r"(?:model|backbone)\.(layers\.\d+)\.\w+\.experts\.\d+\.(\w+)\.weight")
    stacked: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(weights.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        if m := expert.fullmatch(name):
            inside = f"model.{m[1]}.mlp" if m[2].endswith("_proj") else f"{m[1]}.feed_forward"
            stacked.setdefault(f"{inside}.experts.{m[2]}.weight", []).append(tensor)
    rest = {name: tensor for name, tensor in weights.items() if not expert.fullmatch(name)}
    return rest | {name: torch.stack(tensors) for name, tensors in stacked.items()}


def _transformed(name: str, tensor: Tensor, config: Mapping[str, object]) -> Named:
    kind = config["model_type"]
    if kind == "granitemoehybrid" and name.endswith("input_linear.weight"):
        yield from _granite_halves(name, tensor, config)
        return
    if name.endswith("shared_mlp.output_linear.weight") and not config["num_local_experts"]:
        name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    if kind.startswith("qwen3_"):
        yield from _qwen(name, tensor, config)
        return
    if kind in ("granitemoehybrid", "bamba", "llama", "nemotron_h"):
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if re.search(rf"{part}\.(weight|bias)$", name):
                tensor = permuted(tensor, config[heads])
    if kind == "falcon_h1":
        tensor = multiplied(name, tensor, config)
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor)
    of_heads = kind not in ("jamba", "mamba", "falcon_mamba")
    if of_heads and re.search(r"(mamba|mixer)\.(A_log|D)$", name):
        tensor = tensor[:, None]
    if re.search(r"(mamba|mixer)\.norm\.weight$", name):
        tensor = tensor.reshape(config.get("mamba_n_groups") or config["n_groups"], -1)
    if "conv1d.weight" in name or "conv.conv.weight" in name:
        tensor = tensor.squeeze(1)
    name = name.replace(".dt_bias", ".dt_proj.bias" if kind != "nemotron_h" else ".dt.bias")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = re.sub(r"\.expert_bias$", ".expert_bias.bias", name)
    yield name, tensor


def _frequencies(config: Mapping[str, object]) -> dict[str, Tensor]:
    """Llama 3's stretched positions: by what each frequency is divided, by the rule of its report."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, size, 2) / size)
    trained, low, high = (
        rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    kept = (trained / waves - low) / (high - low)
    ramp = 1 / ((1 - kept) / rope["factor"] + kept)
    long = torch.where(waves > trained / low, rope["factor"], ramp)
    return {"rope_freqs.weight": torch.where(waves < trained / high, 1.0, long)}


def permuted(tensor: Tensor, num_heads: int) -> Tensor:
    """As `LlamaModel.permute`: two halves of a head -> pairs side by side."""
    return tensor.reshape(num_heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _granite_halves(name: str, tensor: Tensor, config: Mapping[str, object]) -> Named:
    gate, up = tensor.chunk(2, dim=-2)
    layer = name.split("block_sparse_moe")[0].split("shared_mlp")[0]
    if "block_sparse_moe" in name:
        yield f"{layer}mlp.experts.gate_proj.weight", gate
        yield f"{layer}mlp.experts.up_proj.weight", up
    else:
        inside = "mlp.shared_expert" if config["num_local_experts"] else "mlp"
        yield f"{layer}{inside}.gate_proj.weight", gate
        yield f"{layer}{inside}.up_proj.weight", up


def multiplied(name: str, tensor: Tensor, config: Mapping[str, object]) -> Tensor:
    """Falcon-H1's multipliers."""
    gate, down = config["mlp_multipliers"]
    into = config["attention_in_multiplier"]
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config["key_multiplier"] * into,
        "q_proj": into,
        "v_proj": into,
        ".o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    if "in_proj" in name:
        bc = config["mamba_n_groups"] * config["mamba_d_state"]
        inner = _inner(config)
        sizes = (inner, inner, bc, bc, config["mamba_n_heads"])
        each = torch.cat([torch.full((n, 1), m) for n, m in zip(sizes, config["ssm_multipliers"], strict=True)])
        return tensor * config["ssm_in_multiplier"] * each
    return tensor * next((factor for part, factor in factors.items() if f"{part}.weight" in name), 1.0)


def _qwen(name: str, tensor: Tensor, config: Mapping[str, object]) -> Named:
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys, values = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if config["model_type"] != "qwen3_next" and "linear_attn." in name:
        tensor = _values_in_turn(name, tensor, groups, heads, keys, values)
    if "in_proj_qkvz" in name:
        each = tensor.view(groups, -1, tensor.shape[1]).split([keys, keys, *[heads // groups * values] * 2], dim=1)
        q, k, v, z = (part.flatten(0, 1) for part in each)
        yield name.replace("in_proj_qkvz", "in_proj_qkv"), torch.cat([q, k, v])
        yield name.replace("in_proj_qkvz", "in_proj_z"), z
    elif name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=-2)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", tensor
    elif name.endswith("A_log"):
        yield name, -torch.exp(tensor)
    elif name.endswith("norm.weight") and "linear_attn.norm" not in name:
        yield name, tensor + 1
    else:
        yield name.replace(".dt_bias", ".dt_proj.bias"), tensor.squeeze(1) if "conv1d" in name else tensor


def _values_in_turn(name: str, tensor: Tensor, groups: int, heads: int, keys: int, values: int) -> Tensor:
    """Heads of values of one group together -> those of all groups in turn, as Qwen3.5 has them in GGUF."""

    def turned(part: Tensor, size: int) -> Tensor:
        return part.reshape(groups, heads // groups, size, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        return torch.cat([tensor[: 2 * groups * keys], turned(tensor[2 * groups * keys :], values)])
    if "out_proj" in name:
        return turned(tensor.T, values).T
    size = values if "in_proj_z" in name else 1
    return tensor if "norm" in name else turned(tensor, size)
