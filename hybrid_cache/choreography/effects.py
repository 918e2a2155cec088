"""What a run of tokens does to a recurrent state, h -> P h + S, and what each layer must tell to know it.

S is what the run leaves in a state that was zero. P comes from a recorder that layers report to while they run
(`ForwardBatch.effects`): one number a head for Mamba-2, a time step a channel for Mamba-1, a matrix a head for delta
nets.

P and S of a message hold for the inputs that its layers saw when it was encoded. Composition is therefore exact inside
one layer, and approximate through the depth of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.layout import TILE, RowLayout
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.runs import Run, arrange

MOST_TERMS = 16  # noted before they are summed: they keep the rows of as many steps alive


class Transition(Protocol):
    """How P of one state tensor is written down (`p`, float32) and what it does."""

    commutes: bool  # P1 P2 = P2 P1

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        """P h, for one state h [*state_shape]."""
        ...

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """p of one run after another."""
        ...

    def follow(self, h: Tensor, ps: Tensor, sums: Tensor) -> Tensor:
        """h after n messages, one after the other. ps [n, ...] and sums [n, *state_shape]: p and S of each."""
        ...


@dataclass(frozen=True, slots=True)
class Decay:
    """p [n]: the logarithm of one factor for each h[i], whatever follows i. Products are sums of logarithms."""

    commutes = True

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h * p.exp().view(-1, *[1] * (h.dim() - 1))

    def follow(self, h: Tensor, ps: Tensor, sums: Tensor) -> Tensor:
        first, later = _products(ps)
        weights = later.exp().T[:, None]  # [heads, 1, n]
        rows = sums.flatten(2).transpose(0, 1) if sums.dim() > 2 else sums.T[:, :, None]
        return self.apply(first, h).add_(torch.bmm(weights, rows).view(h.shape))

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


@dataclass(frozen=True, slots=True, eq=False)
class ChannelDecay:
    """p [channels]: the time that has passed, sum of dt; P = exp(p A) with A [channels, N]."""

    A: Tensor
    commutes = True

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h * (p[:, None] * self.A).exp()

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def follow(self, h: Tensor, ps: Tensor, sums: Tensor) -> Tensor:
        first, later = _products(ps)
        return self.apply(first, h).add_(((later[:, :, None] * self.A).exp() * sums).sum(0))


@dataclass(frozen=True, slots=True)
class MatrixTransition:
    """p [H, N, N]: for h [H, P, N], the matrix that each of its rows is multiplied with."""

    commutes = False

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h @ p

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second

    def follow(self, h: Tensor, ps: Tensor, sums: Tensor) -> Tensor:
        for p, s in zip(ps, sums, strict=True):
            h = self.apply(p, h).add_(s)
        return h


def _products(ps: Tensor) -> tuple[Tensor, Tensor]:
    """ps [n, ...], logarithms -> of the product of all, and of those after each."""
    totals = ps.flip(0).cumsum(0).flip(0)
    return totals[0], torch.cat([totals[1:], torch.zeros_like(ps[:1])])


@dataclass(slots=True)
class Effect:
    """P of one run of tokens, as it is being computed: for each entry of `Anatomy.states`, terms of a sum, or a matrix.

    A decoding sequence adds one term a step; they are summed now and then, since that takes longer than to note them.
    """

    terms: list[list[Tensor]] = field(default_factory=list)

    def add(self, call: int, term: Tensor) -> None:
        """term [tokens, ...]."""
        if call == len(self.terms):
            self.terms.append([])
        terms = self.terms[call]
        terms.append(term)
        if len(terms) == MOST_TERMS:
            self.terms[call] = [torch.cat(terms).sum(0, keepdim=True)]

    def transitions(self) -> list[Tensor]:
        """p for each state."""
        return [
            terms[0][0] if terms[0].shape[0] == len(terms) == 1 else torch.cat(terms).sum(0) for terms in self.terms
        ]


@dataclass(frozen=True, slots=True)
class StatePart:
    """A state tensor [slots, ...] of the cache, or the heads of one that a layer treats together."""

    state: Tensor
    transition: Transition


@dataclass(frozen=True, slots=True)
class KeyRows:
    """KV pages of one attention layer, and how its keys turn: values [first, first + 2 len) of each head."""

    kv: KVTensors
    inv_freq: Tensor | None
    first: int = 0


@dataclass(slots=True)
class Anatomy:
    """What a model's layers have told of themselves, in the order of their calls; known after one recorded pass."""

    states: list[StatePart] = field(default_factory=list)
    keys: list[KeyRows] = field(default_factory=list)

    @property
    def known(self) -> bool:
        return bool(self.states or self.keys)


class Recorder:
    """Collects the effects of some runs of one forward pass. Layers report in the same order in each pass."""

    def __init__(self, anatomy: Anatomy, runs: Sequence[tuple[slice, Effect]]) -> None:
        """runs: rows of the batch that belong to one run each, and where what they do is added"""
        self._anatomy = anatomy
        self._learns = not anatomy.known
        self._runs = runs
        self._calls = 0

    def keys(self, kv: KVTensors, inv_freq: Tensor | None, first: int = 0) -> None:
        """An attention layer: where its rows are, and how its keys are turned by their positions."""
        if self._learns:
            self._anatomy.keys.append(KeyRows(kv, inv_freq, first))

    def decay(self, state: Tensor, log_decay: Tensor) -> None:
        """log_decay [R, n] float32, of each token, for state [slots, n, ...]."""
        self._add(state, Decay, log_decay)

    def channel_decay(self, state: Tensor, A: Tensor, dt: Tensor) -> None:
        """dt [R, channels] float32, A [channels, N], for state [slots, channels, N]."""
        self._add(state, lambda: ChannelDecay(A), dt)

    def matrix(self, state: Tensor, size: int, run: Callable[[slice, RowLayout, Tensor], object]) -> None:
        """`run(rows, layout, pool)` advances pool [1, H, N, N] by the recurrence of these rows without new values.

        Started from the identity, that is P. size: N; state [slots, H, P, N]
        """
        call = self._register(state, MatrixTransition)
        heads = state.shape[1]
        for rows, effect in self._runs:
            length = rows.stop - rows.start
            if call < len(effect.terms):
                pool = effect.terms[call][0].clone()
            else:
                pool = torch.eye(size, device=state.device).expand(1, heads, size, size).contiguous()
            layout, _ = arrange([Run(0, length, 0, 0, False, [0] * -(-length // TILE), [])], [], packed=True)
            run(rows, replace(layout, num_rows=length), pool)  # no padding: nothing is multiplied by weights
            effect.terms[call : call + 1] = [[pool]]

    def _add(self, state: Tensor, kind: Callable[[], Transition], rows_of: Tensor) -> None:
        call = self._register(state, kind)
        for rows, effect in self._runs:
            effect.add(call, rows_of[rows])

    def _register(self, state: Tensor, kind: Callable[[], Transition]) -> int:
        call = self._calls
        self._calls += 1
        if self._learns:
            self._anatomy.states.append(StatePart(state, kind()))
        return call
