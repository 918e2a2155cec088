import torch

from tests.models.case import BASE, Case

QWEN3_NEXT = {
    **BASE,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}


def spread_norms_around_zero(model: torch.nn.Module) -> None:
    """These norms have weights around 0, which the usual factors leave there; a tied head needs a small last one."""
    for name, p in model.named_parameters():
        if name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")):
            p.normal_(0, 0.2)
    if model.config.get_text_config().tie_word_embeddings:
        last = next(p for name, p in model.named_parameters() if name.endswith("model.norm.weight"))
        last.copy_((1 + last) * len(last) ** -0.5 - 1)


CASES = [
    Case("qwen3 next with experts in all layers", "Qwen3Next", QWEN3_NEXT, prepare=spread_norms_around_zero),
    Case(
        "qwen3 next with an MLP in some layers, biases, a head of values for each of keys, wide convolution, tied",
        "Qwen3Next",
        {
            **QWEN3_NEXT,
            "num_hidden_layers": 4,
            "layer_types": None,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
            "attention_bias": True,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 5,
            "tie_word_embeddings": True,
        },
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3 next of one delta layer",
        "Qwen3Next",
        {**QWEN3_NEXT, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3 next of one attention layer",
        "Qwen3Next",
        {**QWEN3_NEXT, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
        prepare=spread_norms_around_zero,
    ),
]
