"""Kimi Linear: Kimi delta attention and a few latent attention layers without positions, then an MLP or experts."""

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import (
    MLP,
    Float32Router,
    MoE,
    SharedMoE,
    SigmoidRouter,
    expert_matrices,
    gated_mlp,
)
from hybrid_cache.models.blocks.gated_delta import KimiDelta
from hybrid_cache.models.blocks.latent_attention import LatentAttention
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack, PreNormLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import KimiDeltaShape, LatentAttentionShape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "KimiLinear":
    return KimiLinear(config, weights, ops, dtype)


class KimiLinear(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        config.refuse("tie_word_embeddings")
        layers = (
            _layer(kind, mlp_kind, config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i, (kind, mlp_kind) in enumerate(zip(_kinds(config), mlp_kinds(config, 1), strict=True))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.norm", config, weights, ops, _eps(config)),
            tied=False,
            max_length=config.integer(config.either("max_position_embeddings", "model_max_length"), 1048576),
        )


def _layer(kind: str, mlp_kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> PreNormLayer:
    mixer = _delta if kind == "linear_attention" else _attention
    return PreNormLayer(
        mixer(config, Scope(weights, "self_attn."), ops, dtype),
        hidden_norm("input_layernorm", config, weights, ops, _eps(config)),
        _feed_forward(mlp_kind, config, weights, ops),
        hidden_norm("post_attention_layernorm", config, weights, ops, _eps(config)),
    )


def _kinds(config: Config) -> tuple[str, ...]:
    """'linear_attention' or 'full_attention' for each layer; published as two lists of numbers from 1 on."""
    num_layers = config.integer("num_hidden_layers")
    published = config.section("linear_attn_config")
    default = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(num_layers)]
    if published.has("full_attn_layers") and published.has("kda_layers"):
        full, delta = published.integers("full_attn_layers"), published.integers("kda_layers")
        if sorted([*full, *delta]) != list(range(1, num_layers + 1)):
            raise ModelError(
                f"config.json: full_attn_layers and kda_layers are {full} and {delta}, "
                f"expected each number from 1 to {num_layers} once"
            )
        default = ["full_attention" if i + 1 in full else "linear_attention" for i in range(num_layers)]
    return config.each_layer("layer_types", num_layers, ["linear_attention", "full_attention"], default)


def mlp_kinds(config: Config, num_dense: int) -> tuple[str, ...]:
    """'dense' or 'sparse' for each layer; `num_dense` where the config does not say how many come first."""
    num_layers = config.integer("num_hidden_layers")
    num_dense = config.integer("first_k_dense_replace", num_dense, at_least=0)
    config.integer("moe_layer_freq", 1, at_most=1)
    default = ["dense" if i < num_dense else "sparse" for i in range(num_layers)]
    return config.each_layer("mlp_layer_types", num_layers, ["dense", "sparse"], default)


def _delta(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> KimiDelta:
    published = config.section("linear_attn_config")
    head_dim = published.integer("head_dim", config.integer("linear_head_dim", 128))
    shape = s = KimiDeltaShape(
        hidden=config.integer("hidden_size"),
        num_heads=published.integer("num_heads", config.integer("linear_num_heads", 32)),
        head_dim=head_dim,
        conv_width=published.integer(
            "short_conv_kernel_size", config.integer("linear_conv_kernel_dim", 4, at_least=2), at_least=2
        ),
        dtype=dtype,
        gate_rank=head_dim,
    )
    qkv = {f"{name}_proj": s.inner for name in "qkv"}
    low = {"b_proj": s.num_heads, "f_a_proj": s.gate_width, "g_a_proj": s.gate_width}
    return KimiDelta(
        ops,
        weights,
        shape,
        linear(ops, weights, {**qkv, **low}, s.hidden),
        conv_weight(weights, s),
        Norm(ops, weights, "o_norm", head_dim, _eps(config)),
        linear(ops, weights, {"o_proj": s.hidden}, s.inner),
        decay=linear(ops, weights, {"f_b_proj": s.inner}, s.gate_width),
        gate=linear(ops, weights, {"g_b_proj": s.inner}, s.gate_width),
        rate=weights.take_float32("A_log", 1, 1, s.num_heads, 1).flatten().exp(),
        lowest=None,
    )


def conv_weight(weights: Weights, s: KimiDeltaShape) -> Tensor:
    """[channels, K] of the three published tensors."""
    parts = [weights.take(f"{name}_conv1d.weight", s.inner, 1, s.conv_width) for name in "qkv"]
    return torch.cat(parts).view(s.channels, s.conv_width)


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> LatentAttention:
    if not config.flag("mla_use_nope", True):
        raise UnsupportedModel("config.json: mla_use_nope is False, supported: True")
    shape = latent_shape(config, dtype, config.integer("q_lora_rank") if config.has("q_lora_rank") else None)
    bias = config.flag("attention_bias", False)
    out = linear(ops, weights, {"o_proj": shape.hidden}, shape.num_heads * shape.value_dim, bias=bias)
    return LatentAttention(ops, weights, shape, out, bias=bias, norm_eps=1e-6)


def latent_shape(config: Config, dtype: torch.dtype, q_rank: int | None, gate: int = 0) -> LatentAttentionShape:
    """From config.json, with a head gate of `gate` outputs. Raises UnsupportedModel for grouped keys."""
    num_heads = config.integer("num_attention_heads", 32)
    if config.integer("num_key_value_heads", num_heads) != num_heads:
        raise UnsupportedModel(f"config.json: num_key_value_heads is not num_attention_heads, {num_heads}")
    return LatentAttentionShape(
        hidden=config.integer("hidden_size"),
        num_heads=num_heads,
        own_dim=config.integer("qk_nope_head_dim", 128),
        shared_dim=config.integer("qk_rope_head_dim", 64),
        value_dim=config.integer("v_head_dim", 128),
        kv_rank=config.integer("kv_lora_rank", 512),
        q_rank=q_rank,
        dtype=dtype,
        gate=gate,
    )


def _feed_forward(kind: str, config: Config, weights: Weights, ops: Ops) -> MLP | SharedMoE:
    """Experts are published as `block_sparse_moe`; transformers 5 writes MLPs under that name, too."""
    if kind == "sparse":
        num_experts = config.integer(config.either("num_experts", "num_local_experts"), 256)
        config.choice("moe_router_activation_func", "sigmoid", ["sigmoid"])
        names = ("w1", "w3", "w2")
        return moe(config, num_experts, 1, 1, 2.446, names, Scope(weights, "block_sparse_moe."), ops)
    place = "block_sparse_moe." if weights.has("block_sparse_moe.gate_proj.weight") else "mlp."
    return mlp(config, config.integer("intermediate_size"), Scope(weights, place), ops)


def moe(
    config: Config,
    num_experts: int,
    num_groups: int,
    top_groups: int,
    scale: float,
    names: tuple[str, str, str],
    weights: Weights,
    ops: Ops,
    bias: str = "e_score_correction_bias",
) -> SharedMoE:
    """Numbers are what the config means by not saying; `names` of an expert's gate, up and down."""
    inner = config.integer("moe_intermediate_size", 1024)
    num_active = config.integer(config.either("num_experts_per_token", "num_experts_per_tok"), 8, at_most=num_experts)
    shape = MoEShape(config.integer("hidden_size"), inner, num_experts, num_active)
    groups = config.divisor(config.either("num_expert_group", "n_group"), num_experts, default=num_groups)
    router = SigmoidRouter(
        weights.take_float32(f"gate.{bias}", num_experts),
        eps=1e-20 if config.flag(config.either("moe_renormalize", "norm_topk_prob"), True) else None,
        scale=config.number("routed_scaling_factor", scale),
        num_groups=groups,
        top_groups=config.integer("topk_group", min(top_groups, groups), at_most=groups),
    )
    experts = ops.experts(*expert_matrices(weights, shape, *names))
    routed = MoE(shape, Float32Router(ops, weights, "gate", num_experts, shape.hidden), experts, router)
    num_shared = config.integer(config.either("num_shared_experts", "n_shared_experts"), 1)
    return SharedMoE(routed, mlp(config, num_shared * inner, Scope(weights, "shared_experts."), ops))


def mlp(config: Config, inner: int, weights: Weights, ops: Ops) -> MLP:
    hidden = config.integer("hidden_size")
    return gated_mlp(hidden, inner, weights, ops)


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
