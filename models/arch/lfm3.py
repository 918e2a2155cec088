"""LFM3: gated short convolutions, attention, some in a window, each followed by an MLP; norms around each part."""

from collections.abc import Callable

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.arch.lfm2 import short_conv, swiglu
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.short_conv import ShortConv
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer, SandwichLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Lfm3":
    return Lfm3(config, weights, ops, dtype)


class Lfm3(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        num_layers = config.integer("num_hidden_layers")
        default = [_default_kind(i) for i in range(num_layers)]
        kinds = config.each_layer("layer_types", num_layers, list(_MIXERS), default)
        layers = (
            _layer(kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype) for i, kind in enumerate(kinds)
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.embedding_norm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", True),
        )


def _layer(kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer | SandwichLayer:
    def norm(name: str) -> Norm:
        return hidden_norm(name, config, weights, ops, _eps(config))

    mixer, mixer_norm = _MIXERS[kind](config, weights, ops, dtype), norm("operator_norm")
    mixed_norm = norm("post_operator_norm") if config.flag("use_sandwich_norm", True) else None
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 7680)
    mlp, mlp_norm = swiglu(hidden, inner, Scope(weights, "feed_forward."), ops), norm("ffn_norm")
    if mixed_norm is None:
        return PreNormLayer(mixer, mixer_norm, mlp, mlp_norm)
    return SandwichLayer(mixer, mixer_norm, mixed_norm, mlp, mlp_norm, norm("post_ffn_norm"))


def _default_kind(index: int) -> str:
    if index % 4 == 2:
        return "full_attention"
    return "sliding_attention" if index % 4 == 0 and index > 0 else "conv"


def _full_attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    return _attention("full_attention", None, config, weights, ops, dtype)


def _sliding_attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    return _attention("sliding_attention", config.integer("sliding_window", 256), config, weights, ops, dtype)


def _attention(
    kind: str, window: int | None, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype
) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads", 16)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=4)
    head_dim = config.integer("head_dim", 128)
    bias = config.flag("attention_bias", False)
    gated = config.flag("use_attention_gate", True)
    weights = Scope(weights, "self_attn.")
    gate = "g_proj" if weights.has("g_proj.weight") else "gate_proj"  # transformers 5's name, the published one
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype, gate=int(gated)),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=bias),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, head_dim, theta=1e6, rope=config.rope(kind, default=ROPE)),
        q_norm=Norm(ops, weights, "q_norm", head_dim, _eps(config)),
        k_norm=Norm(ops, weights, "k_norm", head_dim, _eps(config)),
        window=window,
        head_gate=linear(ops, weights, {gate: num_heads}, hidden) if gated else None,
    )


_MIXERS: dict[str, Callable[[Config, Weights, Ops, torch.dtype], ShortConv | Attention]] = {
    "conv": short_conv,
    "full_attention": _full_attention,
    "sliding_attention": _sliding_attention,
}


def _eps(config: Config) -> float:
    return config.number("norm_eps", 1e-5)
