"""Qwen3.5: Qwen3-Next with an MLP in every layer. Of a multimodal checkpoint, only the text model.

Its rotary positions have three sections, for time, height and width; of text all three are the position.
"""

import torch

from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models.arch.qwen3_next import Qwen3Next, mlp
from hybrid_cache.models.blocks.common import linear
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.config import Config
from hybrid_cache.models.names import TOWERS
from hybrid_cache.models.shapes import GatedDeltaShape
from hybrid_cache.models.weights import ModelWeights, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Qwen3_5":
    weights.ignore(TOWERS)
    return Qwen3_5(config.text(), weights, ops, dtype, delta_projection, _feed_forward)


class Qwen3_5(Qwen3Next):
    """Only projections and feed-forward parts differ."""


def delta_projection(shape: GatedDeltaShape, weights: Weights, ops: Ops) -> Linear:
    s = shape
    parts = {"qkv": s.channels, "z": s.inner, "b": s.num_heads, "a": s.num_heads}
    return linear(ops, weights, {f"in_proj_{name}": size for name, size in parts.items()}, s.hidden)


def _feed_forward(index: int, config: Config, weights: Weights, ops: Ops) -> MLP:
    return mlp(config, "intermediate_size", 12288, weights, ops)
