from tests.models.case import BASE, ROPE, Case

QWEN = {**BASE, "num_hidden_layers": 2, "head_dim": 20}

CASES = [
    Case("qwen3 with grouped queries, tied", "Qwen3", {**QWEN, "rope_parameters": ROPE, "tie_word_embeddings": True}),
    Case(
        "qwen3 with biases, a window shorter than a tile in the last layer, and yarn",
        "Qwen3",
        {
            **QWEN,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 37,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    Case("qwen3 of one layer", "Qwen3", {**QWEN, "num_hidden_layers": 1}),
]
