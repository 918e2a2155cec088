"""Ling 3 (bailing hybrid): Kimi delta attention, at each group's end gated latent attention; then an MLP or experts."""

import torch

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.arch.kimi_linear import conv_weight, latent_shape, mlp, mlp_kinds, moe
from hybrid_cache.models.blocks.attention import Rotary
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, SharedMoE
from hybrid_cache.models.blocks.gated_delta import KimiDelta
from hybrid_cache.models.blocks.latent_attention import LatentAttention
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import KimiDeltaShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "BailingHybrid":
    return BailingHybrid(config, weights, ops, dtype)


class BailingHybrid(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        config.refuse("tie_word_embeddings")
        kinds = _kinds(config)
        for i in range(config.integer(config.either("num_nextn_predict_layers", "num_mtp_layers"), 1, at_least=0)):
            weights.ignore(rf"^model\.layers\.{len(kinds) + i}\.")  # multi-token prediction
        layers = (
            _layer(kind, mlp_kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i, (kind, mlp_kind) in enumerate(zip(kinds, mlp_kinds(config, 2), strict=True))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.norm", config, weights, ops, _eps(config)),
            tied=False,
            embedding="model.word_embeddings.weight",
            max_length=config.integer(config.either("max_position_embeddings", "model_max_length"), 262144),
        )


def _layer(kind: str, mlp_kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    mixer = _delta if kind == "linear_attention" else _attention
    return PreNormLayer(
        mixer(config, Scope(weights, "attention."), ops, dtype),
        hidden_norm("input_layernorm", config, weights, ops, _eps(config)),
        _feed_forward(mlp_kind, config, Scope(weights, "mlp."), ops),
        hidden_norm("post_attention_layernorm", config, weights, ops, _eps(config)),
    )


def _kinds(config: Config) -> tuple[str, ...]:
    """'linear_attention' or 'full_attention' for each layer."""
    num_layers, group = config.integer("num_hidden_layers"), config.integer("layer_group_size", 6)
    default = ["linear_attention" if (i + 1) % group else "full_attention" for i in range(num_layers)]
    return config.each_layer("layer_types", num_layers, ["linear_attention", "full_attention"], default)


def _delta(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> KimiDelta:
    """Sizes go by the names that transformers 5 writes, where it wrote them: there `head_dim` is that of attention."""
    shape = s = KimiDeltaShape(
        hidden=config.integer("hidden_size"),
        num_heads=config.integer(config.either("linear_num_heads", "num_attention_heads"), 32),
        head_dim=config.integer(config.either("linear_head_dim", "head_dim"), 128),
        conv_width=config.integer(config.either("linear_conv_kernel_dim", "short_conv_kernel_size"), 4, at_least=2),
        dtype=dtype,
        gate_rank=None,
    )
    parts = {**{f"{name}_proj": s.inner for name in "qkv"}, "b_proj": s.num_heads, "f_proj": s.inner, "g_proj": s.inner}
    lowest = config.number("kda_lower_bound", -5.0)
    if not lowest < 0:
        raise ModelError(f"config.json: kda_lower_bound is {lowest}, expected a number below 0")
    return KimiDelta(
        ops,
        weights,
        shape,
        linear(ops, weights, parts, s.hidden),
        conv_weight(weights, s),
        Norm(ops, weights, "o_norm", s.head_dim, _eps(config)),
        linear(ops, weights, {"dense": s.hidden}, s.inner),
        decay=None,
        gate=None,
        rate=weights.take_float32("A_log", s.num_heads).exp(),
        lowest=lowest if config.flag("kda_safe_gate", True) else None,
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> LatentAttention:
    shape = latent_shape(config, dtype, q_rank=None, gate=1)
    bias = config.flag("attention_bias", False)
    config.rope().choice("rope_type", "default", ["default"])  # with another, queries would have another scale
    return LatentAttention(
        ops,
        weights,
        shape,
        linear(ops, weights, {"dense": shape.hidden}, shape.num_heads * shape.value_dim, bias=bias),
        bias=bias,
        norm_eps=1e-6,
        rotary=Rotary(ops, config, shape.shared_dim, theta=6e6),
        head_gate=linear(ops, weights, {"g_proj": shape.num_heads}, shape.hidden),
    )


def _feed_forward(kind: str, config: Config, weights: Weights, ops: Ops) -> MLP | SharedMoE:
    if kind == "dense":
        return mlp(config, config.integer("intermediate_size"), weights, ops)
    num_experts = config.integer(config.either("num_experts", "num_local_experts"), 512)
    names = ("gate_proj", "up_proj", "down_proj")
    return moe(config, num_experts, 8, 4, 2.5, names, weights, ops, bias="expert_bias")


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
