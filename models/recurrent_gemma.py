"""RecurrentGemma (Griffin): recurrent layers and, every few, attention over a window; an MLP after each."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import CacheEntry, Norm, linear, wanted_rows
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.rg_lru import RgLru
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, RgLruShape
from hybrid_cache.models.weights import Checkpoint, Scope, Weights

TRAINED_LENGTH = 8192  # tokens (Botev et al. 2024); the config names none


def build(config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> "RecurrentGemma":
    return RecurrentGemma(config, weights, ops, dtype)


class RecurrentGemma(CausalModel):
    def __init__(self, config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_activation", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"])
        root = torch.tensor(config.integer("hidden_size") ** 0.5, dtype=torch.bfloat16)
        self._embedding_multiplier = root.item()  # rounded for every dtype of the rows
        self._layers = tuple(
            Layer(kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i, kind in enumerate(_kinds(config))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            layers=self._layers,
            norm=_norm("model.final_norm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", True),
            max_length=TRAINED_LENGTH,
            logits_cap=config.positive("logits_soft_cap", 30.0),
        )

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = F.embedding(batch.token_ids, self._embedding)
        hidden *= self._embedding_multiplier
        for layer, tensors in zip(self._layers, cache, strict=True):
            hidden = layer.mix(hidden, batch, tensors)
            if layer is self._layers[-1]:
                hidden = wanted_rows(hidden, batch)  # from here on, rows no longer depend on each other
            hidden = layer.feed_forward(hidden)
        return self._norm(hidden)[: batch.output_rows.shape[0]]


class Layer:
    """A mixer, then an MLP; both add to `hidden` in place."""

    def __init__(self, kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._mixer = _MIXERS[kind](config, Scope(weights, "temporal_block."), ops, dtype)
        self._mixer_norm = _norm("temporal_pre_norm", config, weights, ops)
        self._mlp = _mlp(config, Scope(weights, "mlp_block."), ops)
        self._mlp_norm = _norm("channel_pre_norm", config, weights, ops)
        self.shapes = (self._mixer.shape, self._mlp.shape)

    def mix(self, hidden: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        hidden += self._mixer(self._mixer_norm(hidden), batch, tensors)
        return hidden

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self._mlp.add_to(hidden, self._mlp_norm)


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
    turned = config.rope().number("partial_rotary_factor", config.number("partial_rotary_factor", 0.5))
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=True),
        scale=head_dim**-0.5,
        rotary=Rotary(ops, config, int(head_dim * turned)),
        window=config.integer("attention_window_size", 2048),
    )


Mixer = Callable[[Config, Weights, Ops, torch.dtype], Attention | RgLru]
_MIXERS: dict[str, Mixer] = {"recurrent": _recurrent, "attention": _attention}


def _mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 7680, at_least=2) // 2
    gate_up = linear(ops, weights, {"gate_proj": inner, "up_proj": inner}, hidden, bias=True)
    return MLP(ops, gate_up, linear(ops, weights, {"down_proj": hidden}, inner, bias=True), ops.gelu_tanh_mul)


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6), plus_one=True)
