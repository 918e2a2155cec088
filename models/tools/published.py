"""Published models as the fields of their config.json that decide shapes, by family.

They come from the sources that each family names, not from the files on the hub; a test compares the number of
parameters that they make with the published one, which nothing but the true widths, depths and groups gives. Where the
attention layers are decides no sum. What decides no shape (positions, multipliers, tokens) is left out, so that no
weights can be loaded with these.
"""

from collections.abc import Collection, Mapping

Fields = Mapping[str, object]


def _at(places: Collection[int], num_layers: int, kind: str, others: str) -> list[str]:
    return [kind if i in places else others for i in range(num_layers)]


def _jamba(**sizes: object) -> Fields:
    return {"model_type": "jamba", "dtype": "bfloat16", "vocab_size": 65536, "max_position_embeddings": 262144, **sizes}


# ai21labs. Mini: the defaults of JambaConfig. Reasoning: its config.json as quoted by tests of calculators and ports.
JAMBA: Mapping[str, Fields] = {
    "jamba-1.5-mini": _jamba(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        attn_layer_period=8,
        attn_layer_offset=4,
        num_experts=16,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=256,
    ),
    "jamba-reasoning-3b": _jamba(
        num_hidden_layers=28,
        hidden_size=2560,
        intermediate_size=8192,
        num_attention_heads=20,
        num_key_value_heads=1,
        attn_layer_period=14,
        attn_layer_offset=7,
        num_experts=1,
        mamba_dt_rank=160,
        tie_word_embeddings=True,
    ),
}


def _zamba2(hidden: int, num_layers: int, hybrid: Collection[int], **sizes: object) -> Fields:
    return {
        "model_type": "zamba2",
        "dtype": "bfloat16",
        "num_hidden_layers": num_layers,
        "layers_block_type": _at(hybrid, num_layers, "hybrid", "mamba"),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_mamba_heads": hidden // 32,
        "adapter_rank": 128,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        **sizes,
    }


# Zyphra: config.json on the hub. One shared block, or two that take turns, before some of the Mamba layers.
ZAMBA: Mapping[str, Fields] = {
    "zamba-7b": {
        "model_type": "zamba",
        "dtype": "bfloat16",
        "num_hidden_layers": 76,
        "hidden_size": 3712,
        "intermediate_size": 14848,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "attn_layer_period": 6,
        "attn_layer_offset": 4,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 232,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
    },
    "zamba2-1.2b": _zamba2(
        2048,
        38,
        (5, 11, 17, 23, 29, 35),
        num_mem_blocks=1,
        use_shared_attention_adapter=True,
        use_mem_rope=True,
        mamba_d_state=128,
    ),
    "zamba2-2.7b": _zamba2(2560, 54, (6, 12, 18, 24, 30, 36, 42, 47, 51), num_mem_blocks=2, mamba_d_state=64),
    "zamba2-7b": _zamba2(
        3584,
        81,
        (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77),
        num_mem_blocks=2,
        use_mem_rope=True,
        mamba_d_state=64,
        mamba_ngroups=2,
    ),
}


def _granite(hidden: int, num_heads: int, mlp: int, *, num_layers: int = 40, **sizes: object) -> Fields:
    """`mlp`: width of the part that every token goes to, in addition to any experts."""
    attention = (10, 13, 17, 27) if num_layers == 32 else (5, 15, 25, 35)
    return {
        "model_type": "granitemoehybrid",
        "dtype": "bfloat16",
        "num_hidden_layers": num_layers,
        "layer_types": _at(attention, num_layers, "attention", "mamba"),
        "hidden_size": hidden,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 8 if num_heads == 32 else 4,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "shared_intermediate_size": mlp,
        "max_position_embeddings": 131072,
        "vocab_size": 100352,
        "tie_word_embeddings": True,
        **sizes,
    }


DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
# ibm-granite/granite-4.0-h-*: the table of their card, and config.json as quoted by tests of calculators.
GRANITE: Mapping[str, Fields] = {
    "granite-4-h-350m": _granite(
        768, 12, 2048, num_layers=32, mamba_n_heads=48, max_position_embeddings=32768, intermediate_size=2048, **DENSE
    ),
    "granite-4-h-1b": _granite(1536, 12, 4096, mamba_n_heads=48, intermediate_size=4096, **DENSE),
    "granite-4-h-micro": _granite(2048, 32, 8192, mamba_n_heads=64, intermediate_size=8192, **DENSE),
    "granite-4-h-tiny": _granite(
        1536, 12, 1024, mamba_n_heads=48, num_local_experts=64, num_experts_per_tok=6, intermediate_size=512
    ),
    "granite-4-h-small": _granite(
        4096, 32, 1536, mamba_n_heads=128, num_local_experts=72, num_experts_per_tok=10, intermediate_size=768
    ),
}

# ibm-ai-platform/Bamba-9B-v1 (once ibm-fms/Bamba-9B): its card.
BAMBA: Mapping[str, Fields] = {
    "bamba-9b": {
        "model_type": "bamba",
        "dtype": "bfloat16",
        "num_hidden_layers": 32,
        "attn_layer_indices": [9, 18, 27],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "mamba_n_heads": 128,
        "mamba_d_state": 128,
        "max_position_embeddings": 4096,
        "vocab_size": 128256,
    },
}


def _falcon_h1(depth: int, hidden: int, mlp: int, heads: int, ssm: tuple[int, int], **sizes: object) -> Fields:
    """`ssm`: heads of Mamba-2, and values of each."""
    return {
        "model_type": "falcon_h1",
        "dtype": "bfloat16",
        "num_hidden_layers": depth,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_n_heads": ssm[0],
        "mamba_d_head": ssm[1],
        "mamba_d_ssm": ssm[0] * ssm[1],
        "mamba_d_state": 256,
        "max_position_embeddings": 131072,
        "vocab_size": 65537,
        **sizes,
    }


# tiiuae/Falcon-H1-*: the table in transformers' page about them; widths of the MLP and vocabularies from config.json
# as quoted by tests of calculators, but the MLP of 1.5b-deep, and the MLP and vocabulary of 34b, rest on the number of
# parameters.
FALCON_H1: Mapping[str, Fields] = {
    "falcon-h1-0.5b": _falcon_h1(
        36, 1024, 2048, 8, (24, 64), head_dim=64, mamba_d_state=128, vocab_size=32784, max_position_embeddings=16384
    ),
    "falcon-h1-1.5b": _falcon_h1(24, 2048, 4608, 8, (48, 64)),
    "falcon-h1-1.5b-deep": _falcon_h1(66, 1280, 3072, 6, (24, 64)),
    "falcon-h1-3b": _falcon_h1(32, 2560, 6144, 10, (32, 128), vocab_size=65536),
    "falcon-h1-7b": _falcon_h1(
        44, 3072, 12288, 12, (24, 128), mamba_rms_norm=True, vocab_size=130048, max_position_embeddings=262144
    ),
    "falcon-h1-34b": _falcon_h1(
        72,
        5120,
        21504,
        20,
        (32, 128),
        num_key_value_heads=4,
        mamba_n_groups=2,
        mamba_rms_norm=True,
        vocab_size=261120,
        max_position_embeddings=262144,
    ),
}


def _nemotron(pattern: str, hidden: int, **sizes: object) -> Fields:
    return {
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden,
        "head_dim": 128,
        "n_groups": 8,
        "ssm_state_size": 128,
        "vocab_size": 131072,
        **sizes,
    }


# nvidia: the defaults of NemotronHConfig; config.json of the others as quoted by tests of calculators and ports.
NEMOTRON: Mapping[str, Fields] = {
    "nemotron-h-8b": _nemotron(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=21504,
        mamba_num_heads=128,
        mamba_head_dim=64,
        max_position_embeddings=8192,
    ),
    "nemotron-nano-9b-v2": _nemotron(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        4480,
        num_attention_heads=40,
        num_key_value_heads=8,
        intermediate_size=15680,
        mamba_num_heads=128,
        mamba_head_dim=80,
        max_position_embeddings=131072,
    ),
    "nemotron-3-nano-30b-a3b": _nemotron(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        2688,
        num_attention_heads=32,
        num_key_value_heads=2,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        n_routed_experts=128,
        num_experts_per_tok=6,
        mamba_num_heads=64,
        mamba_head_dim=64,
        max_position_embeddings=262144,
    ),
}


def _lfm2(hidden: int, num_layers: int, attention: Collection[int], **sizes: object) -> Fields:
    return {
        "model_type": "lfm2",
        "dtype": "bfloat16",
        "num_hidden_layers": num_layers,
        "layer_types": _at(attention, num_layers, "full_attention", "conv"),
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "max_position_embeddings": 128000,
        "vocab_size": 65536,
        **sizes,
    }


LFM2_ATTENTION = (2, 5, 8, 10, 12, 14)
# LiquidAI/LFM2-*: config.json on the hub, and as quoted by tests of ports.
LFM2: Mapping[str, Fields] = {
    "lfm2-350m": _lfm2(1024, 16, LFM2_ATTENTION, block_ff_dim=6656),
    "lfm2-700m": _lfm2(1536, 16, LFM2_ATTENTION, block_ff_dim=10240),
    "lfm2-1.2b": _lfm2(2048, 16, LFM2_ATTENTION, block_ff_dim=12288),
    "lfm2-2.6b": _lfm2(
        2048, 30, (2, 5, 9, 13, 17, 21, 24, 27), intermediate_size=10752, block_auto_adjust_ff_dim=False
    ),
    "lfm2-8b-a1b": _lfm2(
        2048,
        24,
        (2, 6, 10, 14, 18, 21),
        model_type="lfm2_moe",
        intermediate_size=7168,
        moe_intermediate_size=1792,
        num_dense_layers=2,
        num_experts=32,
        num_experts_per_tok=4,
    ),
}


def _delta_net(model_type: str, hidden: int, num_layers: int, **sizes: object) -> Fields:
    """Qwen: every fourth layer is attention."""
    return {
        "model_type": model_type,
        "dtype": "bfloat16",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "num_attention_heads": 16,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        **sizes,
    }


# The defaults of the config classes, which name these models (3.5-4b: its config.json as quoted by tests of
# calculators); the text models only, without multi-token prediction.
DELTA_NETS: Mapping[str, Fields] = {
    "qwen3-next-80b-a3b": _delta_net(
        "qwen3_next",
        2048,
        48,
        num_key_value_heads=2,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        vocab_size=151936,
    ),
    "qwen3.5-4b": _delta_net(
        "qwen3_5_text",
        2560,
        32,
        num_key_value_heads=4,
        intermediate_size=9216,
        vocab_size=248320,
        tie_word_embeddings=True,
    ),
    "qwen3.5-35b-a3b": _delta_net(
        "qwen3_5_moe_text",
        2048,
        40,
        num_key_value_heads=2,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        vocab_size=248320,
    ),
    "olmo-hybrid-7b": {
        "model_type": "olmo_hybrid",
        "dtype": "bfloat16",
        "num_hidden_layers": 32,
        "hidden_size": 3840,
        "intermediate_size": 11008,
        "num_attention_heads": 30,
        "num_key_value_heads": 30,
        "max_position_embeddings": 65536,
        "vocab_size": 100352,
    },
}


def _recurrent_gemma(hidden: int, num_layers: int) -> Fields:
    return {
        "model_type": "recurrent_gemma",
        "dtype": "bfloat16",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "lru_width": hidden,
        "intermediate_size": 6 * hidden,  # of both halves
        "num_attention_heads": hidden // 256,
        "num_key_value_heads": 1,
        "attention_window_size": 2048,
        "vocab_size": 256000,
    }


# moonshotai/Kimi-Linear-48B-A3B: the defaults of KimiLinearConfig, and config.json as quoted by tests of ports.
KIMI: Mapping[str, Fields] = {
    "kimi-linear-48b-a3b": {
        "model_type": "kimi_linear",
        "dtype": "bfloat16",
        "num_hidden_layers": 27,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],  # from 1
            "kda_layers": [i for i in range(1, 27) if i % 4],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 32,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "max_position_embeddings": 1048576,
        "vocab_size": 163840,
    },
}

# state-spaces, tiiuae and google: papers and copies of config.json on the hub. The first two name no dtype: float32.
RECURRENT: Mapping[str, Fields] = {
    "mamba-2.8b": {
        "model_type": "mamba",
        "num_hidden_layers": 64,
        "hidden_size": 2560,
        "state_size": 16,
        "time_step_rank": 160,
        "vocab_size": 50280,
    },
    "mamba2-2.7b": {
        "model_type": "mamba2",
        "num_hidden_layers": 64,
        "hidden_size": 2560,
        "num_heads": 80,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 128,
        "vocab_size": 50288,
        "tie_word_embeddings": True,
    },
    "falcon-mamba-7b": {
        "model_type": "falcon_mamba",
        "dtype": "bfloat16",
        "num_hidden_layers": 64,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "state_size": 16,
        "time_step_rank": 256,
        "vocab_size": 65024,
        "tie_word_embeddings": False,
    },
    "recurrentgemma-2b": _recurrent_gemma(2560, 26),
    "recurrentgemma-9b": _recurrent_gemma(4096, 38),
}

# meta-llama and Qwen, attention only, to compare with: config.json as transformers' tests and model cards quote it.
ATTENTION: Mapping[str, Fields] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
    },
}

CONFIGS: Mapping[str, Fields] = {
    **JAMBA,
    **ZAMBA,
    **GRANITE,
    **BAMBA,
    **FALCON_H1,
    **NEMOTRON,
    **LFM2,
    **DELTA_NETS,
    **KIMI,
    **RECURRENT,
    **ATTENTION,
}
