from tests.models.case import Case
from tests.models.cases.qwen3_5 import SECTIONS
from tests.models.cases.qwen3_next import QWEN3_NEXT, spread_norms_around_zero

QWEN3_5_MOE = {
    **{name: value for name, value in QWEN3_NEXT.items() if name != "intermediate_size"},
    "rope_parameters": {**QWEN3_NEXT["rope_parameters"], **SECTIONS},
}

CASES = [
    Case(
        "qwen3.5 moe with positions in sections",
        "Qwen3_5Moe",
        QWEN3_5_MOE,
        config="Qwen3_5MoeTextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 moe with biases, a head of values for each of keys and one query for each key, tied",
        "Qwen3_5Moe",
        {
            **QWEN3_5_MOE,
            "num_experts": 3,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "num_key_value_heads": 6,
            "linear_num_key_heads": 6,
            "tie_word_embeddings": True,
        },
        config="Qwen3_5MoeTextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 moe of one delta layer",
        "Qwen3_5Moe",
        {**QWEN3_5_MOE, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        config="Qwen3_5MoeTextConfig",
        prepare=spread_norms_around_zero,
    ),
    Case(
        "qwen3.5 moe of one attention layer",
        "Qwen3_5Moe",
        {**QWEN3_5_MOE, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
        config="Qwen3_5MoeTextConfig",
        prepare=spread_norms_around_zero,
    ),
]
