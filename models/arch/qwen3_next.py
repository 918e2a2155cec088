"""Qwen3-Next: gated delta nets and a few gated attention layers, each followed by experts or an MLP."""

from collections.abc import Callable

import torch

from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, linear
from hybrid_cache.models.blocks.feed_forward import (
    MLP,
    GatedSharedMoE,
    chosen_of_softmax,
    expert_matrices,
    gated_mlp,
    softmax_of_chosen,
)
from hybrid_cache.models.blocks.gated_delta import GatedDelta
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, GatedDeltaShape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

Projection = Callable[[GatedDeltaShape, Weights, Ops], Linear]
BuildFeedForward = Callable[[int, Config, Weights, Ops], MLP | GatedSharedMoE]


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Qwen3Next":
    return Qwen3Next(config, weights, ops, dtype, _delta_projection, _feed_forward)


class Qwen3Next(CausalModel):
    def __init__(
        self,
        config: Config,
        weights: ModelWeights,
        ops: Ops,
        dtype: torch.dtype,
        delta_projection: Projection,
        feed_forward: BuildFeedForward,
    ) -> None:
        """
        delta_projection  builds the first projection of a delta net
        feed_forward      builds what follows the mixer of the layer with a given number
        """
        config.choice("hidden_act", "silu", ["silu"])
        weights.ignore(r"(?:^|\.)mtp\.")  # multi-token prediction
        layers = (
            _layer(i, kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype, delta_projection, feed_forward)
            for i, kind in enumerate(_kinds(config))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=_norm("model.norm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", False),
        )


def _layer(
    index: int,
    kind: str,
    config: Config,
    weights: Weights,
    ops: Ops,
    dtype: torch.dtype,
    delta_projection: Projection,
    feed_forward: BuildFeedForward,
) -> PreNormLayer:
    mixer: GatedDelta | Attention
    if kind == "linear_attention":
        mixer = _delta_net(config, Scope(weights, "linear_attn."), ops, dtype, delta_projection)
    else:
        mixer = _attention(config, Scope(weights, "self_attn."), ops, dtype)
    return PreNormLayer(
        mixer,
        _norm("input_layernorm", config, weights, ops),
        feed_forward(index, config, Scope(weights, "mlp."), ops),
        _norm("post_attention_layernorm", config, weights, ops),
    )


def _kinds(config: Config) -> tuple[str, ...]:
    """'linear_attention' or 'full_attention' for each layer."""
    num_layers = config.integer("num_hidden_layers")
    every = config.integer("full_attention_interval", 4)
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
    return config.each_layer("layer_types", num_layers, ["linear_attention", "full_attention"], default)


def _delta_net(
    config: Config, weights: Weights, ops: Ops, dtype: torch.dtype, delta_projection: Projection
) -> GatedDelta:
    num_heads = config.integer("linear_num_value_heads", 32)
    shape = GatedDeltaShape(
        hidden=config.integer("hidden_size"),
        num_heads=num_heads,
        num_groups=config.divisor("linear_num_key_heads", num_heads, default=16),
        head_dim=config.integer("linear_value_head_dim", 128),
        d_state=config.integer("linear_key_head_dim", 128),
        conv_width=config.integer("linear_conv_kernel_dim", 4, at_least=2),
        dtype=dtype,
    )
    return GatedDelta(
        ops,
        weights,
        shape,
        delta_projection(shape, weights, ops),
        weights.take("conv1d.weight", shape.channels, 1, shape.conv_width).view(shape.channels, shape.conv_width),
        Norm(ops, weights, "norm", shape.head_dim, _eps(config)),
        linear(ops, weights, {"out_proj": shape.hidden}, shape.inner),
    )


def _delta_projection(shape: GatedDeltaShape, weights: Weights, ops: Ops) -> Linear:
    """The file has the rows of query, key, values and gates of one key head together, then those of the next."""
    s = shape
    heads = s.num_heads // s.num_groups
    values = heads * s.head_dim
    qkvz = weights.take("in_proj_qkvz.weight", 2 * s.keys + 2 * s.inner, s.hidden)
    ba = weights.take("in_proj_ba.weight", 2 * s.num_heads, s.hidden)
    parts = [
        *qkvz.view(s.num_groups, -1, s.hidden).split_with_sizes([s.d_state, s.d_state, values, values], dim=1),
        *ba.view(s.num_groups, -1, s.hidden).split_with_sizes([heads, heads], dim=1),
    ]
    return ops.linear(weights.scheme.matrix(torch.cat([part.flatten(0, 1) for part in parts])))


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads", 16)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=2)
    head_dim = config.integer("head_dim", 256)
    rotated = config.rope().positive("partial_rotary_factor", config.number("partial_rotary_factor", 0.25))
    bias = config.flag("attention_bias", False)
    qkv = {"q_proj": 2 * num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype, gate=head_dim),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=bias),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, int(head_dim * rotated)),
        q_norm=Norm(ops, weights, "q_norm", head_dim, _eps(config), plus_one=True),
        k_norm=Norm(ops, weights, "k_norm", head_dim, _eps(config), plus_one=True),
        gated=True,
    )


def _feed_forward(index: int, config: Config, weights: Weights, ops: Ops) -> MLP | GatedSharedMoE:
    num_experts = config.integer("num_experts", 512, at_least=0)
    dense = index in config.integers("mlp_only_layers", [])
    if dense or num_experts == 0 or (index + 1) % config.integer("decoder_sparse_step", 1):
        return mlp(config, "intermediate_size", 5632, weights, ops)
    num_active = config.integer("num_experts_per_tok", 10, at_most=num_experts)
    return moe(config, num_experts, num_active, config.flag("norm_topk_prob", True), weights, ops)


def moe(
    config: Config, num_experts: int, num_active: int, normalised: bool, weights: Weights, ops: Ops
) -> GatedSharedMoE:
    """`normalised`: the weights of the chosen experts add up to one."""
    hidden, inner = config.integer("hidden_size"), config.integer("moe_intermediate_size", 512)
    shape = MoEShape(hidden, inner, num_experts, num_active)
    return GatedSharedMoE(
        shape,
        router=linear(ops, weights, {"gate": num_experts, "shared_expert_gate": 1}, shape.hidden, coded=False),
        experts=ops.experts(*expert_matrices(weights, shape)),
        route=softmax_of_chosen if normalised else chosen_of_softmax,
        shared=mlp(config, "shared_expert_intermediate_size", 512, Scope(weights, "shared_expert."), ops),
    )


def mlp(config: Config, width: str, default: int, weights: Weights, ops: Ops) -> MLP:
    """`width`: name of the field that says how wide it is."""
    hidden, inner = config.integer("hidden_size"), config.integer(width, default)
    return gated_mlp(hidden, inner, weights, ops)


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), _eps(config), plus_one=True)


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
