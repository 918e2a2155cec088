from tests.models.case import BASE, ROPE, Case

MINIMAX = {
    **BASE,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": ROPE,
    "block_size": 32,
}

CASES = [
    Case("minimax with every other layer linear, tied", "MiniMax", {**MINIMAX, "tie_word_embeddings": True}),
    Case(
        "minimax with all factors, wide heads and a window, untied",
        "MiniMax",
        {
            **MINIMAX,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "head_dim": 20,
            "sliding_window": 70,
            "num_experts_per_tok": 1,
            "full_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 0.7,
            "linear_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.3,
            "mlp_beta_factor": 0.9,
        },
    ),
    Case(
        "minimax of one linear layer",
        "MiniMax",
        {**MINIMAX, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
    ),
    Case(
        "minimax of one attention layer",
        "MiniMax",
        {**MINIMAX, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
    ),
]
