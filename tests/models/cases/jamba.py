from tests.models.case import BASE, Case

JAMBA = {
    **BASE,
    "num_hidden_layers": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_dt_rank": 10,
}

CASES = [
    Case("jamba with experts", "Jamba", JAMBA),
    Case(
        "jamba without experts, with biases, tied",
        "Jamba",
        {
            **JAMBA,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    Case("jamba of one Mamba-1 layer", "Jamba", {**JAMBA, "num_hidden_layers": 1}),
    Case(
        "jamba of one attention layer with experts",
        "Jamba",
        {**JAMBA, "num_hidden_layers": 1, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_offset": 0},
    ),
]
