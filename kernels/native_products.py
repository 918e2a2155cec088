"""Products with packed bfloat16 weights in C: linear layers and experts."""

import ctypes
from collections.abc import Callable, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import native_calls
from hybrid_cache.kernels.memory import Pool
from hybrid_cache.kernels.ops import Linear

PANEL = 64  # in linear.c
RANK_PANEL = 16  # of first factors, in low_rank.c
BLOCK_ROWS = 6  # in low_rank.c
MIN_VALUES_FOR_THREADS = 1 << 17  # below this, waking a second thread takes longer than the work


def threads_for(num_values: int) -> int:
    return torch.get_num_threads() if num_values >= MIN_VALUES_FOR_THREADS else 1


def pack(weights: Sequence[Tensor], memory: Pool, panel: int = PANEL) -> Tensor:
    """Bfloat16 weights [out, in] -> in panels, [n, panels, in / 2, panel, 2]."""
    out_features, in_features = weights[0].shape
    num_panels = -(-out_features // panel)
    packed = memory.empty((len(weights), num_panels, in_features // 2, panel, 2), torch.bfloat16)
    for panels, weight in zip(packed, weights, strict=True):
        padded = F.pad(weight, (0, 0, 0, num_panels * panel - out_features))
        panels.copy_(padded.view(num_panels, panel, -1, 2).transpose(1, 2))
    return packed


class NativeLinear:
    """A bfloat16 weight in the panels of linear.c. Each output sums in one order, whatever the number of rows."""

    def __init__(self, library: ctypes.CDLL, memory: Pool, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] bfloat16   bias [out]; packed into `memory`, so the caller may drop its copy"""
        self.out_features, self.in_features = weight.shape
        self._weight = pack([weight], memory)
        self._bias = None if bias is None else bias.float().contiguous()
        self._linear = library.linear
        self._describe()

    def _describe(self) -> None:
        """address: of what C reads"""
        self._weight_address = self._weight.data_ptr()
        self._bias_address = None if self._bias is None else self._bias.data_ptr()
        self._structure = native_calls.Linear(
            self.in_features, self.out_features, self._weight_address, self._bias_address
        )
        self.address = ctypes.addressof(self._structure)

    def tail(self, first: int) -> "Linear | None":
        """The outputs from `first` on, out of the same memory; None where a panel would have to be cut."""
        if first % PANEL:
            return None
        other = copy(self)
        other.out_features = self.out_features - first
        other._weight = self._weight[:, first // PANEL :]
        other._bias = None if self._bias is None else self._bias[first:]
        other._describe()
        return other

    def _share(self, other: "NativeLinear") -> None:
        """Becomes the same product, with the other's weight."""
        self.out_features, self.in_features = other.out_features, other.in_features
        self._weight, self._bias, self._linear = other._weight, other._bias, other._linear
        self._describe()

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty(rows, self.out_features, dtype=x.dtype)
        self._linear(
            *(x.data_ptr(), x.stride(0), rows, self.in_features, self.out_features),
            *(self._weight_address, self._bias_address, out.data_ptr(), threads_for(rows * self._weight.numel() // 16)),
        )
        return out


class NativeExperts:
    """Experts with silu between bfloat16 weights: one call for all that the rows chose, see experts.c."""

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: Pool,
        scratch: Callable[[int], int],
        w_in: Sequence[Tensor],
        w_out: Sequence[Tensor],
    ) -> None:
        """For each expert w_in [2 * inner, hidden], w_out [hidden, inner], bfloat16; the caller may drop its copies."""
        self._c = library
        self._scratch_memory = scratch
        self._w_in, self._w_out = pack(w_in, memory), pack(w_out, memory)
        self._sizes = (*w_out[0].shape, self._w_in[0].numel(), self._w_out[0].numel())

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        ids, shares = expert_ids.contiguous(), expert_weights.float().contiguous()
        task = native_calls.Experts(
            *(len(self._w_in), ids.shape[1], *self._sizes),
            *(self._w_in.data_ptr(), self._w_out.data_ptr(), torch.get_num_threads(), MIN_VALUES_FOR_THREADS),
        )
        out = torch.empty(x.shape, dtype=x.dtype)
        address, rows = ctypes.addressof(task), len(x)
        self._c.experts(
            *(address, x.data_ptr(), x.stride(0), rows, ids.data_ptr(), shares.data_ptr(), out.data_ptr()),
            self._scratch_memory(self._c.experts_scratch(address, rows)),
        )
        return out
