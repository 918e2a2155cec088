"""Zamba: a Mamba-1 backbone; before some of its layers, one transformer block that they all share.

The shared block reads the stream beside the original embedding. Each use has its own KV rows. No positions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention
from hybrid_cache.models.blocks.common import CacheEntry, Norm, linear, linear_shape
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.blocks.mamba import Mamba1Heads
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, LayerShape, Mamba1Shape
from hybrid_cache.models.weights import Checkpoint, Scope, Weights


def build(config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> "Zamba":
    return Zamba(config, weights, ops, dtype)


class Zamba(CausalModel):
    def __init__(self, config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> None:
        block: SharedBlock | None = None
        layers: list[MambaLayer | HybridLayer] = []
        for i, kind in enumerate(_kinds(config)):
            name = f"model.layers.{i}."
            layer_weights = Scope(weights, name)
            if kind == "mamba":
                layers.append(MambaLayer(config, layer_weights, ops, dtype))
                continue
            if block is None or weights.has(f"{name}shared_transf.input_layernorm.weight"):  # a file may repeat it
                block = SharedBlock(config, Scope(layer_weights, "shared_transf."), ops, dtype)
            layers.append(HybridLayer(block, config, layer_weights, ops, dtype))
        self._layers = tuple(layers)
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            layers=layers,
            norm=_norm("model.final_layernorm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", True),
        )

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        embedded = F.embedding(batch.token_ids, self._embedding)
        hidden = embedded.clone()
        tensors = iter(cache)
        for layer in self._layers:
            hidden = layer(hidden, embedded, batch, tensors)
        return self._norm(hidden[batch.output_rows])


class MambaLayer:
    def __init__(self, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._norm = _norm("input_layernorm", config, weights, ops)
        self._mamba = _mamba(config, Scope(weights, "mamba."), ops, dtype)
        self.shapes = (self._mamba.shape,)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, tensors: Iterator[CacheEntry]) -> Tensor:
        """Overwrites `hidden`."""
        hidden += self.mix(hidden, batch, next(tensors))
        return hidden

    def mix(self, x: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        return self._mamba(self._norm(x), batch, tensors)


class HybridLayer:
    """The shared block's output goes into the mixer beside the stream, but not into the stream itself."""

    def __init__(self, block: "SharedBlock", config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        hidden = config.integer("hidden_size")
        self._block = block
        self._linear = linear(ops, weights, {"linear": hidden}, hidden)
        self._mamba = MambaLayer(config, Scope(weights, "mamba_decoder."), ops, dtype)
        self.shapes: tuple[LayerShape, ...] = (*block.shapes, linear_shape(self._linear), *self._mamba.shapes)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, tensors: Iterator[CacheEntry]) -> Tensor:
        """Overwrites `hidden`."""
        injected = self._linear(self._block(hidden, embedded, batch, next(tensors)))
        injected += hidden
        hidden += self._mamba.mix(injected, batch, next(tensors))
        return hidden


class SharedBlock:
    """Attention over [stream; embedding], then an MLP; no residual inside the block."""

    def __init__(self, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._attention = _attention(config, Scope(weights, "self_attn."), ops, dtype)
        self._attention_norm = Norm(ops, weights, "input_layernorm", 2 * config.integer("hidden_size"), _eps(config))
        self._mlp = _mlp(config, Scope(weights, "feed_forward."), ops)
        self._mlp_norm = _norm("pre_ff_layernorm", config, weights, ops)
        self.shapes: tuple[LayerShape, ...] = (self._attention.shape, self._mlp.shape)

    def __call__(self, hidden: Tensor, embedded: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        x = self._attention_norm(torch.cat([hidden, embedded], dim=1))
        return self._mlp(self._mlp_norm(self._attention(x, batch, tensors)))


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
    gate_up = linear(ops, weights, {"gate_proj": inner, "up_proj": inner}, hidden)
    return MLP(ops, gate_up, linear(ops, weights, {"down_proj": hidden}, inner), ops.gelu_mul)


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), _eps(config))


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
