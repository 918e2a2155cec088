from tests.models.case import BASE, ROPE, Case

OLMO_HYBRID = {
    **BASE,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
}

CASES = [
    Case(
        "olmo hybrid without positions, signs that may turn",
        "OlmoHybrid",
        {**OLMO_HYBRID, "rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    ),
    Case(
        "olmo hybrid with rotary positions and biases, ends with attention, sizes by default, tied",
        "OlmoHybrid",
        {
            **OLMO_HYBRID,
            "num_key_value_heads": None,
            "layer_types": None,
            **{f"linear_{name}": None for name in ("num_key_heads", "num_value_heads")},
            **{f"linear_{name}": None for name in ("key_head_dim", "value_head_dim")},
            "linear_allow_neg_eigval": False,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": ROPE,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(  # OlmoHybridConfig.validate_architecture() refuses one layer: it asks for one of each kind
        "olmo hybrid of two layers",
        "OlmoHybrid",
        {**OLMO_HYBRID, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
]
