"""What adapters add to the projections of a model, for the rows that have one: y += B A x (LoRA, Hu et al. 2021).

See `ops.Bank`. Each adapter's rows are a product of their own, so a row's bits do not depend on which other adapters
there are, and rows without one are not touched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels.ops import Linear, RowAdapters

MAX_RANK = 1024
RANK_STEP = 8  # ranks are filled up to multiples of this with zeros


class Pair:
    """B A x for rows x [R, in] -> [R, out].  num_bytes: as packed"""

    def __init__(self, pack: Callable[[Tensor], Linear], A: Tensor, B: Tensor) -> None:
        """A [rank, in]   B [out, rank], both in the type of the rows"""
        more = -len(A) % RANK_STEP
        A, B = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        self.num_bytes = A.nbytes + B.nbytes
        self._down, self._up = pack(A), pack(B)

    def __call__(self, x: Tensor) -> Tensor:
        return self._up(self._down(x))


class PackedFactors:
    """One adapter: what it adds at each place of a bank; None where it adds nothing. Never changes."""

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        self.pairs = tuple(pairs)
        self.num_bytes = sum(pair.num_bytes for pair in self.pairs if pair is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rows of one adapter."""

    factors: PackedFactors
    rows: Tensor  # [n] int64


@dataclass(frozen=True, slots=True)
class Part:
    """Columns [first, first + size) of a projection, to which factors of their own add."""

    place: int
    first: int
    size: int


class TorchBank:
    """See `ops.Bank`."""

    def __init__(self, pack: Callable[[Tensor], Linear], device: torch.device) -> None:
        """pack: a matrix [out, in] -> the product with it, on the device"""
        self.num_places = 0
        self._adapters: RowAdapters | None = None  # of the rows of the pass under way
        self._groups: tuple[Group, ...] | None = ()
        self._pack = pack
        self._device = device

    def linear(self, base: Linear, sizes: Sequence[int]) -> tuple[Linear, range]:
        places = range(self.num_places, self.num_places + len(sizes))
        self.num_places += len(sizes)
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        return self._adaptable(base, [Part(*each) for each in zip(places, firsts, sizes, strict=True)]), places

    def factors(self, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> PackedFactors:
        return PackedFactors([Pair(self._pack, *pairs[i]) if i in pairs else None for i in range(self.num_places)])

    @contextmanager
    def during(self, adapters: RowAdapters | None) -> Iterator[None]:
        before = self._adapters
        self._show(adapters)
        try:
            yield
        finally:
            self._show(before)

    def narrow(self, rows: Tensor) -> None:
        if self._adapters is not None:
            self._show(self._adapters.of(rows))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The rows of the pass under way that have an adapter, made when they are first asked for."""
        if self._groups is None:
            self._groups = tuple(self._group(factors, rows) for factors, rows in self._adapted())
        return self._groups

    def _show(self, adapters: RowAdapters | None) -> None:
        self._adapters = adapters
        self._groups = () if adapters is None else None

    def _adapted(self) -> list[tuple[PackedFactors, list[int]]]:
        """Adapters of the pass under way, each with its rows."""
        if self._adapters is None:
            return []
        rows: list[list[int]] = [[] for _ in self._adapters.factors]
        for row, number in enumerate(self._adapters.index.tolist()):
            if number >= 0:
                rows[number].append(row)
        return [(cast(PackedFactors, f), own) for f, own in zip(self._adapters.factors, rows, strict=True) if own]

    def _group(self, factors: PackedFactors, rows: list[int]) -> Group:
        return Group(factors, torch.tensor(rows, device=self._device))

    def _adaptable(self, base: Linear, parts: Sequence[Part]) -> Linear:
        return AdaptableLinear(self, base, parts)


class AdaptableLinear:
    """A projection, and what adapters add to some of its rows."""

    def __init__(self, bank: TorchBank, base: Linear, parts: Sequence[Part]) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self._bank, self._base, self._parts = bank, base, parts

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        y = self._base(x)
        for group in self._bank.groups:
            for part in self._parts:
                pair = group.factors.pairs[part.place]
                if pair is not None:
                    columns = y[:, part.first : part.first + part.size]
                    columns[group.rows] += pair(x[group.rows])
        return y
