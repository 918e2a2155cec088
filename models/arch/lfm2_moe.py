"""LFM2-MoE: LFM2 with experts in place of the MLP in all but the first layers."""

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.arch.lfm2 import Lfm2, swiglu
from hybrid_cache.models.blocks.common import linear
from hybrid_cache.models.blocks.feed_forward import MLP, MoE, SigmoidRouter, expert_matrices
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import MoEShape
from hybrid_cache.models.weights import ModelWeights, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Lfm2Moe":
    return Lfm2Moe(config, weights, ops, dtype, _feed_forward)


class Lfm2Moe(Lfm2):
    """Only the feed-forward parts differ."""


def _feed_forward(index: int, config: Config, weights: Weights, ops: Ops) -> MLP | MoE:
    if index < config.integer("num_dense_layers", 2, at_least=0):
        return swiglu(config.integer("hidden_size"), config.integer("intermediate_size"), weights, ops)
    num_experts = config.integer("num_experts", 32)
    shape = MoEShape(
        hidden=config.integer("hidden_size"),
        inner=config.integer("moe_intermediate_size"),
        num_experts=num_experts,
        num_active=config.integer("num_experts_per_tok", 4, at_most=num_experts),
    )
    return MoE(
        shape,
        router=linear(ops, weights, {"gate": num_experts}, shape.hidden, coded=False),
        experts=ops.experts(*expert_matrices(weights, shape, gate="w1", up="w3", down="w2")),
        route=SigmoidRouter(
            weights.take_float32("expert_bias", num_experts) if config.flag("use_expert_bias", True) else None,
            eps=1e-6 if config.flag("norm_topk_prob", True) else None,
            scale=config.number("routed_scaling_factor", 1.0),
        ),
    )
