import torch

from tests.models.case import BASE, Case

NEMOTRON = {
    **BASE,
    "head_dim": 20,
    "mamba_num_heads": 6,
    "mamba_head_dim": 20,
    "ssm_state_size": 24,
    "n_groups": 2,
    "chunk_size": 32,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
}
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "routed_scaling_factor": 2.5,
}


def correct_scores(model):
    """Corrections that change which experts are chosen."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))


CASES = [
    Case("nemotron_h with heads of their own size and two groups", "NemotronH", NEMOTRON),
    Case(
        "nemotron_h with biases, silu and a short convolution, attention last",
        "NemotronH",
        {
            **NEMOTRON,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
            "mlp_hidden_act": "silu",
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "num_key_value_heads": 6,
            "residual_in_fp32": True,
        },
    ),
    Case(
        "nemotron_h with experts in a narrow space, the best of groups of four",
        "NemotronH",
        {
            **NEMOTRON,
            **EXPERTS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_latent_size": 32,
            "mlp_bias": True,
            "n_group": 2,
        },
        prepare=correct_scores,
    ),
    Case(
        "nemotron_h with experts on whole rows, shares as they are",
        "NemotronH",
        {
            **NEMOTRON,
            **EXPERTS,
            "layers_block_type": ["full_attention", "moe", "linear_attention", "mlp"],
            "norm_topk_prob": False,
        },
        prepare=correct_scores,
    ),
    Case("nemotron_h of one Mamba-2 layer", "NemotronH", {**NEMOTRON, "layers_block_type": ["linear_attention"]}),
    Case("nemotron_h of one attention layer", "NemotronH", {**NEMOTRON, "layers_block_type": ["full_attention"]}),
]
