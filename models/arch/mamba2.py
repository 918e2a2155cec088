"""Mamba-2: state-space layers and nothing else. No attention, so no pages: what is cached of a prefix is a state."""

import torch

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.common import hidden_norm
from hybrid_cache.models.blocks.mamba import Mamba2 as Mixer
from hybrid_cache.models.blocks.model import UNBOUNDED, CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, MixerLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import Mamba2Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Mamba2":
    return Mamba2(config, weights, ops, dtype)


class Mamba2(CausalModel):
    """Where the config names no longest context, it is `UNBOUNDED`."""

    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        layers = (
            _layer(config, Scope(weights, f"backbone.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        old = weights.has("backbone.embedding.weight")  # as in the first conversions of the authors' own format
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("backbone.norm_f", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
            embedding="backbone.embedding.weight" if old else "backbone.embeddings.weight",
            residual=torch.float32 if config.flag("residual_in_fp32", True) else dtype,
            max_length=UNBOUNDED,
        )


def _layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> MixerLayer:
    mixer = _mixer(config, Scope(weights, "mixer."), ops, dtype)
    return MixerLayer(mixer, hidden_norm("norm", config, weights, ops, _eps(config)), dtype)


def _mixer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mixer:
    config.choice("hidden_act", "silu", ["silu"])
    hidden = config.integer("hidden_size")
    inner = int(config.number("expand", 2) * hidden)
    num_heads, head_dim = config.integer("num_heads", 128), config.integer("head_dim", 64)
    if head_dim * num_heads != inner:
        raise ModelError(f"config.json: {num_heads} heads of {head_dim} do not make {inner} channels")
    dt_min, dt_max = config.interval("time_step_limit", (0.0, float("inf")))
    shape = Mamba2Shape(
        hidden=hidden,
        num_heads=num_heads,
        head_dim=head_dim,
        d_state=config.integer("state_size", 128),
        num_groups=config.divisor("n_groups", num_heads, default=8),
        conv_width=config.integer("conv_kernel", 4, at_least=2),
        dtype=dtype,
    )
    return Mixer(
        ops,
        weights,
        shape,
        conv_bias=config.flag("use_conv_bias", True),
        proj_bias=config.flag("use_bias", False),
        norm_eps=_eps(config),
        dt_min=dt_min,
        dt_max=dt_max,
    )


def _eps(config: Config) -> float:
    return config.number("layer_norm_epsilon", 1e-5)
