"""RecurrentGemma (Griffin): recurrent layers and, every few, attention over a window; an MLP after each."""

from collections.abc import Callable

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.rg_lru import RgLru
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, RgLruShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

TRAINED_LENGTH = 8192  # tokens (Botev et al. 2024); the config names none


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "RecurrentGemma":
    return RecurrentGemma(config, weights, ops, dtype)


class RecurrentGemma(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_activation", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"])
        root = torch.tensor(config.integer("hidden_size") ** 0.5, dtype=torch.bfloat16)
        layers = (
            _layer(kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i, kind in enumerate(_kinds(config))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=_norm("model.final_norm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", True),
            embedding_multiplier=root.item(),  # rounded for every dtype of the rows
            max_length=TRAINED_LENGTH,
            logits_cap=config.positive("logits_soft_cap", 30.0),
        )


def _layer(kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    return PreNormLayer(
        _MIXERS[kind](config, Scope(weights, "temporal_block."), ops, dtype),
        _norm("temporal_pre_norm", config, weights, ops),
        _mlp(config, Scope(weights, "mlp_block."), ops),
        _norm("channel_pre_norm", config, weights, ops),
    )


def _kinds(config: Config) -> list[str]:
    """The config's pattern, over and over."""
    pattern = config.words("block_types", list(_MIXERS), ["recurrent", "recurrent", "attention"])
    return [pattern[i % len(pattern)] for i in range(config.integer("num_hidden_layers"))]


def _recurrent(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> RgLru:
    hidden = config.integer("hidden_size")
    width = config.integer("lru_width", hidden)
    shape = RgLruShape(
        hidden=hidden,
        width=width,
        num_blocks=config.divisor("num_attention_heads", width, default=10),
        conv_width=config.integer("conv1d_width", 4, at_least=2),
        dtype=dtype,
    )
    return RgLru(ops, weights, shape)


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.divisor("num_attention_heads", hidden, default=10)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = hidden // num_heads
    bias = config.flag("attention_bias", False)
    rotated = config.rope().number("partial_rotary_factor", config.number("partial_rotary_factor", 0.5))
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=True),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, int(head_dim * rotated)),
        window=config.integer("attention_window_size", 2048),
    )


BuildMixer = Callable[[Config, Weights, Ops, torch.dtype], Attention | RgLru]
_MIXERS: dict[str, BuildMixer] = {"recurrent": _recurrent, "attention": _attention}


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 7680, at_least=2) // 2
    return gated_mlp(hidden, inner, weights, ops, bias=True, gate_mul=ops.gelu_tanh_mul)


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6), plus_one=True)
