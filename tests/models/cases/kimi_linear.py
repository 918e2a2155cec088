import torch

from tests.models.case import BASE, Case

KIMI_LINEAR = {
    **BASE,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "linear_head_dim": 16,
    "linear_num_heads": 3,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def spread_routers_and_forget_slowly(model: torch.nn.Module) -> None:
    """A bias that changes who is chosen, and rates of forgetting around one."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            p.normal_(0, 0.3)
        elif name.endswith("A_log"):
            p.uniform_(-1, 1)


CASES = [
    Case("kimi linear", "KimiLinear", KIMI_LINEAR, prepare=spread_routers_and_forget_slowly),
    Case(
        "kimi linear with groups of experts, queries of low rank, biases, two shared experts, ends with attention",
        "KimiLinear",
        {
            **KIMI_LINEAR,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense"],
            "num_expert_group": 3,
            "topk_group": 2,
            "norm_topk_prob": False,
            "num_shared_experts": 2,
            "q_lora_rank": 18,
            "attention_bias": True,
            "linear_conv_kernel_dim": 3,
        },
        prepare=spread_routers_and_forget_slowly,
    ),
    Case(
        "kimi linear of one delta layer with experts",
        "KimiLinear",
        {**KIMI_LINEAR, "num_hidden_layers": 1, "layer_types": ["linear_attention"], "mlp_layer_types": ["sparse"]},
        prepare=spread_routers_and_forget_slowly,
    ),
    Case(
        "kimi linear of one attention layer",
        "KimiLinear",
        {**KIMI_LINEAR, "num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_layer_types": ["dense"]},
    ),
]
