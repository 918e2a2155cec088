import torch

from tests.models.case import BASE, ROPE, Case

LFM2_MOE = {
    **BASE,
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "rope_parameters": ROPE,
}


def spread_the_bias(model: torch.nn.Module) -> None:
    """So that it changes who is chosen."""
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.normal_(0, 0.3)


CASES = [
    Case("lfm2 moe with a bias on the choice of experts", "Lfm2Moe", LFM2_MOE, prepare=spread_the_bias),
    Case(
        "lfm2 moe with sigmoids as they are, scaled, all layers with experts, tied",
        "Lfm2Moe",
        {
            **LFM2_MOE,
            "num_dense_layers": 0,
            "num_experts_per_tok": 3,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 0.7,
            "conv_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "lfm2 moe of one convolution with experts",
        "Lfm2Moe",
        {**LFM2_MOE, "num_hidden_layers": 1, "layer_types": ["conv"], "num_dense_layers": 0},
        prepare=spread_the_bias,
    ),
    Case(
        "lfm2 moe of one attention layer without experts",
        "Lfm2Moe",
        {**LFM2_MOE, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
    ),
]
