"""Adapters beside one model, whose matrices stay as they are: what they may change, and the models they make of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_cache.device.adapted import AdaptedModel, Trunk
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.low_rank import MAX_RANK
from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models.adapters import Adapter
from hybrid_cache.models.depth import chain_of, digest_of, fingerprint_of
from hybrid_cache.models.files import few
from hybrid_cache.models.names import Names, core

HEAD = "lm_head.weight"
MERGE = "merge it (--merge-adapters)"


@dataclass(frozen=True, slots=True)
class Target:
    """A matrix that an adapter may stand beside."""

    place: int  # in the bank of products
    shape: tuple[int, int]  # out, in
    dtype: torch.dtype


class AdapterBank:
    """Made with a model, which it is given to build; from then on it makes models of adapters and keeps none of them.

    products: what the model's projections ask while it runs   num_bytes: of the matrices
    """

    def __init__(self, ops: Ops) -> None:
        self.products = ops.bank()
        self.num_bytes = 0
        self._targets = dict[str, Target]()
        self._facts = ""
        self._digests: Mapping[str, bytes] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """[out, in] of the matrices that adapters may stand beside, by name."""
        return {name: target.shape for name, target in self._targets.items()}

    def linear(self, packed: Linear, parts: Mapping[str, int], dtype: torch.dtype) -> Linear:
        """-> the projection, beside which adapters may stand.

        parts: weights by name, with their output features, in their order in the projection
        """
        linear, places = self.products.linear(packed, list(parts.values()))
        for (name, size), place in zip(parts.items(), places, strict=True):
            self._targets[name] = Target(place, (size, packed.in_features), dtype)
            self.num_bytes += size * packed.in_features * dtype.itemsize
        return linear

    def close(self, facts: str, digests: Mapping[str, bytes]) -> None:
        """The model is built; facts, digests: as `chain_of` takes them"""
        self._facts, self._digests = facts, digests

    def adapted(self, trunk: Trunk, adapter: Adapter) -> AdaptedModel:
        """The bank's model with an adapter beside it. Raises ModelError for one that does not fit."""
        adapter = adapter.named_in(Names({*self._digests, *self._targets}))
        self._check(adapter)
        digests, pairs = dict(self._digests), dict[int, tuple[Tensor, Tensor]]()
        for name in sorted(adapter.factors):
            target = self._targets[name]
            adapter.check_fits(name, target.shape)
            A, B = adapter.factors[name]
            digests |= {f"{name} beside {adapter.config.scale!r} {i}": digest_of(x) for i, x in enumerate((A, B))}
            pairs[target.place] = self._scaled(name, adapter, target.dtype)
        factors = self.products.factors(pairs)
        names = fingerprint_of(self._facts, digests), chain_of(self._facts, digests)
        return AdaptedModel(trunk, factors, *names, adapts_head=any(core(name) == HEAD for name in adapter.factors))

    def _check(self, adapter: Adapter) -> None:
        assert not adapter.replaced, "modules that are replaced belong into the trunk"
        named = f"adapter {adapter.name}"
        if missing := adapter.factors.keys() - self._digests.keys() - self._targets.keys():
            raise ModelError(f"{named} changes weights that are not there: {few(missing)}")
        if others := adapter.factors.keys() - self._targets.keys():
            raise UnsupportedModel(
                f"{named} changes {few(others)}, which is no product that it can stand beside: {MERGE}"
            )
        if adapter.config.rank > MAX_RANK:
            raise UnsupportedModel(f"{named}: r is {adapter.config.rank}, beside a model at most {MAX_RANK}: {MERGE}")

    def _scaled(self, name: str, adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, in], and B [out, rank] times the scale."""
        A, B = adapter.factors[name]
        pair = A.to(dtype), (adapter.config.scale * B.float()).to(dtype)
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise ModelError(f"adapter {adapter.name}: scaled factors of {name} are not finite in {dtype}")
        return pair
