from tests.models.case import Case
from tests.models.cases.qwen3_next import QWEN3_NEXT, spread_norms_around_zero

MOE_ONLY = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
SECTIONS = {"mrope_section": [2, 3, 1], "mrope_interleaved": True}
QWEN3_5 = {
    **{name: value for name, value in QWEN3_NEXT.items() if name not in MOE_ONLY},
    "rope_parameters": {**QWEN3_NEXT["rope_parameters"], **SECTIONS},
}

CASES = [
    Case(
        "qwen3.5 with three heads of values for each of keys and positions in sections",
        "Qwen3_5",
        QWEN3_5,
        config="Qwen3_5TextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 with biases and one head of keys, tied",
        "Qwen3_5",
        {
            **QWEN3_5,
            "num_hidden_layers": 4,
            "layer_types": None,
            "attention_bias": True,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 2,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        config="Qwen3_5TextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 of one delta layer",
        "Qwen3_5",
        {**QWEN3_5, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        config="Qwen3_5TextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 of one attention layer",
        "Qwen3_5",
        {**QWEN3_5, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
        config="Qwen3_5TextConfig",
        prepare=spread_norms_around_zero,
    ),
]
