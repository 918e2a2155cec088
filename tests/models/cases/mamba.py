from tests.models.case import BASE, Case

MAMBA = {**{k: v for k, v in BASE.items() if "attention" not in k and "key_value" not in k}, "num_hidden_layers": 3}
del MAMBA["intermediate_size"], MAMBA["max_position_embeddings"]


def short_steps(model):
    """Steps around 0.1: long ones make float32 itself lose digits."""
    for name, p in model.named_parameters():
        if name.endswith("dt_proj.bias"):
            p.normal_(-2, 0.5)


CASES = [
    Case("mamba, tied", "Mamba", {**MAMBA, "tie_word_embeddings": True}, prepare=short_steps),
    Case(
        "mamba with biases, a short convolution and rank and state of odd sizes, untied",
        "Mamba",
        {
            **MAMBA,
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "state_size": 11,
            "time_step_rank": 5,
            "expand": 3,
            "residual_in_fp32": False,
        },
        prepare=short_steps,
    ),
    Case("mamba of one layer", "Mamba", {**MAMBA, "num_hidden_layers": 1}, prepare=short_steps),
]
