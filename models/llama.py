"""Llama and its many relatives: attention and a gated MLP in each layer, no state."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import CacheEntry, Norm, linear, wanted_rows
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape
from hybrid_cache.models.weights import Checkpoint, Scope, Weights


def build(config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> "Llama":
    return Llama(config, weights, ops, dtype)


class Llama(CausalModel):
    def __init__(self, config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        self._layers = tuple(
            Layer(config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            layers=self._layers,
            norm=_norm("model.norm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", False),
        )

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = F.embedding(batch.token_ids, self._embedding)
        for layer, tensors in zip(self._layers, cache, strict=True):
            hidden = layer.mix(hidden, batch, tensors)
            if layer is self._layers[-1]:
                hidden = wanted_rows(hidden, batch)  # from here on, rows no longer depend on each other
            hidden = layer.feed_forward(hidden)
        return self._norm(hidden)[: batch.output_rows.shape[0]]


class Layer:
    """Attention, then an MLP; both add to `hidden` in place."""

    def __init__(self, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._attention = _attention(config, Scope(weights, "self_attn."), ops, dtype)
        self._attention_norm = _norm("input_layernorm", config, weights, ops)
        self._mlp = _mlp(config, Scope(weights, "mlp."), ops)
        self._mlp_norm = _norm("post_attention_layernorm", config, weights, ops)
        self.shapes = (self._attention.shape, self._mlp.shape)

    def mix(self, hidden: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        return self._attention.add_to(hidden, self._attention_norm, batch, tensors)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self._mlp.add_to(hidden, self._mlp_norm)


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
    bias = config.flag("mlp_bias", False)
    gate_up = linear(ops, weights, {"gate_proj": inner, "up_proj": inner}, hidden, bias=bias)
    return MLP(ops, gate_up, linear(ops, weights, {"down_proj": hidden}, inner, bias=bias))


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6))
