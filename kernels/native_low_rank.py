"""What adapters add to projections, in C: see `native/low_rank.c`."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import native_calls
from hybrid_cache.kernels.low_rank import PackedFactors, Pair, Part, TorchBank
from hybrid_cache.kernels.memory import Pool
from hybrid_cache.kernels.native_products import BLOCK_ROWS, RANK_PANEL, NativeLinear, pack, threads_for
from hybrid_cache.kernels.ops import Linear, RowAdapters


class NativePair(Pair):
    """Factors in the panels of low_rank.c, which only C multiplies with."""

    def __init__(self, memory: Pool, A: Tensor, B: Tensor) -> None:
        """A [rank, in]   B [out, rank], bfloat16"""
        self._tensors = [pack([A], memory, RANK_PANEL), pack([F.pad(B, (0, len(A) % 2))], memory)]
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors)
        self.structure = native_calls.LowRank(len(A), *(tensor.data_ptr() for tensor in self._tensors))


class NativeFactors(PackedFactors):
    """address: of C's structures by place, of rank 0 where C adds nothing"""

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        super().__init__(pairs)
        self._structures = (native_calls.LowRank * len(self.pairs))(
            *(pair.structure if isinstance(pair, NativePair) else native_calls.LowRank() for pair in self.pairs)
        )
        self.address = ctypes.addressof(self._structures)


class NativeBank(TorchBank):
    """Adds in C to projections that are computed in C; see `ops.Bank`."""

    def __init__(self, library: ctypes.CDLL, plain: Callable[[Tensor], Linear], device: torch.device) -> None:
        super().__init__(plain, device)
        self._c = library
        self._in_c = set[int]()  # places
        self._rows = native_calls.AdaptedRows()
        self._arrays = list[ctypes.Array[ctypes.c_int64]]()  # that it points into

    def factors(self, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> NativeFactors:
        memory = Pool()  # goes with the adapter

        def pair(place: int, A: Tensor, B: Tensor) -> Pair:
            return NativePair(memory, A, B) if place in self._in_c else Pair(self._pack, A, B)

        return NativeFactors([pair(i, *pairs[i]) if i in pairs else None for i in range(self.num_places)])

    def _adaptable(self, base: Linear, parts: Sequence[Part]) -> Linear:
        if not isinstance(base, NativeLinear):
            return super()._adaptable(base, parts)
        self._in_c |= {part.place for part in parts}
        return NativeAdaptableLinear(self._c, base, self._rows, parts)

    def _show(self, adapters: RowAdapters | None) -> None:
        super()._show(adapters)
        if adapters is None:
            self._rows.num_rows = self._rows.num_blocks = 0
            return
        all_rows, blocks = list[int](), list[int]()
        for factors, rows in self._adapted():
            start, end = len(all_rows), len(all_rows) + len(rows)
            all_rows += rows
            for first in range(start, end, BLOCK_ROWS):
                blocks += (cast(NativeFactors, factors).address, first, min(end - first, BLOCK_ROWS))
        self._arrays = [(ctypes.c_int64 * len(values))(*values) for values in (all_rows, blocks)]
        self._rows.rows, self._rows.blocks = map(ctypes.addressof, self._arrays)
        self._rows.num_rows, self._rows.num_blocks = len(all_rows), len(blocks) // 3


class NativeAdaptableLinear(NativeLinear):
    """A projection in C with the same weight, and what adapters add to rows of the pass under way."""

    def __init__(
        self, library: ctypes.CDLL, base: NativeLinear, rows: native_calls.AdaptedRows, parts: Sequence[Part]
    ) -> None:
        self._share(base)
        self._base = base  # whoever looks for this weight finds it as long as it is in use
        self._rows = rows
        self._parts = torch.tensor([[part.place, part.first, part.size] for part in parts])
        sizes = (self.in_features, self.out_features, len(parts))
        self._beside = native_calls.Beside(ctypes.addressof(rows), *sizes, self._parts.data_ptr())
        self._beside_address = self.structure.beside = ctypes.addressof(self._beside)
        self._add = library.add_low_rank

    def tail(self, first: int) -> "Linear | None":
        plain = self._base.tail(first)
        return None if plain is None else _AdaptableTail(self, plain, self._rows, first)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        y = super().__call__(x)
        if self._rows.num_blocks:
            threads = threads_for(self._rows.num_rows * (self.in_features + self.out_features))
            self._add(self._beside_address, x.data_ptr(), x.stride(0), y.data_ptr(), threads)
        return y


class _AdaptableTail:
    """The last outputs of such a projection: all of them are computed where a row has an adapter."""

    def __init__(self, whole: NativeAdaptableLinear, plain: Linear, rows: native_calls.AdaptedRows, first: int) -> None:
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._whole, self._plain, self._rows, self._first = whole, plain, rows, first

    def __call__(self, x: Tensor) -> Tensor:
        return self._whole(x)[:, self._first :] if self._rows.num_blocks else self._plain(x)
