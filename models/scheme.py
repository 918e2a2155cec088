"""How many bits the weights of projections are multiplied in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.codes import Coded, Matrix, can_code, coded, exact_codes
from hybrid_cache.kernels.names import WEIGHTS

HEAD_BITS = 8  # of the matrix that logits come from, whose errors no layer evens out


@dataclass(frozen=True, slots=True)
class Scheme:
    """bits: 16 for none but those of the rows' type   keeps: codes of a file stay codes where that loses nothing"""

    bits: int = 16
    keeps: bool = False

    @classmethod
    def named(cls, name: str, dtype: torch.dtype) -> "Scheme":
        """One of `WEIGHTS`. Raises ModelError for another, and for codes beside rows that are not bfloat16."""
        if name not in WEIGHTS:
            raise ModelError(f"weights {name!r} are not supported; supported: {', '.join(WEIGHTS)}")
        bits = {"int8": 8, "int4": 4}.get(name, 16)
        if bits < 16 and dtype is not torch.bfloat16:
            raise ModelError(f"weights {name} need rows in bfloat16, these are {str(dtype).removeprefix('torch.')}")
        return cls(bits, keeps=name != "bf16" and dtype is torch.bfloat16)

    @property
    def name(self) -> str:
        """Empty where nothing is coded."""
        return f"int{self.bits}" if self.bits < 16 else ""

    def kept(self, weight: Tensor, scales: Tensor | None) -> Coded | None:
        """A matrix of a file as its codes, if these may stay.

        weight float32 [out, in]   scales [out, in / 32] that its numbers are multiples of; None if there are none
        """
        found = None if scales is None or not self.keeps else exact_codes(weight, scales)
        return None if found is None or found.bits > self.bits else found

    def matrix(self, weight: Tensor) -> Matrix:
        """[out, in] of a projection, as it is multiplied; as it is where its inputs are no whole groups."""
        return self._coded(weight, self.bits)

    def head(self, weight: Tensor) -> Matrix:
        """[vocabulary, hidden], as logits come from it."""
        return self._coded(weight, max(self.bits, HEAD_BITS))

    def _coded(self, weight: Tensor, bits: int) -> Matrix:
        if bits == 16 or weight.dtype is not torch.bfloat16 or not can_code(weight.shape) or weight.is_meta:
            return weight
        try:
            return coded(weight, bits)
        except ValueError as error:
            raise ModelError(str(error)) from error


NOT_CODED = Scheme()
