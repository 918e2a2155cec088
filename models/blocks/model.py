"""What models share around their layers."""

from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.elementwise import tanh
from hybrid_cache.kernels.grid import MIN_ROWS
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.common import Norm
from hybrid_cache.models.config import Config
from hybrid_cache.models.depth import chain_of
from hybrid_cache.models.shapes import Advance, LayerShape, ModelShape, ways_to_compose
from hybrid_cache.models.weights import ModelWeights

UNBOUNDED = 1 << 20
"""Tokens of context where a model without positions names no bound of its own: what a state holds does not grow."""


class Stack(Protocol):
    """The layers of a model, see `HybridStack`."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of all parts, in the order of use."""
        ...

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
        self.max_length = config.integer("max_position_embeddings", max_length)
        self.shape = ModelShape(type(self).__name__, stack.shapes, hidden, self.vocab_size, dtype)
        self.fidelities = ways_to_compose(self.shape)
        self.commutes = all(shape.advance is not Advance.MATRIX for shape in stack.shapes)
        self.cache_spec = self.shape.cache_spec
        self.prefill_cost = self.shape.prefill_cost
        self._dtype = dtype
        self._residual = residual or dtype
        self._embedding = weights.take(embedding, self.vocab_size, hidden)
        self._embedding_multiplier = embedding_multiplier
        self._stack = stack
        shared = tied and not weights.has("lm_head.weight")
        self._head = ops.linear(self._embedding if shared else weights.take("lm_head.weight", self.vocab_size, hidden))
        self._norm = norm
        self._logits_divisor = logits_divisor
        self._logits_cap = logits_cap
        self._logits_multiplier = logits_multiplier
        facts, digests = f"{type(self).__name__} {config.used_json()} {dtype} {ops.name}", weights.finish()
        named = "".join(f"\n{name} {digest.hex()}" for name, digest in digests.items())
        self.fingerprint = blake2b((facts + named).encode(), digest_size=16).hexdigest()
        self.chain = chain_of(facts, digests)

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """Advances pages and states in `cache` -> normed hidden rows [L, hidden]."""
        hidden = self._stack(self._embed(batch.token_ids), batch, cache)
        return self._norm(hidden)[: batch.output_rows.shape[0]].to(self._dtype)

    def _embed(self, token_ids: Tensor) -> Tensor:
        hidden = F.embedding(token_ids, self._embedding).to(self._residual)
        if self._embedding_multiplier != 1.0:
            hidden *= self._embedding_multiplier
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> [L, V] float32; a row's bits do not depend on the other rows."""
        rows = hidden.shape[0]
        if rows < MIN_ROWS:
            hidden = F.pad(hidden, (0, 0, 0, MIN_ROWS - rows))
        logits = self._head(hidden)[:rows].float()
        if self._logits_multiplier != 1.0:
            logits *= self._logits_multiplier
        if self._logits_divisor != 1.0:
            logits = logits / self._logits_divisor
        return logits if self._logits_cap is None else self._logits_cap * tanh(logits / self._logits_cap)
