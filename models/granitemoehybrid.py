"""Granite 4 hybrid: Mamba-2 and attention layers, each followed by a shared MLP and, in some sizes, experts."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import add
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import CacheEntry, Norm, linear, wanted_rows
from hybrid_cache.models.blocks.feed_forward import MLP, MoE, softmax_of_chosen
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba2Shape, MoEShape
from hybrid_cache.models.weights import Checkpoint, Scope, Weights


def build(config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> "GraniteMoeHybrid":
    return GraniteMoeHybrid(config, weights, ops, dtype)


class GraniteMoeHybrid(CausalModel):
    def __init__(self, config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> None:
        num_layers = config.integer("num_hidden_layers")
        kinds = config.layer_kinds(num_layers, default=["mamba"] * num_layers)
        self._embedding_multiplier = config.number("embedding_multiplier", 1.0)
        self._layers = tuple(
            Layer(kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype) for i, kind in enumerate(kinds)
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            layers=self._layers,
            norm=_norm("model.norm", config, weights, ops),
            tied=config.flag("tie_word_embeddings", False),
            logits_divisor=config.number("logits_scaling", 1.0),
        )

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = F.embedding(batch.token_ids, self._embedding)
        if self._embedding_multiplier != 1.0:
            hidden *= self._embedding_multiplier
        for layer, tensors in zip(self._layers, cache, strict=True):
            hidden = layer.mix(hidden, batch, tensors)
            if layer is self._layers[-1]:
                hidden = wanted_rows(hidden, batch)  # from here on, rows no longer depend on each other
            hidden = layer.feed_forward(hidden)
        return self._norm(hidden)[: batch.output_rows.shape[0]]


class Layer:
    """A mixer, then a feed-forward part; both add to `hidden` in place, times the residual multiplier."""

    def __init__(self, kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._mixer = _MIXERS[kind](config, weights, ops, dtype)
        self._mixer_norm = _norm("input_layernorm", config, weights, ops)
        self._mlp = _shared_mlp(config, Scope(weights, "shared_mlp."), ops)
        self._mlp_norm = _norm("post_attention_layernorm", config, weights, ops)
        self._moe = _moe(config, Scope(weights, "block_sparse_moe."), ops)
        self._multiplier = config.number("residual_multiplier", 1.0)
        self.shapes = (self._mixer.shape, self._mlp.shape, *([self._moe.shape] if self._moe else []))

    def mix(self, hidden: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        return self._mixer.add_to(hidden, self._mixer_norm, batch, tensors, self._multiplier)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        if self._moe is None:
            return self._mlp.add_to(hidden, self._mlp_norm, self._multiplier)
        x = self._mlp_norm(hidden)
        y = self._mlp(x)
        y += self._moe(x)
        return add(hidden, y, self._multiplier)


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba2:
    hidden = config.integer("hidden_size")
    inner = config.integer("mamba_expand", 2) * hidden
    num_heads = config.integer("mamba_n_heads", 128)
    head_dim = config.integer_or_auto("mamba_d_head", inner // num_heads)
    if head_dim * num_heads != inner:
        raise ModelError(f"config.json: {num_heads} heads of {head_dim} do not make {inner} channels")
    dt_min, dt_max = config.interval("time_step_limit", (0.0, float("inf")))
    config.choice("hidden_act", "silu", ["silu"])
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
    positions = config.choice("position_embedding_type", None, [None, "nope", "rope"])
    weights = Scope(weights, "self_attn.")
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden, bias=bias),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim, bias=bias),
        scale=config.number("attention_multiplier", 1.0),
        rotary=Rotary(ops, config, head_dim) if positions == "rope" else None,
    )


_MIXERS: dict[str, Callable[[Config, Weights, Ops, torch.dtype], Mamba2 | Attention]] = {
    "mamba": _mamba,
    "attention": _attention,
}


def _shared_mlp(config: Config, weights: Weights, ops: Ops) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("shared_intermediate_size", 1024)
    gate_up = linear(ops, weights, {"input_linear": 2 * inner}, hidden)
    return MLP(ops, gate_up, linear(ops, weights, {"output_linear": hidden}, inner))


def _moe(config: Config, weights: Weights, ops: Ops) -> MoE | None:
    num_experts = config.integer("num_local_experts", 8, at_least=0)
    if num_experts == 0:
        return None
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size", 11008)
    num_active = config.integer("num_experts_per_tok", 2, at_most=num_experts)
    return MoE(
        MoEShape(hidden, inner, num_experts, num_active),
        router=linear(ops, weights, {"router.layer": num_experts}, hidden),
        experts=ops.experts(
            list(weights.take("input_linear.weight", num_experts, 2 * inner, hidden)),
            list(weights.take("output_linear.weight", num_experts, hidden, inner)),
        ),
        route=softmax_of_chosen,
    )


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), _eps(config))


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
