"""LFM2: gated short convolutions and a few attention layers, each followed by an MLP."""

from collections.abc import Callable

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, MoE, gated_mlp
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.short_conv import ShortConv
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, ShortConvShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

BuildFeedForward = Callable[[int, Config, Weights, Ops], MLP | MoE]


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Lfm2":
    return Lfm2(config, weights, ops, dtype, _mlp)


class Lfm2(CausalModel):
    def __init__(
        self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype, feed_forward: BuildFeedForward
    ) -> None:
        """`feed_forward` builds what follows the mixer of the layer with a given number."""
        layers = (
            _layer(i, kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype, feed_forward)
            for i, kind in enumerate(_kinds(config))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.embedding_norm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_embedding" if config.has("tie_embedding") else "tie_word_embeddings", True),
        )


def _layer(
    index: int,
    kind: str,
    config: Config,
    weights: Weights,
    ops: Ops,
    dtype: torch.dtype,
    feed_forward: BuildFeedForward,
) -> PreNormLayer:
    return PreNormLayer(
        _MIXERS[kind](config, weights, ops, dtype),
        hidden_norm("operator_norm", config, weights, ops, _eps(config)),
        feed_forward(index, config, Scope(weights, "feed_forward."), ops),
        hidden_norm("ffn_norm", config, weights, ops, _eps(config)),
    )


def _kinds(config: Config) -> tuple[str, ...]:
    """'conv' or 'full_attention' for each layer."""
    num_layers = config.integer("num_hidden_layers")
    attention = config.integers("full_attn_idxs", range(num_layers))
    default = ["full_attention" if i in attention else "conv" for i in range(num_layers)]
    return config.each_layer("layer_types", num_layers, list(_MIXERS), default)


def short_conv(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> ShortConv:
    shape = ShortConvShape(config.integer("hidden_size"), config.integer("conv_L_cache", 3, at_least=2), dtype)
    return ShortConv(ops, Scope(weights, "conv."), shape, bias=config.flag("conv_bias", False))


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads", 32)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=8)
    head_dim = config.integer("head_dim", hidden // num_heads)
    weights = Scope(weights, "self_attn.")
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden),
        linear(ops, weights, {"out_proj": hidden}, num_heads * head_dim),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, head_dim, theta=1e6),
        q_norm=Norm(ops, weights, "q_layernorm", head_dim, _eps(config)),
        k_norm=Norm(ops, weights, "k_layernorm", head_dim, _eps(config)),
    )


_MIXERS: dict[str, Callable[[Config, Weights, Ops, torch.dtype], ShortConv | Attention]] = {
    "conv": short_conv,
    "full_attention": _attention,
}


def _mlp(index: int, config: Config, weights: Weights, ops: Ops) -> MLP:
    return swiglu(config.integer("hidden_size"), _inner(config), weights, ops)


def swiglu(hidden: int, inner: int, weights: Weights, ops: Ops) -> MLP:
    """With the weight names that all LFM2 models use."""
    return gated_mlp(hidden, inner, weights, ops, names=("w1", "w3", "w2"))


def _inner(config: Config) -> int:
    """Width of the MLP: as it stands, or two thirds of it, times a factor, rounded up to a multiple."""
    inner = config.integer("block_ff_dim" if config.has("block_ff_dim") else "intermediate_size", 12288)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return inner
    inner = int(config.positive("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
    multiple = config.integer("block_multiple_of", 256)
    return -(-inner // multiple) * multiple


def _eps(config: Config) -> float:
    return config.number("norm_eps", 1e-5)
