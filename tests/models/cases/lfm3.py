from tests.models.case import BASE, Case

LFM3 = {
    **BASE,
    "num_hidden_layers": 5,
    "layer_types": ["conv", "sliding_attention", "full_attention", "conv", "sliding_attention"],
    "head_dim": 24,
    "conv_L_cache": 7,
    "sliding_window": 20,
}

CASES = [
    Case("lfm3 with a window shorter than a tile, half of the pairs turned", "Lfm3", LFM3),
    Case(
        "lfm3 without gates and norms behind, with biases, a wide convolution and a window of two tiles, tied",
        "Lfm3",
        {
            **LFM3,
            "layer_types": None,
            "conv_L_cache": 10,
            "conv_bias": True,
            "attention_bias": True,
            "use_sandwich_norm": False,
            "use_attention_gate": False,
            "sliding_window": 100,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    Case("lfm3 of one convolution", "Lfm3", {**LFM3, "num_hidden_layers": 1, "layer_types": ["conv"]}),
    Case(
        "lfm3 of one attention layer with a window",
        "Lfm3",
        {**LFM3, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    ),
]
