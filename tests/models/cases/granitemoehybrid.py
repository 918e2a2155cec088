from tests.models.case import BASE, ROPE, Case

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
        "granite of one Mamba-2 layer",
        "GraniteMoeHybrid",
        {**GRANITE, "num_hidden_layers": 1, "layer_types": ["mamba"]},
    ),
    Case(
        "granite of one attention layer",
        "GraniteMoeHybrid",
        {**GRANITE, "num_hidden_layers": 1, "layer_types": ["attention"]},
    ),
]
