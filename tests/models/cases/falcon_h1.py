from tests.models.case import BASE, ROPE, Case

FALCON = {
    **BASE,
    "num_hidden_layers": 3,
    "rope_parameters": ROPE,
    "mamba_d_ssm": 120,
    "mamba_n_heads": 6,
    "mamba_d_state": 24,
    "mamba_chunk_size": 32,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.75,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.4,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 1.1, 0.8, 1.2, 0.9],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.6,
}

CASES = [
    Case("falcon_h1 without a norm inside Mamba-2, all multipliers", "FalconH1", {**FALCON, **MULTIPLIERS}),
    Case(
        "falcon_h1 with a norm before the gate, two groups and biases, tied",
        "FalconH1",
        {
            **FALCON,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_n_groups": 2,
            "mamba_d_conv": 3,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "mlp_bias": True,
            "time_step_limit": [0.05, 0.4],
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "falcon_h1 with a norm behind the gate, heads of their own size and a bias behind Mamba-2",
        "FalconH1",
        {
            **FALCON,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_d_ssm": None,
            "mamba_d_head": 32,
            "projectors_bias": True,
            "head_dim": 20,
            "num_key_value_heads": 3,
        },
    ),
    Case("falcon_h1 of one layer, which has both", "FalconH1", {**FALCON, "num_hidden_layers": 1}),
]
