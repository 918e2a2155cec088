"""Activated adapters (aLoRA, Greenewald et al. 2025): factors that count from an invocation on, and not before it.

A row of the base becomes a row of the adapter at the first token of the invocation, as PEFT computes it: all that was
read before has the keys, values and states of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.training import lora
from hybrid_cache.models.training import network as net


class Switch:
    """Where the factors of one adapter count in the rows that are read next: `on` [B, T] bool."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = list(invocation)
        self.on = torch.zeros(0, 0, dtype=torch.bool)

    def set(self, batch: net.Batch) -> None:
        """From the invocation in each branch to its end; those on the trunk are not the last one, and do not count."""
        self.on = torch.zeros_like(batch.tokens, dtype=torch.bool)
        windows = batch.tokens.unfold(1, len(self.invocation), 1)
        found = (windows == torch.tensor(self.invocation)).all(-1)
        for row, start in found.nonzero().tolist():
            if (root := batch.root[row, start]) > 0:
                length = int((batch.root[row, start:] == root).cumprod(0).sum())
                self.on[row, start : start + length] = True


class ActivatedLinear(lora.LoraLinear):
    """A frozen linear layer with low-rank factors for the rows of a switch."""

    def __init__(self, switch: Switch, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank, scale, dropout)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, in] -> [B, T, out]."""
        y: Tensor = self.base(x)
        return torch.where(self.switch.on[..., None], y + self.change(x), y)


def attach(
    network: net.Network, config: LoraConfig, invocation: Sequence[int]
) -> tuple[Switch, dict[str, nn.Parameter]]:
    """Freezes the network and adds factors -> their switch, and what trains, as `lora.attach`."""
    switch = Switch(invocation)
    return switch, lora.attach(network, config, partial(ActivatedLinear, switch))
