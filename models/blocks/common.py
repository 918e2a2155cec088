"""What the parts of a model have in common, and the projections and norms that they use.

A part takes packed rows x [R, hidden] and gives [R, hidden] back. It holds packed weights; its `shape` says what it
costs and what it keeps in the cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import add
from hybrid_cache.kernels.ops import KVTensors, Linear, NormWeights, Ops, StateTensors
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import LayerShape, LinearShape
from hybrid_cache.models.weights import LowRank, Weights

RANK_STEP = 8  # ranks are filled up to multiples of this with zeros
CacheEntry = KVTensors | StateTensors
RowNorm = Callable[[Tensor], Tensor]  # [R, size] -> [R, size]


def linear(ops: Ops, weights: Weights, parts: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
    """One packed projection for `parts` (name -> output features), all of the same input, outputs side by side.

    Where an adapter stands beside a part, its product is added.
    """
    matrices = [weights.take(f"{name}.weight", size, in_features) for name, size in parts.items()]
    biases = [weights.take(f"{name}.bias", size) for name, size in parts.items()] if bias else []
    packed = ops.linear(_join(matrices), _join(biases) if bias else None)
    pairs = {name: weights.low_rank(f"{name}.weight", size, in_features) for name, size in parts.items()}
    beside = {name: pair for name, pair in pairs.items() if pair is not None}
    return AdaptedLinear(ops, packed, parts, beside, matrices[0].dtype) if beside else packed


class AdaptedLinear:
    """A projection, and products of low rank that adapters add to parts of its output (Hu et al. 2021).

    All first factors lie in one matrix, all second ones in another with zeros between them. A row's result has the
    same bits whatever other rows there are, as those of the three products.
    """

    def __init__(
        self, ops: Ops, base: Linear, parts: Mapping[str, int], beside: Mapping[str, LowRank], dtype: torch.dtype
    ) -> None:
        """parts: output features of each, in their order   beside: what stands beside some of them"""
        self.in_features, self.out_features = base.in_features, base.out_features
        self._base = base
        rank = sum(len(pair.A) for pair in beside.values())
        down = torch.zeros(-(-rank // RANK_STEP) * RANK_STEP, base.in_features, device=ops.device)
        up = torch.zeros(base.out_features, len(down), device=ops.device)
        place = row = 0
        for name, size in parts.items():
            if name in beside:
                A, B = beside[name].A.to(ops.device), beside[name].B.to(ops.device)
                down[place : place + len(A)] = A
                up[row : row + size, place : place + len(A)] = B
                place += len(A)
            row += size
        self._down, self._up = ops.linear(down.to(dtype)), ops.linear(up.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        y = self._base(x)
        y += self._up(self._down(x))
        return y


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def linear_shape(part: Linear) -> LinearShape:
    return LinearShape(part.in_features, part.out_features)


class Norm:
    """Root-mean-square norm. With `plus_one` the file holds weights less one, which are added up in float32."""

    def __init__(self, ops: Ops, weights: Weights, name: str, size: int, eps: float, *, plus_one: bool = False) -> None:
        self.size = size
        self._rms_norm = ops.rms_norm
        name = f"{name}.weight"
        weight = 1.0 + weights.take_float32(name, size) if plus_one else weights.take(name, size)
        self.weights = NormWeights(weight, eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, size] -> [R, size]."""
        return self._rms_norm(x, self.weights.weight, self.weights.eps)


def hidden_norm(name: str, config: Config, weights: Weights, ops: Ops, eps: float) -> Norm:
    """Of rows that are as wide as the model."""
    return Norm(ops, weights, name, config.integer("hidden_size"), eps)


class PlainNorm:
    """Root-mean-square norm without weights."""

    def __init__(self, ops: Ops, size: int, eps: float, dtype: torch.dtype) -> None:
        self._rms_norm = ops.rms_norm
        self._ones = torch.ones(size, dtype=dtype)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, size] -> [R, size]."""
        return self._rms_norm(x, self._ones, self._eps)


class Mixer(ABC):
    """A part through which tokens see earlier ones: attention or a recurrence. It has one entry in the cache."""

    shape: LayerShape

    @abstractmethod
    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        """x [R, in] -> [R, hidden]; advances the sequences of the batch in `cache`."""

    def add_to(
        self, hidden: Tensor, norm: Norm, batch: ForwardBatch, cache: CacheEntry, multiplier: float = 1.0
    ) -> Tensor:
        """hidden [R, hidden] += multiplier * self(norm(hidden), batch, cache), in place -> hidden."""
        return add(hidden, self(norm(hidden), batch, cache), multiplier)


class FeedForward(ABC):
    """A part that treats each token by itself."""

    shape: LayerShape

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """More than one where a part is counted piece by piece."""
        return (self.shape,)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [R, hidden] -> [R, hidden]."""

    def add_to(self, hidden: Tensor, norm: Norm, multiplier: float = 1.0) -> Tensor:
        """hidden [R, hidden] += multiplier * self(norm(hidden)), in place -> hidden."""
        return add(hidden, self(norm(hidden)), multiplier)
