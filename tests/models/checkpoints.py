"""Small random checkpoints written by transformers' own classes, in which every layer matters."""

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

BASE = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
GRANITE = {
    **BASE,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "shared_intermediate_size": 112,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_d_state": 24,
    "mamba_chunk_size": 32,
}
ZAMBA = {
    **BASE,
    "num_hidden_layers": 6,
    "num_key_value_heads": 6,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "mamba"],
    "n_mamba_heads": 6,
    "mamba_d_state": 24,
    "chunk_size": 32,
    "adapter_rank": 8,
}
JAMBA = {
    **BASE,
    "num_hidden_layers": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_dt_rank": 10,
}


@dataclass(frozen=True)
class Case:
    name: str
    family: str  # of transformers' classes
    settings: dict = field(hash=False)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(
        "granite with all multipliers, tied, without positions",
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "logits_scaling": 3.0,
        },
    ),
    Case(
        "granite with rotary positions, biases, two groups, a short convolution and bounded dt",
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "position_embedding_type": "rope",
            "rope_parameters": ROPE,
            "attention_bias": True,
            "attention_multiplier": 0.25,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_n_groups": 2,
            "time_step_limit": [0.05, 0.4],
        },
    ),
    Case(
        "granite with experts",
        "GraniteMoeHybrid",
        {**GRANITE, "num_local_experts": 5, "num_experts_per_tok": 3, "attention_multiplier": 0.25},
    ),
    Case(
        "zamba2 with two shared blocks in turn, two groups and rotary positions, tied",
        "Zamba2",
        {
            **ZAMBA,
            "num_mem_blocks": 2,
            "mamba_ngroups": 2,
            "use_mem_rope": True,
            "rope_parameters": ROPE,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "zamba2 with one shared block, attention adapters and biases, tied",
        "Zamba2",
        {
            **ZAMBA,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "add_bias_linear": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "zamba2 with grouped queries and weights of its own at each use, untied",
        "Zamba2",
        {**ZAMBA, "num_key_value_heads": 3, "num_mem_blocks": 2},
    ),
    Case("jamba with experts", "Jamba", JAMBA),
    Case(
        "jamba without experts, with biases, tied",
        "Jamba",
        {
            **JAMBA,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
]


def reference(case: Case) -> torch.nn.Module:
    """transformers' model: matrices at 1 / sqrt(fan in), so that no layer fades; vectors away from 0 and 1."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{case.family}Config")(**case.settings)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv1d.weight" in name:
                p.normal_(0, 0.5)
            elif "embed_tokens" in name:
                p.normal_(0, 1.0)
            elif p.dim() >= 2 and "A_log" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "dt_bias" in name:
                p.normal_(-2, 0.5)  # steps around 0.1: long ones make float32 itself lose digits
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
            else:  # norms, A_log, D
                p.mul_(1 + 0.2 * torch.randn(p.shape))
        if config.tie_word_embeddings:
            last = model.model.norm if hasattr(model.model, "norm") else model.model.final_layernorm
            last.weight.mul_(config.hidden_size**-0.5)  # logits of size one, as without tying
    return model


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    if dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write_all(folder: Path) -> list[Path]:
    """One folder for each case, named after its first words."""
    paths = []
    for number, case in enumerate(CASES):
        name = f"{number}-{'-'.join(case.name.replace(',', '').split()[:3])}"
        paths.append(save(reference(case), folder / name))
        print(paths[-1])
    return paths


if __name__ == "__main__":  # python -m tests.models.checkpoints DIR
    write_all(Path(sys.argv[1]))
