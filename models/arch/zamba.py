"""Zamba: a Mamba-1 backbone; before some of its layers, one transformer block that they all share.

The shared block reads the stream concatenated with the original embedding. Each use has its own KV rows. No positions.
"""

import torch

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.mamba import Mamba1Heads
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.shared_block import HybridLayer, MambaLayer, SharedBlock, SharedBlockStack
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba1Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Zamba":
    return Zamba(config, weights, ops, dtype)


class Zamba(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        block: SharedBlock | None = None
        layers: list[MambaLayer | HybridLayer] = []
        for i, kind in enumerate(_kinds(config)):
            name = f"model.layers.{i}."
            layer_weights = Scope(weights, name)
            if kind == "mamba":
                layers.append(_mamba_layer(config, layer_weights, ops, dtype))
                continue
            if block is None or weights.has(f"{name}shared_transf.input_layernorm.weight"):  # a file may repeat it
                block = _block(config, Scope(layer_weights, "shared_transf."), ops, dtype)
            layers.append(_hybrid_layer(block, config, layer_weights, ops, dtype))
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=SharedBlockStack(layers),
            norm=hidden_norm("model.final_layernorm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", True),
        )


def _mamba_layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> MambaLayer:
    norm = hidden_norm("input_layernorm", config, weights, ops, _eps(config))
    return MambaLayer(norm, _mamba(config, Scope(weights, "mamba."), ops, dtype))


def _hybrid_layer(block: SharedBlock, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> HybridLayer:
    hidden = config.integer("hidden_size")
    inside = Scope(weights, "mamba_decoder.")
    return HybridLayer(
        block,
        linear(ops, weights, {"linear": hidden}, hidden),
        hidden_norm("input_layernorm", config, inside, ops, _eps(config)),
        _mamba(config, Scope(inside, "mamba."), ops, dtype),
    )


def _block(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> SharedBlock:
    return SharedBlock(
        _attention(config, Scope(weights, "self_attn."), ops, dtype),
        Norm(ops, weights, "input_layernorm", 2 * config.integer("hidden_size"), _eps(config)),
        _mlp(config, Scope(weights, "feed_forward."), ops),
        hidden_norm("pre_ff_layernorm", config, weights, ops, _eps(config)),
    )


def _kinds(config: Config) -> tuple[str, ...]:
    num_layers = config.integer("num_hidden_layers")
    period = config.integer("attn_layer_period", 6)
    offset = config.integer("attn_layer_offset", 4, at_least=0)
    turns = ["hybrid" if i % period == offset else "mamba" for i in range(num_layers - 3)]
    kinds = config.layer_kinds(num_layers, default=["mamba", "mamba", "hybrid", *turns])
    if "attention" in kinds:
        raise UnsupportedModel("config.json: layers_block_type contains 'attention', expected 'mamba' or 'hybrid'")
    return kinds


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba1Heads:
    config.choice("hidden_mamba_act", "silu", ["silu"])
    hidden = config.integer("hidden_size")
    inner = config.integer("mamba_expand", 2) * hidden
    shape = Mamba1Shape(
        hidden=hidden,
        inner=inner,
        d_state=config.integer("mamba_d_state", 16),
        dt_rank=config.integer_or_auto("mamba_dt_rank", -(-hidden // 16)),
        conv_width=config.integer("mamba_d_conv", 4, at_least=2),
        dtype=dtype,
    )
    return Mamba1Heads(
        ops,
        weights,
        shape,
        num_heads=config.divisor("n_mamba_heads", inner, default=2),
        conv_bias=config.flag("mamba_conv_bias", True),
        proj_bias=config.flag("mamba_proj_bias", False),
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    width = config.integer("attention_hidden_size", 2 * hidden)
    if width != 2 * hidden:
        raise ModelError(f"config.json: attention_hidden_size is {width}, expected twice the hidden size, {2 * hidden}")
    num_heads = config.integer("num_attention_heads", 16)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = config.integer("attention_head_dim", width // num_heads)
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(width, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, width),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim),
        scale=(head_dim / 2) ** -0.5,
        rotary=None,
    )


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    config.choice("hidden_act", "gelu", ["gelu"])
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 14848)
    return gated_mlp(hidden, inner, weights, ops, gate_mul=ops.gelu_mul)


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
