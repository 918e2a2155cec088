from tests.models.case import Case
from tests.models.cases.kimi_linear import KIMI_LINEAR, spread_routers_and_forget_slowly

OF_KIMI = ("linear_head_dim", "linear_num_heads", "mlp_layer_types")
BAILING = {
    **{name: value for name, value in KIMI_LINEAR.items() if name not in OF_KIMI},
    "head_dim": 10,
    "first_k_dense_replace": 1,
    "num_expert_group": 3,
    "topk_group": 1,
}

CASES = [
    Case(
        "bailing hybrid with one group of experts of three",
        "BailingHybrid",
        BAILING,
        prepare=spread_routers_and_forget_slowly,
    ),
    Case(
        "bailing hybrid with unbounded decay, biases, layers in groups of two",
        "BailingHybrid",
        {
            **BAILING,
            "num_hidden_layers": 4,
            "layer_types": None,
            "layer_group_size": 2,
            "first_k_dense_replace": 2,
            "kda_safe_gate": False,
            "short_conv_kernel_size": 3,
            "attention_bias": True,
            "num_expert_group": 1,
            "n_shared_experts": 2,
        },
        prepare=spread_routers_and_forget_slowly,
    ),
    Case(
        "bailing hybrid of one delta layer with experts",
        "BailingHybrid",
        {**BAILING, "num_hidden_layers": 1, "layer_types": ["linear_attention"], "first_k_dense_replace": 0},
        prepare=spread_routers_and_forget_slowly,
    ),
    Case(
        "bailing hybrid of one attention layer",
        "BailingHybrid",
        {**BAILING, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
    ),
]
