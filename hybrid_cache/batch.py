"""The contract between the engine and a model: what a forward pass is given, and what it must return."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.spec import CacheSpec, PrefillCost

CacheTensors = tuple[KVTensors | StateTensors, ...]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """R packed rows, laid out as `RowLayout` describes; padding rows hold token 0 at position 0."""

    token_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    layout: RowLayout
    output_rows: Tensor  # [L] int64, the rows whose hidden state is wanted

    def to(self, device: torch.device) -> "ForwardBatch":
        rows = (t.to(device, non_blocking=True) for t in (self.token_ids, self.positions, self.output_rows))
        token_ids, positions, output_rows = rows
        return ForwardBatch(token_ids, positions, self.layout.to(device), output_rows)


class HybridModel(Protocol):
    """A loaded model. It owns its weights and nothing else."""

    @property
    def device(self) -> torch.device:
        """Of its weights, and of the tensors that it is given."""
        ...

    @property
    def packs(self) -> bool:
        """Takes batches whose chunks follow each other without padding (`kernels.layout`)."""
        ...

    @property
    def cache_spec(self) -> CacheSpec: ...

    @property
    def prefill_cost(self) -> PrefillCost: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """Longest context in tokens, prompt and answer together."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names weights and dtype; nothing cached under one fingerprint is ever used under another."""
        ...

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """Runs the batch, advancing pages and states in `cache` -> final-normed hidden rows [L, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> [L, V] float32; a row's bits do not depend on the other rows."""
        ...
