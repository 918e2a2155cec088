from tests.models.case import BASE, Case

BAMBA = {
    **BASE,
    "num_hidden_layers": 4,
    "attn_layer_indices": [1],
    "mamba_n_heads": 6,
    "mamba_d_state": 24,
    "mamba_chunk_size": 32,
}

CASES = [
    Case("bamba with one attention layer, grouped queries, half of each head turned", "Bamba", BAMBA),
    Case(
        "bamba with biases, two groups, a short convolution and bounded dt, tied",
        "Bamba",
        {
            **BAMBA,
            "attn_layer_indices": [0, 3],
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_n_groups": 2,
            "mamba_d_head": 32,
            "time_step_limit": [0.05, 0.4],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    Case("bamba of one Mamba-2 layer", "Bamba", {**BAMBA, "num_hidden_layers": 1, "attn_layer_indices": []}),
    Case("bamba of one attention layer", "Bamba", {**BAMBA, "num_hidden_layers": 1, "attn_layer_indices": [0]}),
]
