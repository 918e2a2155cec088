"""MiniMax-Text: lightning attention and, every few layers, softmax attention; experts after each.

A layer normalises the stream itself: what its parts read is also what they are added to.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import CacheEntry, Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MoE, expert_matrices, softmax_of_chosen
from hybrid_cache.models.blocks.linear_attention import LightningAttention, alibi_slopes
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, LinearAttentionShape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "MiniMax":
    return MiniMax(config, weights, ops, dtype)


class MiniMax(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        weights.ignore(r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$")  # all follow from the sizes
        num_layers = config.integer("num_hidden_layers")
        usual = ["linear_attention" if i % 2 else "full_attention" for i in range(num_layers)]
        kinds = config.each_layer("layer_types", num_layers, list(_MIXERS), usual)
        layers = (
            Layer(i, kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype) for i, kind in enumerate(kinds)
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


class Layer:
    """A mixer, then experts; the stream is normalised before each, scaled, and added to its scaled output."""

    def __init__(self, index: int, kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        mixer, factors = _MIXERS[kind]
        self.mixer = mixer(index, config, Scope(weights, "self_attn."), ops, dtype)
        self._mixer_norm = hidden_norm("input_layernorm", config, weights, ops, _eps(config))
        self._mixer_factors = _factors(factors, config)
        self._moe = _moe(config, Scope(weights, "block_sparse_moe."), ops)
        self._moe_norm = hidden_norm("post_attention_layernorm", config, weights, ops, _eps(config))
        self._moe_factors = _factors("mlp", config)
        self.shapes = (self.mixer.shape, self._moe.shape)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        hidden = self._mixer_norm(hidden)
        return _weighed(hidden, self.mixer(hidden, batch, next(cache)), self._mixer_factors)

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        self.mixer.write(self._mixer_norm(hidden), batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        hidden = self._moe_norm(hidden)
        return _weighed(hidden, self._moe(hidden), self._moe_factors)


def _weighed(hidden: Tensor, y: Tensor, factors: tuple[float, float]) -> Tensor:
    """Overwrites both. In exact steps: a fused multiply-add may round differently at the end of a tensor."""
    hidden *= factors[0]
    y *= factors[1]
    hidden += y
    return hidden


def _factors(part: str, config: Config) -> tuple[float, float]:
    """Of the stream, and of what a part makes of it."""
    return config.number(f"{part}_alpha_factor", 1.0), config.number(f"{part}_beta_factor", 1.0)


def _head_dim(config: Config) -> int:
    size = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    rotated = config.integer("rotary_dim", size)
    if rotated != size:
        raise UnsupportedModel(f"config.json: rotary_dim is {rotated}, supported: the whole head, {size}")
    return size


def _linear_attention(index: int, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> LightningAttention:
    num_heads = config.integer("num_attention_heads")
    shape = LinearAttentionShape(config.integer("hidden_size"), num_heads, _head_dim(config), dtype)
    slower = 1 - index / (config.integer("num_hidden_layers") - 1 + 1e-5) + 1e-5  # deep layers remember longer
    norm = Norm(ops, weights, "norm", shape.inner, 1e-6)
    return LightningAttention(ops, weights, shape, slope=alibi_slopes(num_heads) * slower, norm=norm)


def _full_attention(_: int, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=8)
    head_dim = _head_dim(config)
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, head_dim, theta=1e6),
        window=config.integer("sliding_window") if config.has("sliding_window") else None,
    )


BuildMixer = Callable[[int, Config, Weights, Ops, torch.dtype], Attention | LightningAttention]
_MIXERS: dict[str, tuple[BuildMixer, str]] = {
    "linear_attention": (_linear_attention, "linear_attn"),
    "full_attention": (_full_attention, "full_attn"),
}


def _moe(config: Config, weights: Weights, ops: Ops) -> MoE:
    num_experts = config.integer("num_local_experts", 8)
    shape = MoEShape(
        config.integer("hidden_size"),
        config.integer("intermediate_size"),
        num_experts,
        config.integer("num_experts_per_tok", 2, at_most=num_experts),
    )
    return MoE(
        shape,
        router=linear(ops, weights, {"gate": num_experts}, shape.hidden, coded=False),
        experts=ops.experts(*expert_matrices(weights, shape, gate="w1", up="w3", down="w2")),
        route=softmax_of_chosen,
    )


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
