"""OLMo hybrid: gated delta nets with norms before each part, a few attention layers with norms after each part."""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.gated_delta import GatedDelta
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PostNormLayer, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, GatedDeltaShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "OlmoHybrid":
    return OlmoHybrid(config, weights, ops, dtype)


class OlmoHybrid(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        layers = (
            _LAYERS[kind](config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i, kind in enumerate(_kinds(config))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=_norm(["model.norm"], config, weights, ops),
            tied=config.flag("tie_word_embeddings", False),
        )


def _delta_layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    return PreNormLayer(
        _delta_net(config, Scope(weights, "linear_attn."), ops, dtype),
        _norm(["attention_layer_norm", "input_layernorm"], config, weights, ops),
        _mlp(config, Scope(weights, "mlp."), ops),
        _norm(["feedforward_layer_norm", "post_attention_layernorm"], config, weights, ops),
    )


def _attention_layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PostNormLayer:
    return PostNormLayer(
        _attention(config, Scope(weights, "self_attn."), ops, dtype),
        # transformers 5 writes this norm under the name that it reads for a delta layer's second norm.
        _norm(["post_attention_layernorm", "feedforward_layer_norm"], config, weights, ops),
        _mlp(config, Scope(weights, "mlp."), ops),
        _norm(["post_feedforward_layernorm"], config, weights, ops),
    )


_LAYERS: dict[str, Callable[[Config, Weights, Ops, torch.dtype], PreNormLayer | PostNormLayer]] = {
    "linear_attention": _delta_layer,
    "full_attention": _attention_layer,
}


def _kinds(config: Config) -> tuple[str, ...]:
    num_layers = config.integer("num_hidden_layers")
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)]
    if num_layers < 4:
        default[-1] = "full_attention"
    return config.each_layer("layer_types", num_layers, list(_LAYERS), default)


def _delta_net(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> GatedDelta:
    hidden, num_attention_heads = config.integer("hidden_size"), config.integer("num_attention_heads", 30)
    num_heads = config.integer("linear_num_value_heads", num_attention_heads)
    num_groups = config.divisor("linear_num_key_heads", num_heads, default=num_attention_heads)
    d_state = config.integer("linear_key_head_dim", int(0.75 * hidden / num_groups))
    shape = GatedDeltaShape(
        hidden=hidden,
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=config.integer("linear_value_head_dim", 2 * d_state),
        d_state=d_state,
        conv_width=config.integer("linear_conv_kernel_dim", 4, at_least=2),
        dtype=dtype,
    )
    s, keys = shape, shape.keys
    parts = {"q": keys, "k": keys, "v": s.inner, "g": s.inner, "b": s.num_heads, "a": s.num_heads}
    return GatedDelta(
        ops,
        weights,
        shape,
        linear(ops, weights, {f"{name}_proj": size for name, size in parts.items()}, hidden),
        _conv_weight(weights, shape),
        Norm(ops, weights, "o_norm", s.head_dim, 1e-5),
        linear(ops, weights, {"o_proj": hidden}, s.inner),
        max_beta=2.0 if config.flag("linear_allow_neg_eigval", True) else 1.0,
    )


def _conv_weight(weights: Weights, s: GatedDeltaShape) -> Tensor:
    """Three tensors, which transformers 5 joins and cuts in thirds where it saves them; or the joined one."""
    parts = ["conv1d.weight"] if weights.has("conv1d.weight") else [f"{name}_conv1d.weight" for name in "qkv"]
    return weights.take_joined(parts, s.channels, 1, s.conv_width).view(s.channels, s.conv_width)


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.divisor("num_attention_heads", hidden, default=30)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = hidden // num_heads
    bias = config.flag("attention_bias", False)
    qkv = {"q_proj": hidden, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, hidden, bias=bias),
        scale=head_dim**-0.5,
        rotary=None if config.rope_is_off() else Rotary(ops, config, head_dim),
        q_norm=Norm(ops, weights, "q_norm", hidden, _eps(config)),
        k_norm=Norm(ops, weights, "k_norm", num_kv_heads * head_dim, _eps(config)),
    )


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 11008)
    return gated_mlp(hidden, inner, weights, ops)


def _norm(names: list[str], config: Config, weights: Weights, ops: Ops) -> Norm:
    """`names`: what it is called, in the order in which we look."""
    name = next((n for n in names if weights.has(f"{n}.weight")), names[0])
    return Norm(ops, weights, name, config.integer("hidden_size"), _eps(config))


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
