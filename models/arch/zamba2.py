"""Zamba2: a Mamba-2 backbone; before some of its layers, one of a few shared transformer blocks, which alternate.

A shared block reads the stream concatenated with the original embedding. Each use has its own KV rows, and its own
low-rank adapters on the shared weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models.blocks.attention import Attention, Rotary
from hybrid_cache.models.blocks.common import Norm, hidden_norm, linear, linear_shape
from hybrid_cache.models.blocks.feed_forward import MLP
from hybrid_cache.models.blocks.mamba import Mamba2
from hybrid_cache.models.blocks.model import CausalModel
from hybrid_cache.models.blocks.shared_block import HybridLayer, MambaLayer, SharedBlock, SharedBlockStack
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape, Mamba2Shape
from hybrid_cache.models.weights import ModelWeights, Scope, Weights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "Zamba2":
    return Zamba2(config, weights, ops, dtype)


class Zamba2(CausalModel):
    def __init__(self, config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> None:
        config.refuse("use_long_context")
        num_blocks = config.integer("num_mem_blocks", 1)
        blocks: list[BlockWeights] = []
        layers: list[MambaLayer | HybridLayer] = []
        for i, kind in enumerate(_kinds(config)):
            layer_weights = Scope(weights, f"model.layers.{i}.")
            if kind == "mamba":
                layers.append(_mamba_layer(config, layer_weights, ops, dtype))
                continue
            use = len(blocks)
            if use < num_blocks or weights.has(f"model.layers.{i}.shared_transformer.input_layernorm.weight"):
                blocks.append(BlockWeights(config, Scope(layer_weights, "shared_transformer."), ops))
            else:
                blocks.append(blocks[use - num_blocks])
            layers.append(_hybrid_layer(_block(blocks[use], use, ops, dtype), config, layer_weights, ops, dtype))
        if len(set(blocks)) > num_blocks:
            # The file repeats a block at each use. Each copy has all adapters of the block, but uses only its own.
            weights.ignore(r"shared_transformer\..*_adapter_list\.")
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            stack=SharedBlockStack(layers),
            norm=hidden_norm("model.final_layernorm", config, weights, ops, _eps(config)),
            tied=config.flag("tie_word_embeddings", True),
        )


def _mamba_layer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> MambaLayer:
    norm = hidden_norm("input_layernorm", config, weights, ops, _eps(config))
    return MambaLayer(norm, _mamba(config, weights, ops, dtype))


def _hybrid_layer(block: SharedBlock, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> HybridLayer:
    hidden = config.integer("hidden_size")
    inside = Scope(weights, "mamba_decoder.")
    return HybridLayer(
        block,
        linear(ops, weights, {"linear": hidden}, hidden),
        hidden_norm("input_layernorm", config, inside, ops, _eps(config)),
        _mamba(config, inside, ops, dtype),
    )


def _mamba(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba2:
    return Mamba2(
        ops,
        Scope(weights, "mamba."),
        _mamba_shape(config, dtype),
        conv_bias=True,
        proj_bias=config.flag("add_bias_linear", False),
        norm_eps=1e-5,
        dt_min=config.number("time_step_min", 0.001),
        dt_max=inf,
    )


@dataclass(frozen=True, slots=True)
class BlockShape:
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # the block is twice as wide as the stream
    bias: bool
    rank: int
    adapted_attention: bool

    @property
    def qkv(self) -> dict[str, int]:
        return {
            "q": self.num_heads * self.head_dim,
            "k": self.num_kv_heads * self.head_dim,
            "v": self.num_kv_heads * self.head_dim,
        }


class BlockWeights:
    """Of a transformer block that several layers use."""

    def __init__(self, config: Config, weights: Weights, ops: Ops) -> None:
        s = self.shape = _block_shape(config)
        self.attention_weights = Scope(weights, "self_attn.")
        self.mlp_weights = Scope(weights, "feed_forward.")
        projections = {f"{name}_proj": size for name, size in s.qkv.items()}
        self.qkv = linear(ops, self.attention_weights, projections, 2 * s.hidden)
        self.out = linear(ops, self.attention_weights, {"o_proj": s.hidden}, s.num_heads * s.head_dim)
        self.gate_up = linear(ops, self.mlp_weights, {"gate_up_proj": 2 * s.inner}, s.hidden, bias=s.bias)
        self.down = linear(ops, self.mlp_weights, {"down_proj": s.hidden}, s.inner, bias=s.bias)
        self.rotary = Rotary(ops, config, s.head_dim) if config.flag("use_mem_rope", False) else None
        self.attention_norm = Norm(ops, weights, "input_layernorm", 2 * s.hidden, _eps(config))
        self.mlp_norm = hidden_norm("pre_ff_layernorm", config, weights, ops, _eps(config))


def _block(block: BlockWeights, index: int, ops: Ops, dtype: torch.dtype) -> SharedBlock:
    """A shared block with the adapters of one layer."""
    s = block.shape
    qkv = _adapted_qkv(block, index, ops) if s.adapted_attention else block.qkv
    gate_up = AdaptedLinear(
        block.gate_up, [Adapter(ops, block.mlp_weights, "gate_up_proj", index, s.hidden, s.rank, 0, 2 * s.inner)]
    )
    attention = Attention(
        ops,
        AttentionShape(2 * s.hidden, s.hidden, s.num_heads, s.num_kv_heads, s.head_dim, dtype),
        qkv,
        block.out,
        scale=(s.head_dim / 2) ** -0.5,
        rotary=block.rotary,
    )
    adapters = [*gate_up.adapters, *(qkv.adapters if isinstance(qkv, AdaptedLinear) else [])]
    return SharedBlock(
        attention,
        block.attention_norm,
        MLP(ops, gate_up, block.down, ops.gelu_mul),
        block.mlp_norm,
        [shape for adapter in adapters for shape in adapter.shapes],
    )


class Adapter:
    """A low-rank addition to the output features [first, first + size) of a projection."""

    def __init__(
        self, ops: Ops, weights: Weights, name: str, index: int, in_features: int, rank: int, first: int, size: int
    ) -> None:
        weights = Scope(weights, f"{name}_adapter_list.{index}.")
        self._down = linear(ops, weights, {"0": rank}, in_features)
        self._up = linear(ops, weights, {"1": size}, rank)
        self._first = first
        self._size = size
        self.shapes = (linear_shape(self._down), linear_shape(self._up))

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [R, in_features]   y [R, features], of which `size` are added to in place."""
        y.narrow(1, self._first, self._size).add_(self._up(self._down(x)))


class AdaptedLinear:
    """A shared projection and one layer's adapters to it."""

    def __init__(self, base: Linear, adapters: Sequence[Adapter]) -> None:
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.adapters = adapters
        self._base = base

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        y = self._base(x)
        for adapter in self.adapters:
            adapter.add(x, y)
        return y


def _adapted_qkv(block: BlockWeights, index: int, ops: Ops) -> AdaptedLinear:
    s = block.shape
    adapters, first = [], 0
    for name, size in s.qkv.items():
        weights = block.attention_weights
        adapters.append(Adapter(ops, weights, f"linear_{name}", index, 2 * s.hidden, s.rank, first, size))
        first += size
    return AdaptedLinear(block.qkv, adapters)


def _kinds(config: Config) -> tuple[str, ...]:
    num_layers = config.integer("num_hidden_layers")
    kinds = config.layer_kinds(num_layers)
    if "attention" in kinds:
        raise UnsupportedModel("config.json: layers_block_type contains 'attention', expected 'mamba' or 'hybrid'")
    return kinds


def _block_shape(config: Config) -> BlockShape:
    config.choice("hidden_act", "gelu", ["gelu"])
    hidden = config.integer("hidden_size")
    num_heads = config.divisor("num_attention_heads", 2 * hidden, default=32)
    num_kv_heads = config.divisor("num_key_value_heads", num_heads, default=num_heads)
    adapted_attention = config.flag("use_shared_attention_adapter", False)
    if adapted_attention and num_heads != num_kv_heads:
        raise ModelError(f"config.json: attention adapters with {num_kv_heads} kv heads, expected {num_heads}")
    return BlockShape(
        hidden=hidden,
        inner=config.integer("intermediate_size", 4 * hidden),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=2 * hidden // num_heads,
        bias=config.flag("add_bias_linear", False),
        rank=config.integer("adapter_rank", 128),
        adapted_attention=adapted_attention,
    )


def _mamba_shape(config: Config, dtype: torch.dtype) -> Mamba2Shape:
    hidden = config.integer("hidden_size")
    inner = int(config.number("mamba_expand", 2) * hidden)
    num_heads = config.divisor("n_mamba_heads", inner, default=8)
    return Mamba2Shape(
        hidden=hidden,
        num_heads=num_heads,
        head_dim=inner // num_heads,
        d_state=config.integer("mamba_d_state", 64),
        num_groups=config.divisor("mamba_ngroups", num_heads, default=1),
        conv_width=config.integer("mamba_d_conv", 4, at_least=2),
        dtype=dtype,
    )


def _eps(config: Config) -> float:
    return config.number("rms_norm_eps", 1e-5)
