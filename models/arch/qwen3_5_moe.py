"""Qwen3.5 with experts: Qwen3.5 with experts and a shared one in every layer."""

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.arch.qwen3_5 import delta_projection
from hybrid_cache.models.arch.qwen3_next import Qwen3Next, moe
from hybrid_cache.models.blocks.feed_forward import GatedSharedMoE
from hybrid_cache.models.config import Config
from hybrid_cache.models.names import TOWERS
from hybrid_cache.models.weights import ModelWeights, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Qwen3_5Moe":
    weights.ignore(TOWERS)
    return Qwen3_5Moe(config.text(), weights, ops, dtype, delta_projection, _feed_forward)


class Qwen3_5Moe(Qwen3Next):
    """Only projections and feed-forward parts differ."""


def _feed_forward(index: int, config: Config, weights: Weights, ops: Ops) -> GatedSharedMoE:
    num_experts = config.integer("num_experts", 256)
    num_active = config.integer("num_experts_per_tok", 8, at_most=num_experts)
    return moe(config, num_experts, num_active, True, weights, ops)
