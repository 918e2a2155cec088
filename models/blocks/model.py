"""What models share around their layers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.elementwise import tanh
from hybrid_cache.kernels.ops import Ops, RowAdapters
from hybrid_cache.models.bank import HEAD
from hybrid_cache.models.blocks.common import Norm
from hybrid_cache.models.config import Config
from hybrid_cache.models.context import context_of
from hybrid_cache.models.depth import chain_of, fingerprint_of
from hybrid_cache.models.shapes import Advance, LayerShape, ModelShape, layer_specs, ways_to_compose
from hybrid_cache.models.weights import ModelWeights

UNBOUNDED = 1 << 20
"""Tokens of context where a model without positions names no bound of its own: what a state holds does not grow."""


class Shaped(Protocol):
    """A layer, see `HybridStack`."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of its parts, in the order of use."""
        ...


class Stack(Protocol):
    """The layers of a model, see `HybridStack`."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of all parts, in the order of use."""
        ...

    @property
    def layers(self) -> Sequence[Shaped]: ...

    def __call__(self, hidden: Tensor, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """hidden [R, hidden], overwritten -> [L or more, hidden], the output rows of the batch first."""
        ...


class CausalModel:
    """What models share around their layers: token embedding, final norm, output head, and the facts about them."""

    def __init__(
        self,
        config: Config,
        weights: ModelWeights,
        ops: Ops,
        dtype: torch.dtype,
        *,
        stack: Stack,
        norm: Norm,
        tied: bool,
        logits_divisor: float = 1.0,
        logits_multiplier: float = 1.0,
        embedding: str = "model.embed_tokens.weight",
        embedding_multiplier: float = 1.0,
        residual: torch.dtype | None = None,
        max_length: int | None = None,
        logits_cap: float | None = None,
    ) -> None:
        """Takes the remaining weights.

        tied        a file without a head uses the embedding
        embedding   its name in the file
        residual    type of the rows between layers, where it is not `dtype`
        max_length  where the config says nothing
        logits_cap  bounds logits softly: cap * tanh(logits / cap)
        """
        hidden = config.integer("hidden_size")
        self.ops = ops
        self.device = ops.device
        self.packs = ops.packs
        self.vocab_size = config.integer("vocab_size")
        self.context = context_of(config, max_length)
        self.max_length = self.context.length
        stream = None if residual in (None, dtype) else residual
        self.shape = ModelShape(type(self).__name__, stack.shapes, hidden, self.vocab_size, dtype, stream)
        self.layers = layer_specs(layer.shapes for layer in stack.layers)
        self.fidelities = ways_to_compose(self.shape)
        self.commutes = all(shape.advance is not Advance.MATRIX for shape in stack.shapes)
        self.cache_spec = self.shape.cache_spec
        self.prefill_cost = self.shape.prefill_cost
        self._dtype = dtype
        self._residual = residual or dtype
        self._embedding = weights.take(embedding, self.vocab_size, hidden)
        self._embedding_multiplier = embedding_multiplier
        self._stack = stack
        if tied and not weights.has(HEAD):
            self._head = ops.linear(weights.scheme.head(self._embedding))
        else:
            packed = ops.linear(weights.take_matrix(HEAD, self.vocab_size, hidden, head=True))
            self._head = weights.beside(packed, {HEAD: self.vocab_size})
        self._norm = norm
        self._logits_divisor = logits_divisor
        self._logits_cap = logits_cap
        self._logits_multiplier = logits_multiplier
        facts, digests = f"{type(self).__name__} {config.used_json()} {dtype} {ops.name}", weights.finish()
        self.fingerprint, self.chain = fingerprint_of(facts, digests), chain_of(facts, digests)
        self.bank = weights.bank
        if self.bank is not None:
            self.bank.close(facts, digests)
        self.invocation: tuple[int, ...] = ()

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """Advances pages and states in `cache` -> normed hidden rows [L, hidden]."""
        if self.bank is None:
            assert batch.adapters is None
            return self._forward(batch, cache)
        with self.bank.products.during(batch.adapters):
            narrowed = partial(self.bank.products.narrow, batch.output_rows)
            return self._forward(replace(batch, narrowed=narrowed), cache)

    def _forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = self._stack(self._embed(batch.token_ids), batch, cache)
        return self._norm(hidden)[: batch.output_rows.shape[0]].to(self._dtype)

    def _embed(self, token_ids: Tensor) -> Tensor:
        hidden = F.embedding(token_ids, self._embedding).to(self._residual)
        if self._embedding_multiplier != 1.0:
            hidden *= self._embedding_multiplier
        return hidden

    def logits(self, hidden: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """hidden [L, hidden], and the adapters of these rows -> [L, V] float32; a row's bits do not depend on the
        other rows."""
        if self.bank is None:
            return self._logits(hidden)
        with self.bank.products.during(adapters):
            return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        if self._logits_multiplier != 1.0:
            logits *= self._logits_multiplier
        if self._logits_divisor != 1.0:
            logits = logits / self._logits_divisor
        return logits if self._logits_cap is None else self._logits_cap * tanh(logits / self._logits_cap)
