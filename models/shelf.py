"""Weights of several models in one process: each tensor is stored once, however many of the models have it."""

from collections.abc import Callable, Sequence
from copy import copy
from hashlib import blake2b
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hybrid_cache.kernels.codes import Coded, Matrix
from hybrid_cache.kernels.ops import Experts, Linear, Ops
from hybrid_cache.models.weights import ModelWeights

T = TypeVar("T", Linear, Experts)
Key = tuple[object, ...]


class Shelf:
    """Matrices as they were packed, and tensors as they are, by their contents. It keeps nothing alive.

    num_bytes, num_shared_bytes: of matrices that were packed since `begin`, and of those that were there already
    """

    def __init__(self) -> None:
        self._packed: WeakValueDictionary[Key, Any] = WeakValueDictionary()
        self._tensors: WeakValueDictionary[Key, Tensor] = WeakValueDictionary()
        self.begin()

    def begin(self) -> None:
        """Starts to count, as for one more model."""
        self.num_bytes = self.num_shared_bytes = 0
        self._before, self._counted = set[Key](self._tensors), set[Key]()

    @property
    def num_own_bytes(self) -> int:
        """Of what was asked for since `begin`, packed or as it is, and was not there already."""
        new = [t for key, t in self._tensors.items() if key not in self._before and key not in self._counted]
        return self.num_bytes - self.num_shared_bytes + sum(tensor.nbytes for tensor in new)

    def ops(self, ops: Ops) -> Ops:
        """The same backend, which packs matrices of equal contents once."""
        shared: Any = ops.apart() if hasattr(ops, "apart") else copy(ops)
        own = cast(Ops, shared)
        pack_linear, pack_experts = own.linear, own.experts

        def linear(weight: Matrix, bias: Tensor | None = None) -> Linear:
            tensors = [weight] if bias is None else [weight, bias]
            return self._pack(("linear",), tensors, lambda: pack_linear(weight, bias))

        def experts(
            w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
        ) -> Experts:
            key = ("experts", len(w_in), act)
            return self._pack(key, [*w_in, *w_out], lambda: pack_experts(w_in, w_out, act))

        shared.linear, shared.experts = linear, experts
        return cast(Ops, shared)

    def weights(self, weights: ModelWeights) -> ModelWeights:
        """The same weights, of which large tensors with equal contents are one tensor."""
        return _ShelvedWeights(weights, self)

    def _pack(self, kind: Key, tensors: Sequence[Matrix], pack: Callable[[], T]) -> T:
        contents: list[Key] = [_contents(tensor) for tensor in tensors]
        key: Key = (*kind, *contents)
        self._counted.update((each,) for each in contents)
        found: T | None = self._packed.get(key)
        self._count(tensors, shared=found is not None)
        if found is None:
            found = self._packed[key] = pack()
        return found

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or one with the same contents that somebody has."""
        key = (_contents(tensor),)
        found = self._tensors.setdefault(key, tensor)
        if found is not tensor and not torch.equal(found, tensor):  # whoever has it has written to it
            return tensor
        return found

    def _count(self, tensors: Sequence[Matrix], *, shared: bool) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        self.num_bytes += num_bytes
        self.num_shared_bytes += num_bytes if shared else 0


class _ShelvedWeights:
    """See `Shelf.weights`. Only what is taken as it is goes through here: matrices that are packed are on the shelf."""

    def __init__(self, weights: ModelWeights, shelf: Shelf) -> None:
        self._weights = weights
        self._shelf = shelf
        self.take_float32, self.take_joined = weights.take_float32, weights.take_joined
        self.take_matrix, self.scheme = weights.take_matrix, weights.scheme
        self.has, self.beside, self.bank = weights.has, weights.beside, weights.bank
        self.ignore, self.finish = weights.ignore, weights.finish

    def take(self, name: str, *shape: int) -> Tensor:
        taken = self._weights.take(name, *shape)
        return self._shelf.tensor(taken) if len(shape) == 2 else taken


def _contents(tensor: Matrix) -> Key:
    """Equal for equal tensors."""
    if isinstance(tensor, Coded):
        return (tensor.bits, *_contents(tensor.codes), *_contents(tensor.scales))
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), blake2b(flat.numpy().data, digest_size=16).digest()
