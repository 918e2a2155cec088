from tests.models.case import BASE, ROPE, Case

LFM2 = {
    **BASE,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}

CASES = [
    Case("lfm2 with attention in the last layer", "Lfm2", LFM2),
    Case(
        "lfm2 with biases, a wide convolution, an adjusted width and layers by number, tied",
        "Lfm2",
        {
            **LFM2,
            "layer_types": None,
            "full_attn_idxs": [1],
            "conv_bias": True,
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.3,
            "block_multiple_of": 24,
            "rope_parameters": ROPE,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    Case("lfm2 of one convolution", "Lfm2", {**LFM2, "num_hidden_layers": 1, "layer_types": ["conv"]}),
    Case("lfm2 of one attention layer", "Lfm2", {**LFM2, "num_hidden_layers": 1, "layer_types": ["full_attention"]}),
]
