"""Falcon-H1: Mamba-2 and attention side by side on the same rows in every layer, then an MLP.

What goes into and comes out of each part has a multiplier of its own (maximal update parametrisation).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import CacheEntry, hidden_norm, linear
from hybrid_cache.models.blocks.feed_forward import MLP, gated_mlp
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.stack import HybridStack
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba2Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "FalconH1":
    return FalconH1(config, weights, ops, dtype)


class FalconH1(CausalModel):
    """Each layer keeps two entries in the cache: of Mamba-2, then of attention."""

    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        layers = (
            Layer(config, Scope(weights, f"model.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=HybridStack(layers),
            norm=hidden_norm("model.final_layernorm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", False),
            embedding_multiplier=config.number("embedding_multiplier", 1.0),
            logits_multiplier=config.number("lm_head_multiplier", 1.0),
        )


class Layer:
    """Both mixers, then an MLP; all add to `hidden` in place."""

    def __init__(self, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._mamba = _mamba(config, Scope(weights, "mamba."), ops, dtype)
        self._mamba_in = config.number("ssm_in_multiplier", 1.0)
        self._mamba_out = config.number("ssm_out_multiplier", 1.0)
        self._attention = _attention(config, Scope(weights, "self_attn."), ops, dtype)
        self._attention_in = config.number("attention_in_multiplier", 1.0)
        self._attention_out = config.number("attention_out_multiplier", 1.0)
        self._mixer_norm = hidden_norm("input_layernorm", config, weights, ops, _eps(config))
        gate_multiplier, self._mlp_out = config.numbers("mlp_multipliers", [1.0, 1.0])
        self._mlp = _mlp(config, Scope(weights, "feed_forward."), ops, gate_multiplier)
        self._mlp_norm = hidden_norm("pre_ff_layernorm", config, weights, ops, _eps(config))
        self.shapes = (self._mamba.shape, self._attention.shape, self._mlp.shape)

    def mix(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> Tensor:
        x = self._mixer_norm(hidden)
        y = _times(self._mamba(_times(x, self._mamba_in), batch, next(cache)), self._mamba_out)
        y += _times(self._attention(_times(x, self._attention_in), batch, next(cache)), self._attention_out)
        hidden += y
        return hidden

    def write(self, hidden: Tensor, batch: ForwardBatch, cache: Iterator[CacheEntry]) -> None:
        x = self._mixer_norm(hidden)
        self._mamba.write(_times(x, self._mamba_in), batch, next(cache))
        self._attention.write(_times(x, self._attention_in), batch, next(cache))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self._mlp.add_to(hidden, self._mlp_norm, self._mlp_out)


def _times(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba2:
    hidden = config.integer("hidden_size")
    inner = config.integer("mamba_d_ssm", config.integer("mamba_expand", 2) * hidden)
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
        weights,
        shape,
        conv_bias=config.flag("mamba_conv_bias", True),
        proj_bias=config.flag("mamba_proj_bias", False),
        out_bias=config.flag("projectors_bias", False),
        norm_eps=_eps(config),
        dt_min=dt_min,
        dt_max=dt_max,
        norm=config.flag("mamba_rms_norm", False),
        norm_first=config.flag("mamba_norm_before_gate", True),
        multipliers=_projected_multipliers(config, shape, dtype),
    )


def _projected_multipliers(config: Config, shape: Mamba2Shape, dtype: torch.dtype) -> Tensor | None:
    """Of what the first projection gives, [projected]: one each for z, x, B, C and dt."""
    multipliers = config.numbers("ssm_multipliers", [1.0] * 5)
    if multipliers == (1.0,) * 5:
        return None
    bc = shape.num_groups * shape.d_state
    sizes = (shape.inner, shape.inner, bc, bc, shape.num_heads)
    return torch.cat([torch.full((n,), m, dtype=dtype) for n, m in zip(sizes, multipliers, strict=True)])


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
        scale=head_dim**-0.5 * config.number("key_multiplier", 1.0),  # rotating keys keeps a factor
        rotary=Rotary(ops, config, head_dim),
    )


def _mlp(config: Config, weights: Weights, ops: Ops, gate_multiplier: float) -> MLP:
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    bias = config.flag("mlp_bias", False)
    return gated_mlp(hidden, inner, weights, ops, bias=bias, gate_mul=_silu_mul(ops, gate_multiplier))


def _silu_mul(ops: Ops, multiplier: float) -> Callable[[Tensor], Tensor] | None:
    """silu(multiplier * gate) * up; None where that is what an MLP does anyway."""
    if multiplier == 1.0:
        return None

    def silu_mul(gate_up: Tensor) -> Tensor:
        gate_up[:, : gate_up.shape[1] // 2] *= multiplier
        return ops.silu_mul(gate_up)

    return silu_mul


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
