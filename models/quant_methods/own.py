"""What `hybrid-cache model convert --quantize` wrote, see `quantized`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.codes import GROUP
from hybrid_cache.models.quant_methods.method import Parts, Shape
from hybrid_cache.models.quantized import CODES, Format, dequantize


class Own:
    """The tensors say it all."""

    beside: str | None = None
    notes: tuple[str, ...] = ()
    settings = ""

    def __init__(self, stored: Format) -> None:
        self._stored = stored
        self.title = f"{stored.bits} bits, by hybrid-cache"

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        weights = [name for name, kind in kinds.items() if kind == CODES[self._stored.codes]]
        for name in weights:
            for suffix in self._stored.suffixes[1:]:
                if kinds.get(name + suffix) != "F32":
                    raise ModelError(f"missing weight: {name}{suffix} in F32, which belongs to {name}")
        return {name: {suffix: name + suffix for suffix in self._stored.suffixes} for name in weights}

    def rows(self, found: Mapping[str, Shape]) -> int:
        return found[""][0]

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        return dict(zip(self._stored.suffixes, self._stored.shapes(shape), strict=True))

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        return dequantize([parts[suffix] for suffix in self._stored.suffixes], shape, self._stored, dtype)

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        """There are none in 4 bits: codes are steps above the smallest weight."""
        if self._stored.bits == 4 or shape[-1] % GROUP:
            return None
        return parts["_scale"].reshape(-1, 1).expand(-1, shape[-1] // GROUP)
