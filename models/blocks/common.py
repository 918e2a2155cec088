"""What the parts of a model have in common, and the projections and norms that they use.

A part takes packed rows x [R, hidden] and gives [R, hidden] back. It holds packed weights; its `shape` says what it
costs and what it keeps in the cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.codes import joined
from hybrid_cache.kernels.elementwise import add
from hybrid_cache.kernels.ops import KVTensors, Linear, NormWeights, Ops, StateTensors
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import LayerShape, LinearShape
from hybrid_cache.models.weights import Weights

CacheEntry = KVTensors | StateTensors
RowNorm = Callable[[Tensor], Tensor]  # [R, size] -> [R, size]


def linear(
    ops: Ops,
    weights: Weights,
    parts: Mapping[str, int],
    in_features: int,
    *,
    bias: bool = False,
    coded: bool = True,
) -> Linear:
    """One packed projection for `parts` (name -> output features), all of the same input, outputs side by side.

    Adapters may stand beside each part. coded: multiplied as the scheme of the weights says, else in the rows' type,
    as where a choice hangs on the outputs
    """
    take = weights.take_matrix if coded else weights.take
    matrices = [take(f"{name}.weight", size, in_features) for name, size in parts.items()]
    biases = [weights.take(f"{name}.bias", size) for name, size in parts.items()] if bias else []
    packed = ops.linear(joined(matrices), torch.cat(biases) if bias else None)
    return weights.beside(packed, {f"{name}.weight": size for name, size in parts.items()})


def tail(projection: Linear, first: int) -> Linear:
    """The outputs of a projection from `first` on, with their bits: x [R, in_features] -> [R, out_features - first]."""
    part: Linear | None = projection.tail(first) if hasattr(projection, "tail") else None
    return _Tail(projection, first) if part is None else part


class _Tail:
    """Some outputs of a projection that gives them all."""

    def __init__(self, projection: Linear, first: int) -> None:
        self.in_features, self.out_features = projection.in_features, projection.out_features - first
        self._projection = projection
        self._first = first

    def __call__(self, x: Tensor) -> Tensor:
        return self._projection(x)[:, self._first :]


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

    def write(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> None:
        """x [R, in]; advances the sequences as a call does, to the same bits, where nobody needs what it gives."""
        self(x, batch, cache)

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
