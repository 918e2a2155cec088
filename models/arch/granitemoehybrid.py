"""Granite 4 hybrid: Mamba-2 and attention layers, each followed by a shared MLP and, in some sizes, experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import FeedForward, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, MoE, matrices_of, softmax_of_chosen
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, LayerShape, Mamba2Shape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "GraniteMoeHybrid":
    return GraniteMoeHybrid(config, weights, ops, dtype)


class GraniteMoeHybrid(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        num_layers = config.integer("num_hidden_layers")
        kinds = config.layer_kinds(num_layers, default=["mamba"] * num_layers)
        layers = (
            _layer(kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype) for i, kind in enumerate(kinds)
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.norm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
            embedding_multiplier=config.number("embedding_multiplier", 1.0),
            logits_divisor=config.number("logits_scaling", 1.0),
        )


def _layer(kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    mixer = _MIXERS[kind](config, weights, ops, dtype)
    mixer_norm = hidden_norm("input_layernorm", config, weights, ops, _eps(config))
    mlp = _shared_mlp(config, Scope(weights, "shared_mlp."), ops)
    mlp_norm = hidden_norm("post_attention_layernorm", config, weights, ops, _eps(config))
    experts = _moe(config, Scope(weights, "block_sparse_moe."), ops)
    feed_forward = mlp if experts is None else MLPWithExperts(mlp, experts)
    return PreNormLayer(mixer, mixer_norm, feed_forward, mlp_norm, config.number("residual_multiplier", 1.0))


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


class MLPWithExperts(FeedForward):
    """An MLP for all rows and a few experts for each; their sum."""

    def __init__(self, mlp: MLP, experts: MoE) -> None:
        self._mlp = mlp
        self._experts = experts

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return self._mlp.shape, self._experts.shape

    def __call__(self, x: Tensor) -> Tensor:
        y = self._mlp(x)
        y += self._experts(x)
        return y


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
        router=linear(ops, weights, {"router.layer": num_experts}, hidden, coded=False),
        experts=ops.experts(
            matrices_of(weights, weights.take("input_linear.weight", num_experts, 2 * inner, hidden)),
            matrices_of(weights, weights.take("output_linear.weight", num_experts, hidden, inner)),
        ),
        route=softmax_of_chosen,
    )


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-6)
