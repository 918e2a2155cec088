"""Mamba: state-space layers and nothing else. No positions, no keys: the state is all that a prompt leaves behind."""

from collections.abc import Callable

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.common import RowNorm, hidden_norm
from hybrid_cache.models.blocks.mamba import Mamba1
from hybrid_cache.models.blocks.model import UNBOUNDED, CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, MixerLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import Mamba1Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

BuildNorm = Callable[[str, int], RowNorm]


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Mamba":
    return Mamba(config, weights, ops, dtype)


class Mamba(CausalModel):
    def __init__(
        self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype, norm: BuildNorm | None = None
    ) -> None:
        """`norm` is that of `Mamba1`."""
        config.choice("hidden_act", "silu", ["silu"])
        layers = (
            _layer(config, Scope(weights, f"backbone.layers.{i}."), ops, dtype, norm)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("backbone.norm_f", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", True),
            embedding="backbone.embeddings.weight",
            residual=torch.float32 if config.flag("residual_in_fp32", True) else dtype,
            max_length=UNBOUNDED,
        )


def _layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype, norm: BuildNorm | None) -> MixerLayer:
    before = hidden_norm("norm", config, weights, ops, _eps(config))
    return MixerLayer(_mixer(config, Scope(weights, "mixer."), ops, dtype, norm), before, dtype)


def _mixer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype, norm: BuildNorm | None) -> Mamba1:
    hidden = config.integer("hidden_size")
    shape = Mamba1Shape(
        hidden=hidden,
        inner=config.integer("intermediate_size", int(config.number("expand", 2) * hidden)),
        d_state=config.integer("state_size", 16),
        dt_rank=config.integer_or_auto("time_step_rank", -(-hidden // 16)),
        conv_width=config.integer("conv_kernel", 4, at_least=2),
        dtype=dtype,
    )
    return Mamba1(
        ops,
        weights,
        shape,
        conv_bias=config.flag("use_conv_bias", True),
        proj_bias=config.flag("use_bias", False),
        norm=norm,
    )


def _eps(config: Config) -> float:
    return config.number("layer_norm_epsilon", 1e-5)
