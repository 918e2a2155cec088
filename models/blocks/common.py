"""Projections and norms: what the other parts of a model use.

A part takes packed rows x [R, hidden] and gives [R, hidden] back. It holds packed weights; its `shape` says what it
costs and what it keeps in the cache.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.grid import MIN_ROWS
from hybrid_cache.kernels.ops import KVTensors, Linear, NormWeights, Ops, StateTensors
from hybrid_cache.models.shapes import LinearShape
from hybrid_cache.models.weights import Weights

CacheEntry = KVTensors | StateTensors
RowNorm = Callable[[Tensor], Tensor]  # [R, size] -> [R, size]


def linear(ops: Ops, weights: Weights, parts: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
    """One packed projection for `parts` (name -> output features), all of the same input, outputs side by side."""
    matrices = [weights.take(f"{name}.weight", size, in_features) for name, size in parts.items()]
    biases = [weights.take(f"{name}.bias", size) for name, size in parts.items()] if bias else []
    return ops.linear(_join(matrices), _join(biases) if bias else None)


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
        return self._rms_norm(x, self.weights.weight, self.weights.eps)


class PlainNorm:
    """Root-mean-square norm without weights."""

    def __init__(self, ops: Ops, size: int, eps: float, dtype: torch.dtype) -> None:
        self._rms_norm = ops.rms_norm
        self._ones = torch.ones(size, dtype=dtype)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self._ones, self._eps)


def wanted_rows(hidden: Tensor, batch: ForwardBatch) -> Tensor:
    """The output rows of the batch, first; padded to MIN_ROWS with copies of row 0."""
    rows = batch.output_rows
    missing = MIN_ROWS - rows.shape[0]
    return hidden[F.pad(rows, (0, missing)) if missing > 0 else rows]


def sigmoid(x: Tensor) -> Tensor:
    """In float32; unlike torch's own it rounds alike in the middle and at the end of a tensor."""
    return 1.0 / (1.0 + torch.exp(-x.float()))


def tanh(x: Tensor) -> Tensor:
    """In float32, with the same promise as `sigmoid`."""
    return 1.0 - 2.0 / (1.0 + torch.exp(2.0 * x.float()))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in float32; rounds alike everywhere in a tensor."""
    x = x.float()
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))
