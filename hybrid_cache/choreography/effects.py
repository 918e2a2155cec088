"""What a run of tokens does to a recurrent state, h -> P h + S, and what each layer must tell to know it.

S is what the run leaves in a state that was zero. P comes from a recorder that layers report to while they run
(`ForwardBatch.effects`): one number a head for Mamba-2, a time step a channel for Mamba-1, a matrix a head for delta
nets.

P and S of a message hold for the inputs that its layers saw when it was encoded. Composition is therefore exact inside
one layer, and approximate through the depth of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.layout import TILE, RowLayout
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.runs import Run, arrange

MOST_TERMS = 16  # noted before they are summed, which takes longer than to note them


class Transition(Protocol):
    """How P of one state tensor is written down (`p`, float32) and what it does."""

    commutes: bool  # P1 P2 = P2 P1

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        """P h, for one state h [*state_shape]."""
        ...

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """h after n messages, one after the other; changes h. ps [n, ...], sums n times [*state_shape]: p and S."""
        ...

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        """h -= P before."""
        ...


@dataclass(frozen=True, slots=True)
class Decay:
    """p [n]: the logarithm of one factor for each h[i], whatever follows i. Products are sums of logarithms."""

    commutes = True

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h * _beside(p.exp(), h)

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        first, *later = _from_each_on(ps).exp()
        h.mul_(_beside(first, h))
        for weight, s in zip(later, sums, strict=False):  # nothing comes after the last one
            h.addcmul_(s, _beside(weight, h))
        return h.add_(sums[-1])

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        h.addcmul_(before, _beside(p.exp(), h), value=-1)


@dataclass(frozen=True, slots=True, eq=False)
class ChannelDecay:
    """p [channels]: the time that has passed, sum of dt; P = exp(p A) with A [channels, N]."""

    A: Tensor
    commutes = True

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h * (p[:, None] * self.A).exp_()

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        first, *later = _from_each_on(ps)
        h.mul_((first[:, None] * self.A).exp_())
        for time, s in zip(later, sums, strict=False):
            h.addcmul_(s, (time[:, None] * self.A).exp_())
        return h.add_(sums[-1])

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        h.addcmul_(before, (p[:, None] * self.A).exp_(), value=-1)


@dataclass(frozen=True, slots=True)
class MatrixTransition:
    """p [H, N, N]: for h [H, P, N], the matrix that each of its rows is multiplied with."""

    commutes = False

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h @ p

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        for p, s in zip(ps, sums, strict=True):
            torch.baddbmm(s, h.clone(), p, out=h)
        return h

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        h.baddbmm_(before, p, alpha=-1)


def _beside(factors: Tensor, h: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (h.dim() - 1))


def _from_each_on(ps: Tensor) -> Tensor:
    """ps [n, ...], logarithms -> those of the product of each and all after it."""
    return ps.flip(0).cumsum(0).flip(0) if len(ps) > 1 else ps


@dataclass(slots=True)
class Effect:
    """P of one run of tokens, as it is being computed. A decoding sequence adds one term a step.

    terms     [tokens, total] float32: of all states whose p is a sum over tokens, side by side
    matrices  p of the others
    """

    terms: list[Tensor] = field(default_factory=list)
    matrices: list[Tensor] = field(default_factory=list)

    def add(self, term: Tensor) -> None:
        self.terms.append(term)
        if len(self.terms) == MOST_TERMS:
            self.terms = [torch.cat(self.terms).sum(0, keepdim=True)]

    def packed(self) -> Tensor:
        """p of all states in one row, float32; `StatePart.of` finds them there."""
        sums = [torch.cat(self.terms).sum(0)] if self.terms else []
        return torch.cat([*sums, *(p.flatten() for p in self.matrices)])


@dataclass(frozen=True, slots=True)
class StatePart:
    """A state tensor [slots, ...] of the cache, or the heads of one that a layer treats together.

    start, shape: where p of this state lies in a packed effect, and what it looks like
    """

    state: Tensor
    transition: Transition
    shape: tuple[int, ...]
    start: int = 0

    def of(self, packed: Tensor) -> Tensor:
        """p of this state in packed effects [n, total] -> [n, *shape], or in one [total] -> [*shape]."""
        return packed[..., self.start : self.start + prod(self.shape)].view(*packed.shape[:-1], *self.shape)


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

    def settle(self) -> None:
        """Gives each state its place in a packed effect: sums first, then matrices."""
        sizes = [prod(part.shape) for part in self.states]
        order = sorted(range(len(sizes)), key=lambda i: not _is_sum(self.states[i].transition))
        starts = accumulate((sizes[i] for i in order), initial=0)
        for i, start in zip(order, starts, strict=False):
            self.states[i] = replace(self.states[i], start=start)


def _is_sum(transition: Transition) -> bool:
    return not isinstance(transition, MatrixTransition)


class Recorder:
    """Collects the effects of some runs of one forward pass. Layers report in the same order in each pass."""

    def __init__(self, anatomy: Anatomy, runs: Sequence[tuple[slice, Effect]]) -> None:
        """runs: rows of the batch that belong to one run each, and where what they do is added"""
        self._anatomy = anatomy
        self._learns = not anatomy.known
        self._runs = runs
        self._terms: list[Tensor] = []
        self._num_matrices = 0

    def keys(self, kv: KVTensors, inv_freq: Tensor | None, first: int = 0) -> None:
        """An attention layer: where its rows are, and how its keys are turned by their positions."""
        if self._learns:
            self._anatomy.keys.append(KeyRows(kv, inv_freq, first))

    def decay(self, state: Tensor, log_decay: Tensor) -> None:
        """log_decay [R, n] float32, of each token, for state [slots, n, ...]; read when the pass is over."""
        self._terms.append(log_decay)
        self._register(state, Decay, log_decay.shape[1:])

    def channel_decay(self, state: Tensor, A: Tensor, dt: Tensor) -> None:
        """dt [R, channels] float32, A [channels, N], for state [slots, channels, N]."""
        self._terms.append(dt)
        self._register(state, lambda: ChannelDecay(A), dt.shape[1:])

    def matrix(self, state: Tensor, size: int, run: Callable[[slice, RowLayout, Tensor], object]) -> None:
        """`run(rows, layout, pool)` advances pool [1, H, N, N] by the recurrence of these rows without new values.

        Started from the identity, that is P. size: N; state [slots, H, P, N]
        """
        heads, number = state.shape[1], self._num_matrices
        self._num_matrices += 1
        self._register(state, MatrixTransition, (heads, size, size))
        for rows, effect in self._runs:
            length = rows.stop - rows.start
            if number < len(effect.matrices):
                pool = effect.matrices[number].clone()
            else:
                pool = torch.eye(size, device=state.device).expand(1, heads, size, size).contiguous()
            layout, _ = arrange([Run(0, length, 0, 0, False, [0] * -(-length // TILE), [])], [], packed=True)
            run(rows, replace(layout, num_rows=length), pool)  # no padding: nothing is multiplied by weights
            effect.matrices[number : number + 1] = [pool]

    def end(self) -> None:
        """To be called after the pass."""
        if self._learns:
            self._anatomy.settle()
        if self._terms:
            terms = torch.cat(self._terms, dim=1)
            for rows, effect in self._runs:
                effect.add(terms[rows])

    def _register(self, state: Tensor, kind: Callable[[], Transition], shape: Sequence[int]) -> None:
        if self._learns:
            self._anatomy.states.append(StatePart(state, kind(), tuple(shape)))
