from tests.models.case import BASE, Case

ZAMBA = {
    **BASE,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
    "mamba_dt_rank": 7,
}


def short_steps(model):
    """Steps around 0.1: long ones make float32 itself lose digits. Vectors come as matrices here, one row a head."""
    for name, p in model.named_parameters():
        if name.endswith("dt_proj_bias"):
            p.normal_(-2, 0.5)
        elif name.endswith("D"):
            p.normal_(1, 0.2)


CASES = [
    Case("zamba with two heads, tied", "Zamba", {**ZAMBA, "tie_word_embeddings": True}, prepare=short_steps),
    Case(
        "zamba with three heads, biases, grouped queries and weights of its own at each use, untied",
        "Zamba",
        {
            **ZAMBA,
            "num_hidden_layers": 4,
            "layers_block_type": None,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "num_key_value_heads": 3,
            "attention_head_dim": 20,
            "n_mamba_heads": 3,
            "mamba_d_state": 11,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
        prepare=short_steps,
    ),
    Case(
        "zamba of one Mamba-1 layer",
        "Zamba",
        {**ZAMBA, "num_hidden_layers": 1, "layers_block_type": ["mamba"]},
        prepare=short_steps,
    ),
    Case(  # when anything is tied, get_expanded_tied_weights_keys() asks for a second use of the shared block
        "zamba of one hybrid layer, untied",
        "Zamba",
        {**ZAMBA, "num_hidden_layers": 1, "layers_block_type": ["hybrid"]},
        prepare=short_steps,
    ),
]
