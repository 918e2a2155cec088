"""Train an adapter with which a model reads what another model of its shape has cached.

    hybrid-cache train-lora [MODEL] --reads SENDER --transfer "take 0-1, project 2, take 3-5" --out DIR

The sender is frozen and computes the whole tiles of a dialogue's context. The receiver makes its entries of them by the
transfer, and runs what is left of the context, the question and the answer with the adapter, as an engine does it. The
loss compares its distributions over the answer with those that it had alone before (`distill`), and its choices with
the right answer. A share of dialogues is not shared (`in_place`), so that the model stays what it was without a sender.

In the network an entry of a token is a row of tensors: keys and values, or what goes into a convolution, what comes
out, steps and decays. The rows of the shared tokens are put where the receiver's own would be; what it computes for
these tokens is read by nobody, unless they are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_cache.errors import ConfigError
from hybrid_cache.models import folders
from hybrid_cache.models.tools.pairs import Example
from hybrid_cache.models.training import composed, lora, paired
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.dialogues import KINDS
from hybrid_cache.transfer import Transfer, Way, transfer_of, upper


class Sent(NamedTuple):
    """What one layer of a sender was given [B, T, hidden], and what it cached [B, T, ...], in the order of its use."""

    inputs: Tensor
    entries: list[Tensor]


@torch.no_grad()
def send(sender: net.Network, batch: net.Batch) -> list[Sent]:
    """The sender computes the rows -> what each of its layers leaves to others."""
    hidden, sent = sender.embedded(batch.tokens), list[Sent]()
    for layer in sender.model.layers:
        sent.append(Sent(hidden, []))
        hidden = layer(hidden, batch, partial(_kept, sent[-1].entries))
    return sent


def receive(
    receiver: net.Network, batch: net.Batch, shared: Tensor, transfer: Transfer, sent: Sequence[Sent]
) -> Tensor:
    """Final hidden states of the receiver [B, T, hidden]; those of shared tokens mean nothing.

    shared [B, T]: True for the first tokens of a row, whose entries are made from the sender's
    """
    hidden = receiver.embedded(batch.tokens)
    for index, (layer, theirs) in enumerate(zip(receiver.model.layers, sent, strict=True)):
        if index in transfer.reads:
            hidden = torch.where(shared[..., None], theirs.inputs, hidden)
        taken = transfer.ways[index] is Way.TAKE
        hidden = layer(hidden, batch, partial(_taken, shared, iter(theirs.entries)) if taken else net.own)
    return receiver.model.norm(hidden)  # type: ignore[no-any-return]


def _kept(entries: list[Tensor], entry: Tensor) -> Tensor:
    entries.append(entry)
    return entry


def _taken(shared: Tensor, theirs: Iterator[Tensor], entry: Tensor) -> Tensor:
    return torch.where(shared[..., None], next(theirs), entry)


def collate(examples: Sequence[Example]) -> tuple[net.Batch, rw.Targets, Tensor]:
    """Padded to one length; the targets are the answers -> batch, targets, and which tokens are shared [B, T]."""
    rows = [_row(each) for each in examples]
    batch, targets = rw.collate(rows)
    ends = torch.tensor([each.shared for each in examples])
    return batch, targets, torch.arange(batch.tokens.shape[1]) < ends[:, None]


def _row(example: Example) -> rw.TrainingRow:
    num, scored = len(example.tokens), example.num_scored
    return rw.TrainingRow(example.tokens.tolist(), [0.0] * (num - scored) + [1.0] * scored, [])


@dataclass(frozen=True, slots=True)
class Reader:
    """A network that reads what a sender has cached."""

    receiver: net.Network
    sender: net.Network
    transfer: Transfer

    def __post_init__(self) -> None:
        """Raises ConfigError for a sender of another shape, or a transfer of other layers."""
        ours, theirs = self.receiver.shape, self.sender.shape
        for each in fields(net.Shape):
            own, other = getattr(ours, each.name), getattr(theirs, each.name)
            if own != other:
                raise ConfigError(f"the sender is of another shape: its {each.name} is {other}, not {own}")

    def logits(self, batch: net.Batch, targets: rw.Targets, shared: Tensor) -> Tensor:
        """At the n targets, in fp32; [n, V]."""
        hidden = receive(self.receiver, batch, shared, self.transfer, send(self.sender, batch))
        return self.receiver.logits(hidden.flatten(0, 1).index_select(0, targets.position)).float()


def transfer_for(settings: lora.Settings, num_layers: int) -> Transfer:
    """Raises ConfigError for one of other layers."""
    if settings.transfer is None:
        return upper(num_layers, num_layers)
    try:
        return transfer_of(settings.transfer, num_layers)
    except ValueError as error:
        raise ConfigError(f"transfer {settings.transfer!r} cannot be read: {error}") from error


def opened(name: str) -> net.Network:
    """`DIR`, or what ships, and after a + an adapter that is merged in fp32. Raises HybridCacheError."""
    base, _, adapter = name.partition("+")
    folder = folders.resolve(base)
    network, _ = lora.load_base(folder)
    return composed.adapted(folder, adapter, torch.float32) if adapter else network


def examples_of(run: lora.TrainingRun) -> Iterator[list[Example]]:
    """Batches of dialogues, from the step on that a run has come to."""

    def drawn(rng: Random) -> Example:
        example = paired.dialogue(run.codec, rng.choice(KINDS), rng)
        return replace(example, num_shared=0) if rng.random() < run.settings.in_place else example

    return lora.pooled(drawn, lambda example: len(example.tokens), run.settings, run.step)


def shared_entries(folder: Path, run: lora.TrainingRun) -> Iterator[Callable[[], Tensor]]:
    """Lessons for reading the sender that the settings name. Raises HybridCacheError if the run cannot read it."""
    settings = run.settings
    assert settings.reads is not None
    reader = Reader(run.student, opened(settings.reads), transfer_for(settings, len(run.student.shape.layer_types)))
    start = settings.start
    alone = run.teacher if start is None else composed.adapted(folder, start, torch.float32)

    def loss(examples: Sequence[Example]) -> Tensor:
        batch, targets, shared = collate(examples)
        logits = reader.logits(batch, targets, shared)
        return lora.blended(logits, targets, lambda: lora.logits_of(alone, batch, targets), settings.distill)

    return (partial(loss, examples) for examples in examples_of(run))
