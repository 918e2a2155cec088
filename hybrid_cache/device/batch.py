"""The contract between the engine and a model: what a forward pass is given, and what it must return."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import KVTensors, Ops, RowAdapters, StateTensors
from hybrid_cache.spec import CacheSpec, LayerSpec, PrefillCost
from hybrid_cache.transfer import Transfer

CacheTensors = tuple[KVTensors | StateTensors, ...]


class EffectRecorder(Protocol):
    """What layers report to: it records what runs of tokens do to recurrent states; see `device.effects`."""

    def keys(self, kv: KVTensors, inv_freq: Tensor | None, first: int = 0) -> None:
        """An attention layer: its pages, and how its keys are rotated by their positions.

        inv_freq [d / 2] float32: values [first, first + d) of each head are rotated; None for none
        """
        ...

    def decay(self, state: Tensor, log_decay: Tensor) -> None:
        """State [slots, n, ...]: each token multiplies state[:, i] by exp(log_decay[token, i]).

        log_decay [R, n] float32: may be filled later, until another layer reports
        """
        ...

    def channel_decay(self, state: Tensor, A: Tensor, dt: Tensor) -> None:
        """State [slots, channels, N]: each token multiplies it by exp(dt A).

        dt [R, channels] float32   A [channels, N] float32
        """
        ...

    def matrix(self, state: Tensor, size: int, run: Callable[[slice, RowLayout, Tensor], object]) -> None:
        """State [slots, H, P, N]: tokens multiply each row by matrices. size: N

        run(rows, layout, pool): advances pool [1, H, N, N] by the recurrence of these rows, without new values
        """
        ...


class LayerInputs(Protocol):
    """Rows of the residual stream before layers, as another model had them; see `transfer`."""

    @property
    def transfer(self) -> Transfer: ...

    def __call__(self, layer: int) -> Tensor:
        """What a layer is given, for all rows of the batch: [R, hidden], the caller's own."""
        ...


def go_on() -> None:
    """Nothing to do between two layers."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """R packed rows, laid out as `RowLayout` describes; padding rows hold token 0 at position 0."""

    token_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    layout: RowLayout
    output_rows: Tensor  # [L] int64, the rows whose hidden state is wanted
    effects: EffectRecorder | None = None  # every layer that keeps something reports to it
    pause: Callable[[], None] = go_on  # called between layers; may run another batch, of other sequences
    tap: Callable[[int, Tensor], None] | None = None  # takes each layer's number, and what it is given [R, hidden]
    inputs: LayerInputs | None = None  # layers are not run one after the other, but as a transfer says
    adapters: RowAdapters | None = None  # that some rows have, in a model with a bank; None for none
    narrowed: Callable[[], None] = go_on  # called where from now on there are only the rows that are wanted

    def to(self, device: torch.device) -> "ForwardBatch":
        rows = (t.to(device, non_blocking=True) for t in (self.token_ids, self.positions, self.output_rows))
        token_ids, positions, output_rows = rows
        layout = self.layout.to(device)
        return replace(self, token_ids=token_ids, positions=positions, layout=layout, output_rows=output_rows)


class HybridModel(Protocol):
    """A loaded model. It owns its weights and nothing else."""

    @property
    def device(self) -> torch.device:
        """The device of its weights, and of the tensors that it is given."""
        ...

    @property
    def ops(self) -> Ops:
        """The operations that it is built from."""
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

    @property
    def invocation(self) -> tuple[int, ...]:
        """Tokens that switch it on: it computes a prompt from their last occurrence on, and the model that it is a
        variant of what comes before (activated LoRA, Greenewald et al. 2025, arXiv 2504.12397). Empty for others.
        """
        ...

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of what it computes up to each of its layers, as in `models.depth`; empty if nobody knows."""
        ...

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Its layers one by one."""
        ...

    @property
    def fidelities(self) -> tuple[str, ...]:
        """Fidelities that this model supports besides `exact`, see `choreography.arrangement.Fidelity`."""
        ...

    @property
    def commutes(self) -> bool:
        """Whether effects on the states may be averaged over all orders: no layer multiplies by matrices."""
        ...

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        """Runs the batch, advancing pages and states in `cache` -> final-normed hidden rows [L, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> [L, V] float32; a row's bits do not depend on the other rows."""
        ...
