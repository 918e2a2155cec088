"""Nemotron-H: each layer is one part only: Mamba-2, attention without positions, an MLP, or experts (Nemotron 3)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models.blocks.attention import Attention
from hybrid_cache.models.blocks.common import FeedForward, hidden_norm, linear, linear_shape
from hybrid_cache.models.blocks.feed_forward import PlainMLP, SigmoidRouter, relu2, silu
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import FeedForwardLayer, HybridStack, MixerLayer
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, LayerShape, Mamba2Shape, MoEShape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights

LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # of hybrid_override_pattern
WORDS = {  # of layers_block_type
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "silu": silu}


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "NemotronH":
    return NemotronH(config, weights, ops, dtype)


class NemotronH(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        weights.ignore(r"^mtp\.")  # layers of multi-token prediction
        top = "model." if weights.has("model.embeddings.weight") else "backbone."
        kinds = _kinds(config)
        layers = (_layer(kind, config, Scope(weights, f"{top}layers.{i}."), ops, dtype) for i, kind in enumerate(kinds))
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm(f"{top}norm_f", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
            embedding=f"{top}embeddings.weight",
            residual=torch.float32 if config.flag("residual_in_fp32", False) else dtype,
        )


def _layer(kind: str, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> MixerLayer | FeedForwardLayer:
    inside = Scope(weights, "mixer.")
    if kind in _MIXERS:
        mixer = _MIXERS[kind](config, inside, ops, dtype)
        return MixerLayer(mixer, hidden_norm("norm", config, weights, ops, _eps(config)), dtype)
    feed_forward = _moe(config, inside, ops) if kind == "moe" else _mlp(config, inside, ops)
    return FeedForwardLayer(feed_forward, hidden_norm("norm", config, weights, ops, _eps(config)), dtype)


class Experts(FeedForward):
    """A few experts for each row, perhaps in a narrower space, plus an MLP for all rows.

    experts  x [R, in], ids [R, k], weights [R, k] -> [R, in]
    latent   projections into and out of the narrower space
    """

    def __init__(
        self,
        shape: MoEShape,
        router: Linear,
        route: SigmoidRouter,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        latent: tuple[Linear, Linear] | None,
        shared: PlainMLP,
    ) -> None:
        self._shape = shape
        self._router = router
        self._route = route
        self._experts = experts
        self._latent = latent
        self._shared = shared

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return (self._shape, *map(linear_shape, self._latent or ()), self._shared.shape)

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self._router(x.float()), self._shape.num_active)
        if self._latent is None:
            y = self._experts(x, ids, weights)
        else:
            into, out_of = self._latent
            y = out_of(self._experts(into(x), ids, weights))
        y += self._shared(x)
        return y


def _kinds(config: Config) -> tuple[str, ...]:
    listed = next((name for name in ("layers_block_type", "layer_types") if config.has(name)), None)
    if listed is None:
        kinds = config.pattern("hybrid_override_pattern", LETTERS)
    else:
        kinds = tuple(WORDS[word] for word in config.words(listed, list(WORDS), []))
    num_layers = config.integer("num_hidden_layers", len(kinds))
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: num_hidden_layers is {num_layers}, but {len(kinds)} layers are listed")
    if not set(kinds) & set(_MIXERS):
        raise ModelError("config.json: no layer is of Mamba-2 or attention")
    return kinds


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba2:
    config.choice("mamba_hidden_act", "silu", ["silu"])
    num_heads = config.integer("mamba_num_heads", 128)
    shape = Mamba2Shape(
        hidden=config.integer("hidden_size"),
        num_heads=num_heads,
        head_dim=config.integer("mamba_head_dim", 64),
        d_state=config.integer("ssm_state_size", 128),
        num_groups=config.divisor("n_groups", num_heads, default=8),
        conv_width=config.integer("conv_kernel", 4, at_least=2),
        dtype=dtype,
    )
    return Mamba2(
        ops,
        weights,
        shape,
        conv_bias=config.flag("use_conv_bias", True),
        proj_bias=config.flag("use_bias", False),
        norm_eps=_eps(config),
        dt_min=config.number("time_step_min", 0.001),  # as in transformers, which does not read time_step_limit
        dt_max=float("inf"),
    )


def _attention(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Attention:
    config.refuse("attention_bias")
    config.refuse("sliding_window")
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads", 32)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    head_dim = config.integer("head_dim", config.integer("attention_head_dim", 128))  # the latter in the first releases
    qkv = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
    return Attention(
        ops,
        AttentionShape(hidden, hidden, num_heads, num_kv_heads, head_dim, dtype),
        linear(ops, weights, qkv, hidden),
        linear(ops, weights, {"o_proj": hidden}, num_heads * head_dim),
        scale=head_dim**-0.5,
        rotary=None,
    )


_MIXERS: dict[str, Callable[[Config, Weights, Ops, torch.dtype], Mamba2 | Attention]] = {
    "mamba": _mamba,
    "attention": _attention,
}


def _mlp(config: Config, weights: Weights, ops: Ops, size: str = "intermediate_size") -> PlainMLP:
    hidden, inner = config.integer("hidden_size"), config.integer(size)
    bias = config.flag("mlp_bias", False)
    up = linear(ops, weights, {"up_proj": inner}, hidden, bias=bias)
    return PlainMLP(up, linear(ops, weights, {"down_proj": hidden}, inner, bias=bias), _activation(config))


def _moe(config: Config, weights: Weights, ops: Ops) -> Experts:
    hidden, inner = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    num_experts = config.integer("n_routed_experts")
    router, most_active = _router(config, weights, num_experts)
    num_active = config.integer("num_experts_per_tok", 2, at_most=most_active)
    latent = config.integer("moe_latent_size") if config.has("moe_latent_size") else None
    width = latent or hidden
    experts = [Scope(weights, f"experts.{i}.") for i in range(num_experts)]
    return Experts(
        MoEShape(hidden, inner, num_experts, num_active, gated=False, latent=latent),
        ops.linear(weights.take_float32("gate.weight", num_experts, hidden)),
        router,
        ops.experts(
            [expert.take_matrix("up_proj.weight", inner, width) for expert in experts],
            [expert.take_matrix("down_proj.weight", width, inner) for expert in experts],
            _activation(config),
        ),
        None if latent is None else _latent(config, weights, ops, latent),
        _mlp(config, Scope(weights, "shared_experts."), ops, "moe_shared_expert_intermediate_size"),
    )


def _router(config: Config, weights: Weights, num_experts: int) -> tuple[SigmoidRouter, int]:
    """-> also the most experts that it can choose for a row."""
    num_groups = config.divisor("n_group", num_experts, default=1)
    top_groups = config.integer("topk_group", 1, at_most=num_groups)
    if num_groups > max(1, num_experts // 2):
        raise ModelError(f"config.json: n_group is {num_groups}, expected two of {num_experts} experts in each")
    router = SigmoidRouter(
        weights.take_float32("gate.e_score_correction_bias", num_experts),
        eps=1e-20 if config.flag("norm_topk_prob", True) else None,
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return router, top_groups * (num_experts // num_groups)


def _latent(config: Config, weights: Weights, ops: Ops, latent: int) -> tuple[Linear, Linear]:
    hidden, bias = config.integer("hidden_size"), config.flag("mlp_bias", False)
    into = linear(ops, weights, {"fc1_latent_proj": latent}, hidden, bias=bias)
    return into, linear(ops, weights, {"fc2_latent_proj": hidden}, latent, bias=bias)


def _activation(config: Config) -> Callable[[Tensor], Tensor]:
    name = config.choice("mlp_hidden_act", "relu2", list(ACTIVATIONS))
    assert name is not None
    return ACTIVATIONS[name]


def _eps(config: Config) -> float:
    return config.number("layer_norm_epsilon", 1e-5)
