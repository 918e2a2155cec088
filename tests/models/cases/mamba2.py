from tests.models.case import BASE, Case

MAMBA2 = {
    **{name: BASE[name] for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    "num_hidden_layers": 3,
    "num_heads": 6,
    "head_dim": 32,
    "state_size": 24,
    "n_groups": 1,
    "chunk_size": 32,
}

CASES = [
    Case("mamba2 with one group, tied", "Mamba2", {**MAMBA2, "tie_word_embeddings": True}),
    Case(
        "mamba2 with three groups, biases, a short convolution and bounded dt, untied",
        "Mamba2",
        {
            **MAMBA2,
            "n_groups": 3,
            "num_heads": 24,
            "head_dim": 12,
            "expand": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "time_step_limit": [0.05, 0.4],
            "residual_in_fp32": False,
        },
    ),
    Case("mamba2 of one layer", "Mamba2", {**MAMBA2, "num_hidden_layers": 1}),
]
