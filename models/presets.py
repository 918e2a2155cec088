"""Shapes of well-known hybrid models, for questions that need no weights.

Architectures that we can load are written as the fields of config.json that decide shapes, and go through the same code
as a real folder. The others are written as shapes. Each names the model it was read from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models import loading
from hybrid_cache.models.shapes import AttentionShape, LayerShape, Mamba2Shape, MLPShape, ModelShape
from hybrid_cache.spec import AttentionSpec, PrefillCost, StateSpec

BF16 = torch.bfloat16


def preset(name: str) -> ModelShape:
    """A model of `PRESETS` by name."""
    if name not in _BUILDERS:
        raise ModelError(f"{name!r} is not a preset; presets: {', '.join(PRESETS)}")
    return _BUILDERS[name]()


def model_shape(name_or_path: str) -> ModelShape:
    """A preset, or the model of a folder with a config.json, or of such a file. A preset's name comes first."""
    if name_or_path in _BUILDERS:
        return preset(name_or_path)
    path = Path(name_or_path)
    if not path.exists():
        raise ModelError(f"{name_or_path!r} is neither a preset nor a config.json; presets: {', '.join(PRESETS)}")
    config = loading.load_config(path) if path.is_dir() else loading.read_config(path)
    try:
        shape = loading.describe(config).shape
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{path}: {e}; presets: {', '.join(PRESETS)}") from e
    except ModelError as e:
        raise ModelError(f"{path}: {e}") from e
    return replace(shape, name=(path if path.is_dir() else path.parent).resolve().name)


def _granite(**sizes: object) -> dict[str, object]:
    return {
        "model_type": "granitemoehybrid",
        "dtype": "bfloat16",
        "num_hidden_layers": 40,
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "max_position_embeddings": 131072,
        "vocab_size": 100352,
        "tie_word_embeddings": True,
        **sizes,
    }


# The fields of config.json that decide shapes, with the model's name on the Hugging Face hub. They come from model
# cards, configs quoted elsewhere and transformers' defaults, not from the files on the hub; a test compares the
# number of parameters that they make with the published one. Nothing else vouches for the adapter_rank of Zamba2.
CONFIGS: Mapping[str, Mapping[str, object]] = {
    # ai21labs/AI21-Jamba-1.5-Mini, the defaults of JambaConfig: 4 attention and 28 Mamba layers, experts in 16
    "jamba-1.5-mini": {
        "model_type": "jamba",
        "dtype": "bfloat16",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "max_position_embeddings": 262144,
        "vocab_size": 65536,
    },
    # Zyphra/Zamba2-7B: 81 Mamba-2 layers; two shared blocks take turns before 13 of them
    "zamba2-7b": {
        "model_type": "zamba2",
        "dtype": "bfloat16",
        "num_hidden_layers": 81,
        "layers_block_type": [
            "hybrid" if i in (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77) else "mamba" for i in range(81)
        ],
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_mem_blocks": 2,
        "adapter_rank": 128,
        "use_mem_rope": True,
        "n_mamba_heads": 112,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 2,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
    },
    # ibm-granite/granite-4.0-h-tiny, from its card; the places of the attention layers decide no sum
    "granite-4-h-tiny": _granite(
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=4,
        mamba_n_heads=48,
        num_local_experts=64,
        num_experts_per_tok=6,
        intermediate_size=512,
        shared_intermediate_size=1024,
    ),
    # ibm-granite/granite-4.0-h-small, from the same card
    "granite-4-h-small": _granite(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        mamba_n_heads=128,
        num_local_experts=72,
        num_experts_per_tok=10,
        intermediate_size=768,
        shared_intermediate_size=1536,
    ),
}


def _from_config(name: str) -> ModelShape:
    return replace(loading.describe(CONFIGS[name]).shape, name=name)


def _embedded() -> ModelShape:
    shape = loading.describe(loading.load_config(loading.embedded_path())).shape
    return replace(shape, name="embedded")


def _nvidia_hybrid() -> ModelShape:
    """nvidia/mamba2-hybrid-8b-3t-4k (Waleffe et al. 2024), the model of the Marconi paper.

    Width, heads and KV groups from the Megatron-LM script that serves it. The plain MLP of four times the width is the
    paper's 16 L D^2; with the 8 Mamba groups and the 256k vocabulary of its family it makes the published 8.66 billion
    parameters. The order of its layers is ours; no sum depends on it.
    """
    mamba = Mamba2Shape(4096, num_heads=128, head_dim=64, d_state=128, num_groups=8, conv_width=4, dtype=BF16)
    attention = AttentionShape(4096, 4096, num_heads=32, num_kv_heads=8, head_dim=128, dtype=BF16)
    layers = _nvidia_layers(mamba, attention, MLPShape(4096, 16384, gated=False))
    return ModelShape("nvidia-hybrid-7b", layers, 4096, 256000, BF16)


def _nvidia_layers(mamba: LayerShape, attention: LayerShape, mlp: LayerShape) -> tuple[LayerShape, ...]:
    """24 Mamba-2, 4 attention and 28 MLP layers."""
    return (*(mamba, mlp) * 6, attention, mlp) * 4


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """A layer of which a paper gives the results and not the sizes."""

    cost: PrefillCost
    cache: AttentionSpec | StateSpec | None = None


def nvidia_hybrid_as_published(num_mamba: int = 24, num_attention: int = 4, d_state: int = 128) -> ModelShape:
    """The same model by the Marconi paper's formulas (arXiv 2411.19379), to see its order of policies again.

    L tokens, width D, state N; the bytes are of float16:

        attention   8 L D^2 + 4 L^2 D             4 L D           every head has keys of its own, and all pairs count
        MLP         16 L D^2
        Mamba       12 L D^2 + 16 L D N + 10 L D  2 D N + 8 (2 D + 2 N)   state without expansion, window of 4 rows

    Other numbers of layers and other states than the model's are those of the paper's ablations.
    """
    D, N = 4096, d_state
    fp16 = torch.float16
    # The sum over tokens p < L of a + b p is (a - b / 2) L + b L^2 / 2, hence the 4 D.
    attention = PublishedShape(PrefillCost(8.0 * D * D + 4.0 * D, 8.0 * D), AttentionSpec(32, D // 32, fp16))
    # A StateSpec counts float32: half as many numbers take the bytes of D N numbers in float16.
    state = StateSpec((4, 2 * D + 2 * N), (D, N // 2), fp16)
    mamba = PublishedShape(PrefillCost(12.0 * D * D + 16.0 * D * N + 10.0 * D, 0.0), state)
    mlp = PublishedShape(PrefillCost(16.0 * D * D, 0.0))
    layers = (*(mamba,) * num_mamba, *(attention,) * num_attention, *(mlp,) * 28)
    return ModelShape("nvidia-hybrid-7b-as-published", layers, D, 256000, fp16)


def _nemotron_h() -> ModelShape:
    """nvidia/Nemotron-H-8B-Base-8K, the defaults of NemotronHConfig."""
    parts: dict[str, LayerShape] = {
        "M": Mamba2Shape(4096, num_heads=128, head_dim=64, d_state=128, num_groups=8, conv_width=4, dtype=BF16),
        "*": AttentionShape(4096, 4096, num_heads=32, num_kv_heads=8, head_dim=128, dtype=BF16),
        "-": MLPShape(4096, 21504, gated=False),
    }
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # its hybrid_override_pattern
    return ModelShape("nemotron-h-8b", tuple(parts[part] for part in pattern), 4096, 131072, BF16)


def _bamba() -> ModelShape:
    """ibm-ai-platform/Bamba-9B-v1 (once ibm-fms/Bamba-9B): 3 attention and 29 Mamba-2 layers, an MLP after each."""
    mamba = Mamba2Shape(4096, num_heads=128, head_dim=64, d_state=128, num_groups=1, conv_width=4, dtype=BF16)
    attention = AttentionShape(4096, 4096, num_heads=32, num_kv_heads=8, head_dim=128, dtype=BF16)
    mlp = MLPShape(4096, 14336)
    mixers: list[LayerShape] = [attention if i in (9, 18, 27) else mamba for i in range(32)]
    return ModelShape("bamba-9b", tuple(part for mixer in mixers for part in (mixer, mlp)), 4096, 128256, BF16)


def _falcon_h1() -> ModelShape:
    """tiiuae/Falcon-H1-7B-Base: both mixers side by side in each of 44 layers. Its Mamba-2 does not expand."""
    mamba = Mamba2Shape(3072, num_heads=24, head_dim=128, d_state=256, num_groups=1, conv_width=4, dtype=BF16)
    attention = AttentionShape(3072, 3072, num_heads=12, num_kv_heads=2, head_dim=128, dtype=BF16)
    return ModelShape("falcon-h1-7b", (mamba, attention, MLPShape(3072, 12288)) * 44, 3072, 130048, BF16)


_BUILDERS: Mapping[str, Callable[[], ModelShape]] = {
    "nvidia-hybrid-7b": _nvidia_hybrid,
    "nvidia-hybrid-7b-as-published": nvidia_hybrid_as_published,
    **{name: partial(_from_config, name) for name in CONFIGS},
    "nemotron-h-8b": _nemotron_h,
    "bamba-9b": _bamba,
    "falcon-h1-7b": _falcon_h1,
    "embedded": _embedded,
}
PRESETS = tuple(_BUILDERS)
