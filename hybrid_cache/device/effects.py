"""What a run of tokens does to a recurrent state, h -> P h + S, and what each layer must report for it.

S is what the run leaves in a state that was zero. P comes from a recorder that layers report to while they run
(`ForwardBatch.effects`): one number a head for Mamba-2, a time step a channel for Mamba-1, a matrix a head for delta
nets. It is written down in memory of the cache from the first token on, so the budget counts it while it grows.

P and S of a message hold for the inputs that its layers saw when it was encoded. Composition is therefore exact inside
one layer, and approximate through the depth of a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.runs import Run, arrange

MOST_TERMS = 16  # noted before they are summed, which takes longer than to note them


class Transition(Protocol):
    """How P of one state tensor is written down (`p`, float32) and what it does."""

    commutes: bool  # P1 P2 = P2 P1

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        """P h, for one state h [*state_shape], p [*p_shape]."""
        ...

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """h [*state_shape] after n messages in order, in place. ps [n, *p_shape], sums: n of [*state_shape]."""
        ...

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        """h -= P before; both [*state_shape]."""
        ...


@dataclass(frozen=True, slots=True)
class Decay:
    """p [n]: the logarithm of one factor for each h[i], whatever follows i. Products are sums of logarithms."""

    commutes = True

    def apply(self, p: Tensor, h: Tensor) -> Tensor:
        return h * _spread(p.exp(), h)

    def follow(self, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> Tensor:
        first, *later = _from_each_on(ps).exp()
        h.mul_(_spread(first, h))
        for weight, s in zip(later, sums, strict=False):  # nothing comes after the last one
            h.addcmul_(s, _spread(weight, h))
        return h.add_(sums[-1])

    def take_away(self, h: Tensor, p: Tensor, before: Tensor) -> None:
        h.addcmul_(before, _spread(p.exp(), h), value=-1)


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


def _spread(factors: Tensor, h: Tensor) -> Tensor:
    """factors [n], h [n, ...] -> [n, 1, ...], to be multiplied with h."""
    return factors.view(-1, *[1] * (h.dim() - 1))


def _from_each_on(ps: Tensor) -> Tensor:
    """ps [n, ...], logarithms -> those of the product of each and all after it."""
    return ps.flip(0).cumsum(0).flip(0) if len(ps) > 1 else ps


@dataclass(frozen=True, slots=True)
class Numbers:
    """Float32 numbers in some items of the cache, one item after the other.

    rows  [all items, numbers in each] float32, of the cache
    """

    rows: Tensor
    items: Sequence[int]

    def read(self, start: int, count: int) -> Tensor:
        """Numbers [start, start + count), [count] float32: a copy."""
        pieces = list(self._pieces(start, count))
        return pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)

    def write(self, start: int, values: Tensor) -> None:
        """Writes all values, of any shape [...], from number `start` on."""
        values = values.flatten()
        for piece in self._pieces(start, len(values)):
            piece.copy_(values[: len(piece)])
            values = values[len(piece) :]

    def _pieces(self, start: int, count: int) -> Iterator[Tensor]:
        each, end = self.rows.shape[1], start + count
        while start < end:
            index, first = divmod(start, each)
            last = min(each, first + end - start)
            yield self.rows[self.items[index], first:last]
            start += last - first


class Effect:
    """P of one run of tokens, as it is being computed: first what adds up over tokens, then matrices."""

    def __init__(self, numbers: Numbers, num_sums: int) -> None:
        """numbers: lent by the cache, written to here and nowhere else   num_sums: of them, how many are sums"""
        self.numbers = numbers
        self.num_sums = num_sums
        self.started = False  # whether there are matrices
        self._terms: list[Tensor] = []
        if num_sums:
            numbers.write(0, torch.zeros(num_sums))

    def add(self, term: Tensor) -> None:
        """Adds the sums of some tokens, [1, num_sums] float32. A decoding sequence has one term a step."""
        self._terms.append(term)
        if len(self._terms) == MOST_TERMS:
            self.flush()

    def flush(self) -> None:
        """Writes down all that was added: to be called before the numbers are read."""
        if self._terms:
            self.numbers.write(0, torch.cat([self.numbers.read(0, self.num_sums)[None], *self._terms]).sum(0))
            self._terms = []

    def close(self) -> Sequence[int]:
        """The items of the cache that it was written to; it cannot be written to any more."""
        items, self.numbers = self.numbers.items, replace(self.numbers, items=())
        return items

    def matrix(self, start: int, heads: int, size: int) -> Tensor:
        """A copy of the matrices [1, heads, size, size] of one state from number `start` on; identities at first."""
        if self.started:
            return self.numbers.read(start, heads * size * size).view(1, heads, size, size)
        return torch.eye(size, device=self.numbers.rows.device).expand(1, heads, size, size).contiguous()


@dataclass(frozen=True, slots=True)
class StatePart:
    """A state tensor [slots, ...] of the cache, or those of its heads that a layer computes together.

    start, shape: where p of this state begins in a packed effect, and its shape
    """

    state: Tensor
    transition: Transition
    shape: tuple[int, ...]
    start: int = 0

    def of(self, numbers: Numbers) -> Tensor:
        """p of this state in an effect, [*shape]: a copy."""
        return numbers.read(self.start, prod(self.shape)).view(self.shape)

    def of_all(self, effects: Sequence[Numbers]) -> Tensor:
        """The same in several effects of one cache, [n, *shape]."""
        rows, count = effects[0].rows, prod(self.shape)
        index, first = divmod(self.start, rows.shape[1])
        if first + count > rows.shape[1]:  # it lies in several items
            return torch.stack([self.of(effect) for effect in effects])
        items = torch.tensor([effect.items[index] for effect in effects], device=rows.device)
        return rows[items, first : first + count].view(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class KeyRows:
    """KV pages of one attention layer; values [first, first + d) of each key are rotated, inv_freq [d / 2]."""

    kv: KVTensors
    inv_freq: Tensor | None
    first: int = 0


@dataclass(slots=True)
class EffectMap:
    """The states and keys that a model's layers report, in the order of their calls; known after one recorded pass."""

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

    def __init__(self, effect_map: EffectMap, runs: Sequence[tuple[slice, Effect]]) -> None:
        """runs: for each run, its rows of the batch and the effect that they are added to"""
        self._map = effect_map
        self._found = None if effect_map.known else EffectMap()  # handed over when the pass is over
        self._runs = runs
        self._single = all(rows.stop - rows.start == 1 for rows, _ in runs)
        self._latest: Tensor | None = None  # reported by the layer that may still be at work
        self._terms: list[Tensor] = []  # of the layers before: of all rows, or one row for each run
        self._matrix_start = runs[0][1].num_sums

    def keys(self, kv: KVTensors, inv_freq: Tensor | None, first: int = 0) -> None:
        """An attention layer: its pages, and how its keys are rotated. inv_freq [d / 2] float32 or None."""
        if self._found is not None:
            self._found.keys.append(KeyRows(kv, inv_freq, first))

    def decay(self, state: Tensor, log_decay: Tensor) -> None:
        """log_decay [R, n] float32, of each token, for state [slots, n, ...]; read when the layer has done its work."""
        self._note(log_decay)
        self._register(state, Decay, log_decay.shape[1:])

    def channel_decay(self, state: Tensor, A: Tensor, dt: Tensor) -> None:
        """dt [R, channels] float32, A [channels, N], for state [slots, channels, N]."""
        self._note(dt)
        self._register(state, lambda: ChannelDecay(A), dt.shape[1:])

    def matrix(self, state: Tensor, size: int, run: Callable[[slice, RowLayout, Tensor], object]) -> None:
        """`run(rows, layout, pool)` advances pool [1, H, N, N] by the recurrence of these rows, without new values.

        Started from the identity, this gives P. size: N; state [slots, H, P, N]
        """
        heads, start = state.shape[1], self._matrix_start
        self._matrix_start += heads * size * size
        self._register(state, MatrixTransition, (heads, size, size))
        for rows, effect in self._runs:
            length, pool = rows.stop - rows.start, effect.matrix(start, heads, size)
            layout, _ = arrange([Run(0, length, 0, 0, False, [0] * -(-length // TILE), [])], [], packed=True)
            run(rows, replace(layout, num_rows=length), pool)  # no padding: nothing is multiplied by weights
            effect.numbers.write(start, pool)

    def end(self) -> None:
        """To be called after the pass."""
        if self._found is not None:
            self._found.settle()
            self._map.states, self._map.keys = self._found.states, self._found.keys
        self._settle_latest()
        terms = torch.cat(self._terms, dim=1) if self._terms else None
        for number, (rows, effect) in enumerate(self._runs):
            effect.started = True
            if terms is not None:
                effect.add(terms[rows] if self._single else terms[number : number + 1])

    def _note(self, term: Tensor) -> None:
        self._settle_latest()
        self._latest = term

    def _settle_latest(self) -> None:
        """Sums what the layer before reported, unless each run has one row: rows of a chunk take much memory.

        One sum at the end is faster where they take little.
        """
        if self._latest is not None:
            runs = (self._latest[rows].sum(0) for rows, _ in self._runs)
            self._terms.append(self._latest if self._single else torch.stack(list(runs)))
        self._latest = None

    def _register(self, state: Tensor, kind: Callable[[], Transition], shape: Sequence[int]) -> None:
        if self._found is not None:
            self._found.states.append(StatePart(state, kind(), tuple(shape)))
