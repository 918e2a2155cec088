from tests.models.case import BASE, ROPE, Case

ZAMBA = {
    **BASE,
    "num_hidden_layers": 6,
    "num_key_value_heads": 6,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "mamba"],
    "n_mamba_heads": 6,
    "mamba_d_state": 24,
    "chunk_size": 32,
    "adapter_rank": 8,
}

CASES = [
    Case(
        "zamba2 with two shared blocks in turn, two groups and rotary positions, tied",
        "Zamba2",
        {
            **ZAMBA,
            "num_mem_blocks": 2,
            "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid", "hybrid", "mamba"],  # the blocks twice each
            "mamba_ngroups": 2,
            "use_mem_rope": True,
            "rope_parameters": ROPE,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "zamba2 with one shared block, attention adapters and biases, tied",
        "Zamba2",
        {
            **ZAMBA,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "add_bias_linear": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "zamba2 with grouped queries and weights of its own at each use, untied",
        "Zamba2",
        {**ZAMBA, "num_key_value_heads": 3, "num_mem_blocks": 2},
    ),
    Case(
        "zamba2 of one Mamba-2 layer, tied",
        "Zamba2",
        {**ZAMBA, "num_hidden_layers": 1, "layers_block_type": ["mamba"], "tie_word_embeddings": True},
    ),
    Case(
        "zamba2 of one hybrid layer, tied",
        "Zamba2",
        {**ZAMBA, "num_hidden_layers": 1, "layers_block_type": ["hybrid"], "tie_word_embeddings": True},
    ),
]
