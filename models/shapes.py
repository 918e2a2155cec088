"""What each kind of layer costs and keeps in the cache, from its sizes.

Every kind has a `cost` and a `cache`, what it keeps or None, and a model's are the sums over its layers. Of the cost,
`weight_flops` go into products with weight matrices: two for each weight that a token meets.

A multiplication and an addition are two FLOPs. Norms, gates, activations, biases and rotations are left out: they are
about a hundredth of the rest. A cost counts every token, also in a last layer where an engine may compute only the
rows that somebody reads.

A part that keeps something also says how tokens update it, see `Advance`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

import torch

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import AttentionSpec, CacheSpec, LayerSpec, PrefillCost, StateSpec, total_cost


class Advance(StrEnum):
    """How tokens update what a layer keeps, and so how the cache entries of two texts combine.

    ROWS         a row for each token, which no later token changes
    ELEMENTWISE  h -> a * h + b, number by number: two pieces make h -> (a2 * a1) * h + (a2 * b1 + b2)
    MATRIX       h -> A h + b: the same with products of matrices
    WINDOW       the last few inputs: those of the second piece, and of the first if the second is shorter
    """

    ROWS = "rows"
    ELEMENTWISE = "elementwise"
    MATRIX = "matrix"
    WINDOW = "window"


class LayerShape(Protocol):
    """One part of a model: a mixer, a feed-forward part or a lone projection."""

    @property
    def kind(self) -> str:
        """Its usual name."""
        ...

    @property
    def advance(self) -> Advance | None:
        """Of what it keeps; None if it keeps nothing, or nothing that can be combined from pieces.

        A convolution before a state keeps a window as well.
        """
        ...

    @property
    def cost(self) -> PrefillCost: ...

    @property
    def cache(self) -> AttentionSpec | StateSpec | None: ...


class Tokenwise:
    """A part that treats each token by itself: nothing to add to its matrices, nothing to keep."""

    __slots__ = ()
    kind: ClassVar[str] = "token by token"
    advance: ClassVar[Advance | None] = None

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
    """A router over all experts, and the experts that one token goes to. A shared expert is a separate MLP."""

    hidden: int
    inner: int
    num_experts: int
    num_active: int
    gated: bool = True
    latent: int | None = None  # what goes into and comes out of the experts, if not as wide as the router's input

    @property
    def weight_flops(self) -> float:
        expert = MLPShape(self.hidden if self.latent is None else self.latent, self.inner, self.gated)
        return _product(self.hidden, self.num_experts) + self.num_active * expert.weight_flops


@dataclass(frozen=True, slots=True)
class SharedMoEShape(Tokenwise):
    """Experts plus an MLP that every token goes to; where `gated`, it is scaled by one number for each token."""

    experts: MoEShape
    shared: MLPShape
    gated: bool

    @property
    def weight_flops(self) -> float:
        gate = _product(self.experts.hidden, 1) if self.gated else 0.0
        return self.experts.weight_flops + self.shared.weight_flops + gate


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Causal attention with grouped queries; what goes in may be wider than what comes out.

    gate    gate values that are projected for each head in addition to the query
    window  each token attends to the last `window` tokens, itself included; None for all. Costs ignore it
    """

    advance: ClassVar[Advance] = Advance.ROWS

    in_features: int
    out_features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    gate: int = 0
    window: int | None = None

    @property
    def kind(self) -> str:
        return "attention" if self.window is None else f"attention, window {self.window}"

    @property
    def weight_flops(self) -> float:
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.num_heads * self.gate
        return _product(self.in_features, qkv) + _product(self.num_heads * self.head_dim, self.out_features)

    @property
    def cost(self) -> PrefillCost:
        per_key = 4.0 * self.num_heads * self.head_dim  # q.k and p.v
        return PrefillCost(self.weight_flops + per_key, per_key)  # token p has p + 1 keys

    @property
    def cache(self) -> AttentionSpec:
        return AttentionSpec(self.num_kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class LatentAttentionShape:
    """Attention over latent rows that all heads share (DeepSeek-AI 2024).

    A head's query has a part of its own, which meets the latent row, and one that meets values next to it. A latent row
    is cached as a key and as a value.
    """

    kind: ClassVar[str] = "latent attention"
    advance: ClassVar[Advance] = Advance.ROWS

    hidden: int
    num_heads: int
    own_dim: int
    shared_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None  # None for queries of full rank
    dtype: torch.dtype
    gate: int = 0  # values of a gate for each head

    @property
    def query_dim(self) -> int:
        return self.own_dim + self.shared_dim

    @property
    def cached_dim(self) -> int:
        return self.kv_rank + self.shared_dim

    @property
    def weight_flops(self) -> float:
        q, gate = self.num_heads * self.query_dim, _product(self.hidden, self.num_heads * self.gate)
        low = _product(self.hidden, self.q_rank) + _product(self.q_rank, q) if self.q_rank else _product(self.hidden, q)
        latent = _product(self.kv_rank, self.num_heads * (self.own_dim + self.value_dim))
        out = _product(self.num_heads * self.value_dim, self.hidden)
        return low + _product(self.hidden, self.cached_dim) + latent + gate + out

    @property
    def cost(self) -> PrefillCost:
        per_key = 4.0 * self.num_heads * self.cached_dim  # q.c and p.c
        return PrefillCost(self.weight_flops + per_key, per_key)

    @property
    def cache(self) -> AttentionSpec:
        return AttentionSpec(1, self.cached_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """State-space mixer with one scalar decay per head (Dao and Gu 2024), computed in tiles."""

    kind: ClassVar[str] = "Mamba-2"
    advance: ClassVar[Advance] = Advance.ELEMENTWISE

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
        return StateSpec(conv, (self.num_heads, self.head_dim, self.d_state), self.dtype, (self.num_heads,))


@dataclass(frozen=True, slots=True)
class Mamba1Shape:
    """State-space mixer with one decay per channel and state (Gu and Dao 2023), computed token by token."""

    kind: ClassVar[str] = "Mamba-1"
    advance: ClassVar[Advance] = Advance.ELEMENTWISE

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
        return StateSpec((self.conv_width - 1, self.inner), (self.inner, self.d_state), self.dtype, (self.inner,))


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """Linear attention with a fixed decay for each head (Qin et al. 2024) and an output gate, computed in tiles."""

    kind: ClassVar[str] = "lightning attention"
    advance: ClassVar[Advance] = Advance.ELEMENTWISE

    hidden: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def weight_flops(self) -> float:
        return _product(self.hidden, 4 * self.inner) + _product(self.inner, self.hidden)

    @property
    def cost(self) -> PrefillCost:
        inside_tile = 4.0 * TILE * self.inner  # q.k of all pairs of rows, times v
        across_tiles = 4.0 * self.inner * self.head_dim  # q times the state at the start, v k into that at the end
        return PrefillCost(self.weight_flops + inside_tile + across_tiles, 0.0)

    @property
    def cache(self) -> StateSpec:
        return StateSpec((0, 0), (self.num_heads, self.head_dim, self.head_dim), self.dtype, (self.num_heads,))


@dataclass(frozen=True, slots=True)
class RgLruShape:
    """Real-gated linear recurrent unit between a convolution and a gate (De et al. 2024); its gates are in blocks."""

    kind: ClassVar[str] = "RG-LRU"
    advance: ClassVar[Advance] = Advance.ELEMENTWISE

    hidden: int
    width: int
    num_blocks: int
    conv_width: int
    dtype: torch.dtype

    @property
    def block_size(self) -> int:
        return self.width // self.num_blocks

    @property
    def weight_flops(self) -> float:
        outer = _product(self.hidden, 2 * self.width) + _product(self.width, self.hidden)
        return outer + self.num_blocks * _product(self.block_size, 2 * self.block_size)

    @property
    def cost(self) -> PrefillCost:
        scan = 2.0 * self.width  # a h, plus what comes in
        return PrefillCost(self.weight_flops + _conv(self.conv_width, self.width) + scan, 0.0)

    @property
    def cache(self) -> StateSpec:
        return StateSpec((self.conv_width - 1, self.width), (self.width,), self.dtype, (self.width,))


@dataclass(frozen=True, slots=True)
class ShortConvShape:
    """Gated short convolution (LFM2): a window of rows and no state."""

    kind: ClassVar[str] = "short convolution"
    advance: ClassVar[Advance] = Advance.WINDOW

    hidden: int
    conv_width: int
    dtype: torch.dtype

    @property
    def weight_flops(self) -> float:
        return _product(self.hidden, 3 * self.hidden) + _product(self.hidden, self.hidden)

    @property
    def cost(self) -> PrefillCost:
        return PrefillCost(self.weight_flops + _conv(self.conv_width, self.hidden), 0.0)

    @property
    def cache(self) -> StateSpec:
        return StateSpec((self.conv_width - 1, self.hidden), (0,), self.dtype)


@dataclass(frozen=True, slots=True)
class GatedDeltaShape:
    """Linear attention with the gated delta rule (Yang et al. 2024), computed in tiles."""

    kind: ClassVar[str] = "gated delta net"
    advance: ClassVar[Advance] = Advance.MATRIX

    hidden: int
    num_heads: int  # of values
    num_groups: int  # heads of queries and keys
    head_dim: int  # of values
    d_state: int  # of queries and keys
    conv_width: int
    dtype: torch.dtype

    @property
    def keys(self) -> int:
        return self.num_groups * self.d_state

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution runs over: queries, keys and values."""
        return 2 * self.keys + self.inner

    @property
    def projected(self) -> int:
        """What comes out of the first projection: `channels`, then the gate z, then b and a of each head."""
        return self.channels + self.inner + 2 * self.num_heads

    @property
    def weight_flops(self) -> float:
        return _product(self.hidden, self.projected) + _product(self.inner, self.hidden)

    @property
    def cost(self) -> PrefillCost:
        pairs = 4.0 * TILE * self.keys + 2.0 * TILE * self.inner  # q.k and k.k of all pairs of rows, then times values
        system = 1.0 * TILE * self.inner  # triangular, for what each token writes
        across_tiles = 6.0 * self.inner * self.d_state  # the state at the start times k and q, and what it becomes
        conv = _conv(self.conv_width, self.channels)
        return PrefillCost(self.weight_flops + conv + pairs + system + across_tiles, 0.0)

    @property
    def cache(self) -> StateSpec:
        conv = (self.conv_width - 1, self.channels)
        transition = (self.num_heads, self.d_state, self.d_state)
        return StateSpec(conv, (self.num_heads, self.head_dim, self.d_state), self.dtype, transition)


@dataclass(frozen=True, slots=True)
class KimiDeltaShape:
    """Linear attention with the delta rule and a decay for each column of a state (Kimi Team 2025), in tiles."""

    kind: ClassVar[str] = "Kimi delta attention"
    advance: ClassVar[Advance] = Advance.MATRIX

    hidden: int
    num_heads: int
    head_dim: int  # of queries, keys and values
    conv_width: int
    dtype: torch.dtype
    gate_rank: int | None  # of the projections of decay and gate; None for full rank

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution runs over: queries, keys and values."""
        return 3 * self.inner

    @property
    def gate_width(self) -> int:
        return self.inner if self.gate_rank is None else self.gate_rank

    @property
    def weight_flops(self) -> float:
        low = 0.0 if self.gate_rank is None else 2 * _product(self.gate_rank, self.inner)
        projected = self.channels + self.num_heads + 2 * self.gate_width
        return _product(self.hidden, projected) + low + _product(self.inner, self.hidden)

    @property
    def cost(self) -> PrefillCost:
        pairs = 6.0 * TILE * self.inner  # q.k and k.k of all pairs of rows, then times values
        system = 1.0 * TILE * self.inner  # triangular, for what each token writes
        across_tiles = 6.0 * self.inner * self.head_dim  # the state at the start times k and q, and what it becomes
        conv = _conv(self.conv_width, self.channels)
        return PrefillCost(self.weight_flops + conv + pairs + system + across_tiles, 0.0)

    @property
    def cache(self) -> StateSpec:
        conv = (self.conv_width - 1, self.channels)
        square = (self.num_heads, self.head_dim, self.head_dim)
        return StateSpec(conv, square, self.dtype, square)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model, in the order in which its forward pass goes through the parts."""

    name: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype  # of rows, and of what is cached of them
    stream: torch.dtype | None = None  # of rows between layers, where it is not `dtype`

    @property
    def cache_spec(self) -> CacheSpec:
        specs = (layer.cache for layer in self.layers)
        return CacheSpec(tuple(spec for spec in specs if spec is not None), self.hidden_size, self.dtype, self.stream)

    @property
    def prefill_cost(self) -> PrefillCost:
        """Of all layers, without the head."""
        return total_cost(layer.cost for layer in self.layers)

    @property
    def head_flops(self) -> float:
        """Of the logits of one row. A prompt pays this once, not for each token."""
        return LinearShape(self.hidden_size, self.vocab_size).weight_flops


def layer_specs(layers: Iterable[Sequence[LayerShape]]) -> tuple[LayerSpec, ...]:
    """Layers by the shapes of their parts."""
    specs, entry = list[LayerSpec](), 0
    for shapes in layers:
        kept = [shape for shape in shapes if shape.cache is not None]
        entries, entry = tuple(range(entry, entry + len(kept))), entry + len(kept)
        kinds = " and ".join(shape.kind for shape in kept)
        write = total_cost(map(write_cost, kept))
        specs.append(LayerSpec(kinds, entries, total_cost(shape.cost for shape in shapes), write))
    return tuple(specs)


def write_cost(shape: LayerShape) -> PrefillCost:
    """Of what a part caches alone, where there is a shorter way to it than running all of it."""
    match shape:
        case AttentionShape(num_kv_heads=heads, head_dim=size):
            return PrefillCost(_product(shape.in_features, 2 * heads * size), 0.0)
        case Mamba2Shape():
            into = _product(shape.hidden, shape.channels + shape.num_heads)
            state = 2.0 * shape.inner * shape.d_state
            return PrefillCost(into + _conv(shape.conv_width, shape.channels) + state, 0.0)
    return shape.cost


def ways_to_compose(shape: ModelShape) -> tuple[str, ...]:
    """How a choreography may reuse a model's cache entries, besides resuming from a checkpoint.

    relocated  rows of a text are used again at other positions: needs attention only
    composed   what two texts leave in the cache is combined: each layer must say how
    """
    advances = {layer.advance for layer in shape.layers if layer.cache is not None}
    if not advances or None in advances:
        return ()
    return ("relocated", "composed") if advances == {Advance.ROWS} else ("composed",)


def _product(in_features: int, out_features: int) -> float:
    return 2.0 * in_features * out_features


def _conv(width: int, channels: int) -> float:
    return 2.0 * width * channels
