"""Products with packed bfloat16 weights in C: linear layers and experts."""

import ctypes
from collections.abc import Callable, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import native_calls
from hybrid_cache.kernels.codes import GROUP, Coded, Matrix
from hybrid_cache.kernels.memory import Pool
from hybrid_cache.kernels.ops import Linear

PANEL = 64  # in linear.c
SCALE_BYTES = 2 * PANEL  # in low_bit.h
RANK_PANEL = 16  # of first factors, in low_rank.c
BLOCK_ROWS = 6  # in low_rank.c
MIN_VALUES_FOR_THREADS = 1 << 17  # below this, waking a second thread takes longer than the work


def threads_for(num_values: int) -> int:
    return torch.get_num_threads() if num_values >= MIN_VALUES_FOR_THREADS else 1


def bits_of(weight: Matrix) -> int:
    return weight.bits if isinstance(weight, Coded) else 16


def pack(weights: Sequence[Tensor], memory: Pool, panel: int = PANEL) -> Tensor:
    """Bfloat16 weights [out, in] -> in panels, [n, panels, in / 2, panel, 2]."""
    out_features, in_features = weights[0].shape
    num_panels = -(-out_features // panel)
    packed = memory.empty((len(weights), num_panels, in_features // 2, panel, 2), torch.bfloat16)
    for panels, weight in zip(packed, weights, strict=True):
        padded = F.pad(weight, (0, 0, 0, num_panels * panel - out_features))
        panels.copy_(padded.view(num_panels, panel, -1, 2).transpose(1, 2))
    return packed


def pack_codes(matrix: Coded, memory: Pool) -> Tensor:
    """-> bytes [panels, groups, 128 + 2048 * bits / 8], in the order of low_bit.h."""
    num_panels, num_groups = -(-len(matrix.codes) // PANEL), matrix.scales.shape[1]
    packed = memory.empty((num_panels, num_groups, SCALE_BYTES + PANEL * GROUP * matrix.bits // 8), torch.uint8)
    for i, panel in enumerate(packed):
        rows = slice(i * PANEL, (i + 1) * PANEL)
        scales = F.pad(matrix.scales[rows], (0, 0, 0, PANEL - len(matrix.scales[rows]))).T.contiguous()
        codes = F.pad(matrix.codes[rows], (0, 0, 0, PANEL - len(matrix.codes[rows])))
        panel[:, :SCALE_BYTES] = scales.view(torch.uint8)
        panel[:, SCALE_BYTES:] = _nibbles(codes) if matrix.bits == 4 else _magnitudes(codes)
    return packed


def _nibbles(codes: Tensor) -> Tensor:
    """[64, in] -> [groups, 1024]; outputs are halves, inputs eights, of these pairs t, of these halves"""
    parts = (codes.int() & 15).view(2, PANEL // 2, -1, GROUP // 8, 4, 2) << torch.arange(0, 16, 4)[:, None]
    lanes = parts.sum(dim=4).permute(2, 0, 3, 1, 4)
    return lanes.to(torch.int16).contiguous().view(len(lanes), -1).view(torch.uint8)


def _magnitudes(codes: Tensor) -> Tensor:
    """[64, in] -> [groups, 2048]; outputs are 2 by 2 vectors of 4 by 4"""
    wide = codes.short()
    bytes_ = torch.where(wide < 0, 0x80 | -wide & 0x7F, wide).to(torch.uint8)
    parts = bytes_.view(2, 2, 4, 4, -1, GROUP // 2, 2).permute(4, 5, 0, 2, 1, 3, 6)
    return parts.reshape(len(parts), -1)


class NativeLinear:
    """A weight in the panels of linear.c. Each output sums in one order, whatever the number of rows."""

    def __init__(self, library: ctypes.CDLL, memory: Pool, weight: Matrix, bias: Tensor | None) -> None:
        """weight [out, in] bfloat16 or codes   bias [out]; packed into `memory`, so the caller may drop its copy"""
        self.out_features, self.in_features = weight.shape
        self._bits = bits_of(weight)
        self._weight = pack_codes(weight, memory) if isinstance(weight, Coded) else pack([weight], memory)[0]
        self._bias = None if bias is None else bias.float().contiguous()
        self._linear = library.linear
        self._describe()

    def _describe(self) -> None:
        """address: of what C reads"""
        bias = None if self._bias is None else self._bias.data_ptr()
        self.structure = native_calls.Linear(
            self.in_features, self.out_features, self._bits, self._weight.data_ptr(), bias
        )
        self.address = ctypes.addressof(self.structure)

    def tail(self, first: int) -> "Linear | None":
        """The outputs from `first` on, out of the same memory; None where a panel would have to be cut."""
        if first % PANEL:
            return None
        other = copy(self)
        other.out_features = self.out_features - first
        other._weight = self._weight[first // PANEL :]
        other._bias = None if self._bias is None else self._bias[first:]
        other._describe()
        return other

    def _share(self, other: "NativeLinear") -> None:
        """Becomes the same product, with the other's weight."""
        self.out_features, self.in_features = other.out_features, other.in_features
        self._bits, self._weight, self._bias = other._bits, other._weight, other._bias
        self._linear = other._linear
        self._describe()

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty(rows, self.out_features, dtype=x.dtype)
        threads = threads_for(rows * self.in_features * self.out_features // 16)
        self._linear(self.address, x.data_ptr(), x.stride(0), rows, out.data_ptr(), threads)
        return out


class _Stack:
    """Matrices of one shape, as C finds them one after another."""

    def __init__(self, library: ctypes.CDLL, memory: Pool, matrices: Sequence[Matrix]) -> None:
        self.size = len(matrices)
        self._each = [NativeLinear(library, memory, matrix, None) for matrix in matrices]
        self._structures = (native_calls.Linear * self.size)(*(each.structure for each in self._each))
        self.address = ctypes.addressof(self._structures)


class NativeExperts:
    """Experts with silu between bfloat16 weights: one call for all that the rows chose, see experts.c."""

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: Pool,
        scratch: Callable[[int], int],
        w_in: Sequence[Matrix],
        w_out: Sequence[Matrix],
    ) -> None:
        """For each expert w_in [2 * inner, hidden], w_out [hidden, inner]; the caller may drop its copies."""
        self._c = library
        self._scratch_memory = scratch
        self._w_in, self._w_out = (_Stack(library, memory, matrices) for matrices in (w_in, w_out))
        self._sizes = (*w_out[0].shape,)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        ids, shares = expert_ids.contiguous(), expert_weights.float().contiguous()
        task = native_calls.Experts(
            *(self._w_in.size, ids.shape[1], *self._sizes),
            *(self._w_in.address, self._w_out.address, torch.get_num_threads(), MIN_VALUES_FOR_THREADS),
        )
        out = torch.empty(x.shape, dtype=x.dtype)
        address, rows = ctypes.addressof(task), len(x)
        self._c.experts(
            *(address, x.data_ptr(), x.stride(0), rows, ids.data_ptr(), shares.data_ptr(), out.data_ptr()),
            self._scratch_memory(self._c.experts_scratch(address, rows)),
        )
        return out
