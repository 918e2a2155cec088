"""What one model keeps in the cache, in shapes and bytes; the cache learns nothing else about a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hybrid_cache.kernels.grid import TILE

if TYPE_CHECKING:  # books are kept without it
    import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """KV rows of one attention layer (or of one use of a shared attention block)."""

    num_kv_heads: int
    head_dim: int
    dtype: "torch.dtype"

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Recurrent state of one layer: the convolution window and the state proper.

    conv_shape   (width - 1, channels), oldest row first, in the model's dtype
    state_shape  (heads, head_dim, d_state) for Mamba-2 and delta nets, (channels, d_state) for Mamba-1; always float32;
                 (0,) for a layer that keeps a window only
    effect       shape of P in h -> P h + S, what a run of tokens does, in float32: (n,) where the numbers of tokens
                 add up, (heads, d_state, d_state) for products of matrices; see `device.effects`
    """

    conv_shape: tuple[int, int]
    state_shape: tuple[int, ...]
    conv_dtype: "torch.dtype"
    effect: tuple[int, ...] = (0,)

    @property
    def conv_bytes(self) -> int:
        return prod(self.conv_shape) * self.conv_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        return prod(self.state_shape) * 4


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """All cached tensors of a model, in the order in which its `forward` reads them."""

    layers: tuple[AttentionSpec | StateSpec, ...]
    hidden_size: int  # width of the hidden row kept with a prompt end
    hidden_dtype: "torch.dtype"
    stream_dtype: "torch.dtype | None" = None  # of the rows between layers, where it is not `hidden_dtype`

    @property
    def input_bytes(self) -> int:
        """What a layer is given for one token."""
        return self.hidden_size * (self.stream_dtype or self.hidden_dtype).itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(s.bytes_per_token for s in self.layers if isinstance(s, AttentionSpec))

    @property
    def page_bytes(self) -> int:
        return TILE * self.kv_bytes_per_token

    @property
    def slot_bytes(self) -> int:
        """One full recurrent state, all layers, each tensor on a 64-byte boundary."""
        return sum(align64(s.conv_bytes) + align64(s.state_bytes) for s in self.layers if isinstance(s, StateSpec))

    @property
    def effect_sums(self) -> int:
        """Numbers of an effect that add up over tokens."""
        return sum(prod(s.effect) for s in self.layers if isinstance(s, StateSpec) and len(s.effect) == 1)

    @property
    def effect_size(self) -> int:
        """Float32 numbers that what a run of tokens does to all states takes: first the sums, then the matrices."""
        return sum(prod(s.effect) for s in self.layers if isinstance(s, StateSpec))


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """FLOPs of prefill: token `p` costs `per_token + per_token_per_position * p`."""

    per_token: float
    per_token_per_position: float

    def part(self, share: float) -> "PrefillCost":
        return PrefillCost(share * self.per_token, share * self.per_token_per_position)

    def flops(self, start: int, end: int) -> float:
        """FLOPs to compute the tokens [start, end) when [0, start) is there."""
        n = end - start
        return n * self.per_token + self.per_token_per_position * n * (start + end - 1) / 2


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One of the layers that a model goes through."""

    kind: str  # of what mixes tokens in it; empty where nothing does
    entries: tuple[int, ...]  # of what is cached, in the order of `CacheSpec.layers`
    cost: PrefillCost
    write_cost: PrefillCost  # of what it caches alone, without what it gives to the next layer


def total_cost(costs: Iterable[PrefillCost]) -> PrefillCost:
    costs = list(costs)
    return PrefillCost(sum(c.per_token for c in costs), sum(c.per_token_per_position for c in costs))


def align64(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64
