from tests.models.case import BASE, ROPE, Case

LLAMA = {**BASE, "num_hidden_layers": 2}

CASES = [
    Case("llama with grouped queries, tied", "Llama", {**LLAMA, "rope_parameters": ROPE, "tie_word_embeddings": True}),
    Case(
        "llama with biases, wide heads and stretched positions",
        "Llama",
        {
            **LLAMA,
            "head_dim": 20,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    Case("llama of one layer", "Llama", {**LLAMA, "num_hidden_layers": 1}),
]
