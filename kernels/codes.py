"""Matrices of 4 or 8 bits a weight: integers, and a scale for each 32 inputs of each output.

    weight[o, i] = codes[o, i] * scales[o, i // 32]

Rows stay in bfloat16; only weights are rounded. A scale is float16, so a weight takes 4.5 or 8.5 bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # in low_bit.h
BITS = (4, 8)
BLOCK = 1 << 22  # weights that are worked on in float32 at a time


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A matrix [out, in] in codes of `bits` bits.

    codes [out, in] int8, in -8 .. 7 or -128 .. 127   scales [out, in / 32] float16, finite
    """

    bits: int
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """As it is packed."""
        return self.codes.numel() * self.bits // 8 + self.scales.nbytes

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in], each weight rounded once."""
        weights = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in _blocks(self.shape):
            weights[rows] = (_groups(self.codes[rows].float()) * self.scales[rows, :, None].float()).flatten(1)
        return weights


Matrix = Tensor | Coded


def can_code(shape: Sequence[int]) -> bool:
    """Of [out, in]: whether the inputs are whole groups."""
    return len(shape) == 2 and shape[1] % GROUP == 0 and 0 not in shape


def coded(weight: Tensor, bits: int) -> Coded:
    """Rounds a matrix [out, in] to codes: in each group the weight of largest magnitude becomes the lowest code.

    (So does llama.cpp's Q4_0: the lowest code is one step further from zero than the highest.)

    Raises ValueError for inputs that are no whole groups, and for weights beyond the scales.
    """
    if not can_code(weight.shape):
        raise ValueError(f"a matrix {[*weight.shape]} cannot be coded: inputs must be a multiple of {GROUP}")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // GROUP, dtype=torch.float16, device=weight.device)
    for rows in _blocks(weight.shape):
        groups = _groups(weight[rows].float())
        scales[rows] = _scales(groups, bits)
        step = scales[rows, :, None].float()
        codes[rows] = _rounded(groups, step, bits).flatten(1)
    return Coded(bits, codes, scales)


def exact_codes(weight: Tensor, scales: Tensor) -> Coded | None:
    """Codes that are a matrix exactly: float32 [out, in], with the scales [out, in / 32] that it was made with.

    In as few bits as hold them; None if there are no such codes, or scales are none in float16.
    """
    halves = scales.half()
    if not can_code(weight.shape) or not torch.equal(halves.float(), scales.float()):
        return None
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _blocks(weight.shape):
        groups, step = _groups(weight[rows]), halves[rows, :, None].float()
        found = _rounded(groups, step, 8)
        if not torch.equal(found * step, groups):
            return None
        codes[rows] = found.flatten(1)
    bits = 4 if int(codes.min()) >= -8 and int(codes.max()) <= 7 else 8
    return Coded(bits, codes, halves)


def joined(matrices: Sequence[Matrix]) -> Matrix:
    """Outputs one after another; of different kinds: all decoded."""
    if len(matrices) == 1:
        return matrices[0]
    parts = [matrix for matrix in matrices if isinstance(matrix, Coded)]
    if len(parts) == len(matrices) and len({part.bits for part in parts}) == 1:
        return Coded(
            parts[0].bits, *(torch.cat([*each]) for each in zip(*((p.codes, p.scales) for p in parts), strict=True))
        )
    plain = next((matrix.dtype for matrix in matrices if isinstance(matrix, Tensor)), torch.float32)
    return torch.cat([m.decoded(plain) if isinstance(m, Coded) else m for m in matrices])


def _scales(groups: Tensor, bits: int) -> Tensor:
    """groups [rows, groups, 32] -> [rows, groups] float16; 0 for zeros"""
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    scales = (largest / -(1 << bits - 1)).half()
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weights up to {float(groups.abs().max()):g} are beyond scales in float16")
    return scales


def _rounded(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    half = 1 << bits - 1
    return torch.round(groups / torch.where(step == 0, 1.0, step)).clamp(-half, half - 1).to(torch.int8)


def _groups(weights: Tensor) -> Tensor:
    """[rows, in] -> [rows, in / 32, 32]"""
    return weights.reshape(len(weights), -1, GROUP)


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    size = max(1, BLOCK // shape[1])
    return (slice(row, row + size) for row in range(0, shape[0], size))
