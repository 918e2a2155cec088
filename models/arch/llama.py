"""Llama and its many relatives: attention and a gated MLP in each layer, no state."""

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Llama":
    return Llama(config, weights, ops, dtype)


class Llama(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        layers = (
            _layer(config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.norm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
        )


def _layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    return PreNormLayer(
        _attention(config, Scope(weights, "self_attn."), ops, dtype),
        hidden_norm("input_layernorm", config, weights, ops, _eps(config)),
        _mlp(config, Scope(weights, "mlp."), ops),
        hidden_norm("post_attention_layernorm", config, weights, ops, _eps(config)),
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = config.integer("head_dim", hidden // num_heads)
    bias = config.flag("attention_bias", False)
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=bias),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, head_dim),
    )


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    return gated_mlp(hidden, inner, weights, ops, bias=config.flag("mlp_bias", False))


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
