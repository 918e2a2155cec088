"""Jamba: Mamba-1 and attention layers, each followed by an MLP or, every few layers, by experts. No positions."""

import torch

from hybrid_cache.kernels.codes import joined
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, MoE, chosen_of_softmax, gated_mlp
from hybrid_cache.models.blocks.mamba import Mamba1
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba1Shape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Jamba":
    return Jamba(config, weights, ops, dtype)


class Jamba(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        layers = (
            _layer(i, config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.final_layernorm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
        )


def _layer(index: int, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    mixer = _attention if _is_turn(index, "attn_layer", 8, 4, config) else _mamba
    experts = config.integer("num_experts", 16) > 1 and _is_turn(index, "expert_layer", 2, 1, config)
    feed_forward = _moe if experts else _mlp
    return PreNormLayer(
        mixer(config, weights, ops, dtype),
        hidden_norm("input_layernorm", config, weights, ops, _eps(config)),
        feed_forward(config, Scope(weights, "feed_forward."), ops),
        hidden_norm("pre_ff_layernorm", config, weights, ops, _eps(config)),
    )


def _is_turn(index: int, what: str, period: int, offset: int, config: Config) -> bool:
    """Of each `{what}_period` layers, the one at `{what}_offset`."""
    period = config.integer(f"{what}_period", period)
    return index % period == config.integer(f"{what}_offset", offset, at_least=0, at_most=period - 1)


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba1:
    hidden = config.integer("hidden_size")
    shape = Mamba1Shape(
        hidden=hidden,
        inner=config.integer("mamba_expand", 2) * hidden,
        d_state=config.integer("mamba_d_state", 16),
        dt_rank=config.integer_or_auto("mamba_dt_rank", -(-hidden // 16)),
        conv_width=config.integer("mamba_d_conv", 4, at_least=2),
        dtype=dtype,
    )
    mamba = Scope(weights, "mamba.")
    return Mamba1(
        ops,
        mamba,
        shape,
        conv_bias=config.flag("mamba_conv_bias", True),
        proj_bias=config.flag("mamba_proj_bias", False),
        norm=lambda name, size: Norm(ops, mamba, name, size, _eps(config)),
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = config.integer("head_dim", hidden // num_heads)
    weights = Scope(weights, "self_attn.")
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim),
        scale=head_dim**-0.5,
        rotary=None,
    )


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    return gated_mlp(hidden, inner, weights, ops)


def _moe(config: Config, weights: Weights, ops: Ops) -> MoE:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    num_experts = config.integer("num_experts", 16)
    w_in, w_out = [], []
    for i in range(num_experts):
        expert = Scope(weights, f"experts.{i}.")
        w_in.append(joined([expert.take_matrix(f"{name}_proj.weight", inner, hidden) for name in ("gate", "up")]))
        w_out.append(expert.take_matrix("down_proj.weight", hidden, inner))
    num_active = config.integer("num_experts_per_tok", 2, at_most=num_experts)
    return MoE(
        MoEShape(hidden, inner, num_experts, num_active),
        router=linear(ops, weights, {"router": num_experts}, hidden, coded=False),
        experts=ops.experts(w_in, w_out),
        route=chosen_of_softmax,
    )


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
