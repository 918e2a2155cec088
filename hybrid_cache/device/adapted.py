"""Adapters that stand beside a model: to the engine each is a model of its own, whose rows its trunk computes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch, HybridModel
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Factors, RowAdapters
from hybrid_cache.work import Work


class Trunk(HybridModel, Protocol):
    """A model that adapters may stand beside: `forward` minds the adapters of a batch."""

    def logits(self, hidden: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """hidden [L, hidden], and the adapters of these rows -> [L, V] float32."""
        ...


class AdaptedModel:
    """A trunk with an adapter for all rows; it has nothing of its own but the adapter's factors and its names.

    adapts_head: whether logits are others than the trunk's
    """

    def __init__(
        self, trunk: Trunk, factors: Factors, fingerprint: str, chain: tuple[str, ...], *, adapts_head: bool
    ) -> None:
        self.trunk, self.factors, self.adapts_head = trunk, factors, adapts_head
        self.fingerprint, self.chain = fingerprint, chain
        self.invocation: tuple[int, ...] = ()
        self.device, self.ops, self.packs = trunk.device, trunk.ops, trunk.packs
        self.cache_spec, self.prefill_cost, self.layers = trunk.cache_spec, trunk.prefill_cost, trunk.layers
        self.vocab_size, self.max_length = trunk.vocab_size, trunk.max_length
        self.fidelities, self.commutes = trunk.fidelities, trunk.commutes

    def on(self, trunk: Trunk) -> "AdaptedModel":
        """The same beside another copy of the trunk."""
        other = AdaptedModel(trunk, self.factors, self.fingerprint, self.chain, adapts_head=self.adapts_head)
        other.invocation = self.invocation
        return other

    def invoked_by(self, tokens: tuple[int, ...]) -> "AdaptedModel":
        """The same, which is only on from these tokens in a prompt, as its fingerprint says: see `HybridModel`."""
        name = blake2b(f"{self.fingerprint} {tokens}".encode(), digest_size=16).hexdigest()
        other = AdaptedModel(self.trunk, self.factors, name, (), adapts_head=self.adapts_head)
        other.invocation = tokens
        return other

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        adapters = RowAdapters.one(self.factors, len(batch.token_ids))
        return self.trunk.forward(replace(batch, adapters=adapters), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.trunk.logits(hidden, RowAdapters.one(self.factors, len(hidden)) if self.adapts_head else None)


def trunk_of(model: HybridModel) -> HybridModel:
    """The model that computes the rows, whatever stands beside it."""
    return model.trunk if isinstance(model, AdaptedModel) else model


def adapters_of(models: Sequence[HybridModel]) -> RowAdapters | None:
    """Of rows of these models, which have one trunk; None if none has an adapter."""
    adapted = {model.fingerprint: model.factors for model in models if isinstance(model, AdaptedModel)}
    if not adapted:
        return None
    numbers = {fingerprint: number for number, fingerprint in enumerate(adapted)}
    index = [numbers.get(model.fingerprint, -1) for model in models]
    return RowAdapters(torch.tensor(index, dtype=torch.int64), tuple(adapted.values()))


def row_adapters(work: Work, layout: RowLayout, models: Mapping[str, HybridModel]) -> RowAdapters | None:
    """Of all rows of a batch of work that one trunk does; None if none has an adapter. models: by fingerprint"""
    runs = adapters_of([models[rows.model] for rows in (*work.chunks, *work.decodes)])
    if runs is None:
        return None
    index = torch.full((layout.num_rows,), -1, dtype=torch.int64)
    first_rows = (*layout.chunk_row.tolist(), *range(layout.decode_row, layout.decode_row + len(work.decodes)))
    for rows, first, number in zip((*work.chunks, *work.decodes), first_rows, runs.index, strict=True):
        index[first : first + len(rows.tokens)] = number
    return replace(runs, index=index)


def head_adapters(models: Sequence[HybridModel]) -> RowAdapters | None:
    """As `adapters_of`, of those that change logits."""
    return adapters_of(
        [each if not isinstance(each, AdaptedModel) or each.adapts_head else each.trunk for each in models]
    )
