"""What each kind of layer costs and keeps in the cache, from its sizes alone.

Every kind has a `cost` and a `cache`, what it keeps or None, and a model's are the sums over its layers. Of the cost,
`weight_flops` go into products with weight matrices: two for each weight that a token meets.

A multiplication and an addition are two FLOPs. Norms, gates, activations, biases and rotations are left out: they are
about a hundredth of the rest. A cost counts every token, also in a last layer where an engine may compute only the
rows that somebody reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from hybrid_cache.kernels.layout import TILE
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec


class LayerShape(Protocol):
    """One part of a model: a mixer, a feed-forward part or a lone projection."""

    @property
    def cost(self) -> PrefillCost: ...

    @property
    def cache(self) -> AttentionSpec | StateSpec | None: ...


class Tokenwise:
    """A part that treats each token by itself: nothing to add to its matrices, nothing to keep."""

    __slots__ = ()

    @property
    def weight_flops(self) -> float:
        raise NotImplementedError

    @property
    def cost(self) -> PrefillCost:
        return PrefillCost(self.weight_flops, 0.0)

    @property
    def cache(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class LinearShape(Tokenwise):
    """One matrix on its own: an adapter's half, or the output head."""

    in_features: int
    out_features: int

    @property
    def weight_flops(self) -> float:
        return _product(self.in_features, self.out_features)


@dataclass(frozen=True, slots=True)
class MLPShape(Tokenwise):
    """Two matrices, or three with a gate."""

    hidden: int
    inner: int
    gated: bool = True

    @property
    def weight_flops(self) -> float:
        return (3 if self.gated else 2) * _product(self.hidden, self.inner)


@dataclass(frozen=True, slots=True)
class MoEShape(Tokenwise):
    """A router over all experts, and the gated experts that one token goes to. A shared expert is an MLP beside it."""

    hidden: int
    inner: int
    num_experts: int
    num_active: int

    @property
    def weight_flops(self) -> float:
        expert = MLPShape(self.hidden, self.inner)
        return _product(self.hidden, self.num_experts) + self.num_active * expert.weight_flops


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Causal attention with grouped queries; what goes in may be wider than what comes out."""

    in_features: int
    out_features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def weight_flops(self) -> float:
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return _product(self.in_features, qkv) + _product(self.num_heads * self.head_dim, self.out_features)

    @property
    def cost(self) -> PrefillCost:
        per_key = 4.0 * self.num_heads * self.head_dim  # q.k and p.v
        return PrefillCost(self.weight_flops + per_key, per_key)  # token p has p + 1 keys

    @property
    def cache(self) -> AttentionSpec:
        return AttentionSpec(self.num_kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """State-space mixer with one scalar decay per head (Dao and Gu 2024), computed in tiles."""

    hidden: int
    num_heads: int
    head_dim: int
    d_state: int
    num_groups: int
    conv_width: int
    dtype: torch.dtype

    @property
    def inner(self) -> int:
        """`expand * hidden` in most models, but not in all."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution runs over: x, B and C."""
        return self.inner + 2 * self.num_groups * self.d_state

    @property
    def projected(self) -> int:
        """What comes out of the first projection: the gate z, then `channels`, then dt."""
        return self.inner + self.channels + self.num_heads

    @property
    def weight_flops(self) -> float:
        return _product(self.hidden, self.projected) + _product(self.inner, self.hidden)

    @property
    def cost(self) -> PrefillCost:
        inside_tile = 2.0 * TILE * (self.num_groups * self.d_state + self.inner)  # C.B of all pairs of rows, times x
        across_tiles = 4.0 * self.inner * self.d_state  # C times the state at the start, B x into the state at the end
        conv = _conv(self.conv_width, self.channels)
        return PrefillCost(self.weight_flops + conv + inside_tile + across_tiles, 0.0)

    @property
    def cache(self) -> StateSpec:
        conv = (self.conv_width - 1, self.channels)
        return StateSpec(conv, (self.num_heads, self.head_dim, self.d_state), self.dtype)


@dataclass(frozen=True, slots=True)
class Mamba1Shape:
    """State-space mixer with one decay per channel and state (Gu and Dao 2023), computed token by token."""

    hidden: int
    inner: int
    d_state: int
    dt_rank: int
    conv_width: int
    dtype: torch.dtype

    @property
    def projected(self) -> int:
        """What comes out of the projection of x: dt of low rank, B and C."""
        return self.dt_rank + 2 * self.d_state

    @property
    def weight_flops(self) -> float:
        outer = _product(self.hidden, 2 * self.inner) + _product(self.inner, self.hidden)
        return outer + _product(self.inner, self.projected) + _product(self.dt_rank, self.inner)

    @property
    def cost(self) -> PrefillCost:
        scan = 7.0 * self.inner * self.d_state  # dt A, exp, times h, dt x, times B, C h, sum
        return PrefillCost(self.weight_flops + _conv(self.conv_width, self.inner) + scan, 0.0)

    @property
    def cache(self) -> StateSpec:
        return StateSpec((self.conv_width - 1, self.inner), (self.inner, self.d_state), self.dtype)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model, in the order in which its forward pass goes through the parts."""

    name: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype  # of rows, and of what is cached of them

    @property
    def cache_spec(self) -> CacheSpec:
        specs = (layer.cache for layer in self.layers)
        return CacheSpec(tuple(spec for spec in specs if spec is not None), self.hidden_size, self.dtype)

    @property
    def prefill_cost(self) -> PrefillCost:
        """Of all layers, without the head."""
        return total_cost(layer.cost for layer in self.layers)

    @property
    def head_flops(self) -> float:
        """Of the logits of one row. A prompt pays this once, not for each token."""
        return LinearShape(self.hidden_size, self.vocab_size).weight_flops


def total_cost(costs: Iterable[PrefillCost]) -> PrefillCost:
    costs = list(costs)
    return PrefillCost(sum(c.per_token for c in costs), sum(c.per_token_per_position for c in costs))


def _product(in_features: int, out_features: int) -> float:
    return 2.0 * in_features * out_features


def _conv(width: int, channels: int) -> float:
    return 2.0 * width * channels
