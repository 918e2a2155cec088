"""Bamba: Mamba-2 and, in a few places, attention, each followed by an MLP. Half of each head is rotated."""

import torch

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba2Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Bamba":
    return Bamba(config, weights, ops, dtype)


class Bamba(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        num_layers = config.integer("num_hidden_layers")
        attention = _attention_layers(config, num_layers)
        layers = (
            _layer(i in attention, config, Scope(weights, f"model.layers.{i}."), ops, dtype) for i in range(num_layers)
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


def _layer(attention: bool, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    mixer = _attention if attention else _mamba
    return PreNormLayer(
        mixer(config, weights, ops, dtype),
        hidden_norm("input_layernorm", config, weights, ops, _eps(config)),
        _mlp(config, Scope(weights, "feed_forward."), ops),
        hidden_norm("pre_ff_layernorm", config, weights, ops, _eps(config)),
    )


def _attention_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    indices = config.integers("attn_layer_indices", [])
    if any(i >= num_layers for i in indices):
        raise ModelError(f"config.json: attn_layer_indices contains {max(indices)}, expected less than {num_layers}")
    return indices


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba2:
    hidden = config.integer("hidden_size")
    inner = config.integer("mamba_expand", 2) * hidden
    num_heads = config.integer("mamba_n_heads", 128)
    head_dim = config.integer_or_auto("mamba_d_head", inner // num_heads)
    if head_dim * num_heads != inner:
        raise ModelError(f"config.json: {num_heads} heads of {head_dim} do not make {inner} channels")
    dt_min, dt_max = config.interval("time_step_limit", (0.0, float("inf")))
    shape = Mamba2Shape(
        hidden=hidden,
        num_heads=num_heads,
        head_dim=head_dim,
        d_state=config.integer("mamba_d_state", 256),
        num_groups=config.divisor("mamba_n_groups", num_heads, default=1),
        conv_width=config.integer("mamba_d_conv", 4, at_least=2),
        dtype=dtype,
    )
    return Mamba2(
        ops,
        Scope(weights, "mamba."),
        shape,
        conv_bias=config.flag("mamba_conv_bias", True),
        proj_bias=config.flag("mamba_proj_bias", False),
        norm_eps=_eps(config),
        dt_min=dt_min,
        dt_max=dt_max,
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = config.integer("head_dim", hidden // num_heads)
    bias = config.flag("attention_bias", False)
    rotated = config.rope().positive("partial_rotary_factor", config.number("partial_rotary_factor", 0.5))
    if rotated > 1:
        raise ModelError(f"config.json: partial_rotary_factor is {rotated}, expected at most 1")
    weights = Scope(weights, "self_attn.")
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=bias),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, int(head_dim * rotated)),
    )


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    return gated_mlp(hidden, inner, weights, ops, bias=config.flag("mlp_bias", False))


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
