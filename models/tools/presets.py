"""Shapes of well-known models, for questions that need no weights.

Those of `published` go through the same code as a real folder. What no config says is written as a shape, with the
paper that it was read from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models import loading
from hybrid_cache.models.shapes import Advance, AttentionShape, LayerShape, Mamba2Shape, MLPShape, ModelShape
from hybrid_cache.models.tools.published import CONFIGS
from hybrid_cache.spec import AttentionSpec, PrefillCost, StateSpec

BF16 = torch.bfloat16


@cache
def preset(name: str) -> ModelShape:
    """A model of `PRESETS` by name. Raises ModelError."""
    if name not in _BUILDERS:
        raise ModelError(f"{name!r} is not a preset; presets: {', '.join(PRESETS)}")
    return _BUILDERS[name]()


def model_shape(name_or_path: str) -> ModelShape:
    """A preset, or the model of a folder with a config.json, or of such a file. A preset's name comes first.

    Raises ModelError.
    """
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

    kind: str
    cost: PrefillCost
    cache: AttentionSpec | StateSpec | None = None
    advance: Advance | None = None


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
    rows = AttentionSpec(32, D // 32, fp16)
    attention = PublishedShape("attention", PrefillCost(8.0 * D * D + 4.0 * D, 8.0 * D), rows, Advance.ROWS)
    # A StateSpec counts float32: half as many numbers take the bytes of D N numbers in float16.
    state = StateSpec((4, 2 * D + 2 * N), (D, N // 2), fp16)
    cost = PrefillCost(12.0 * D * D + 16.0 * D * N + 10.0 * D, 0.0)
    mamba = PublishedShape("Mamba", cost, state, Advance.ELEMENTWISE)
    mlp = PublishedShape("MLP", PrefillCost(16.0 * D * D, 0.0))
    layers = (*(mamba,) * num_mamba, *(attention,) * num_attention, *(mlp,) * 28)
    return ModelShape("nvidia-hybrid-7b-as-published", layers, D, 256000, fp16)


_BUILDERS: Mapping[str, Callable[[], ModelShape]] = {
    "nvidia-hybrid-7b": _nvidia_hybrid,
    "nvidia-hybrid-7b-as-published": nvidia_hybrid_as_published,
    **{name: partial(_from_config, name) for name in CONFIGS},
    "embedded": _embedded,
}
PRESETS = tuple(_BUILDERS)
