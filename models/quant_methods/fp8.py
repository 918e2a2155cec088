"""Checkpoints in eight-bit floats, as DeepSeek, Qwen, FBGEMM, AutoFP8 and ModelOpt write them.

NAME [..., out, in] in float8   NAME_scale_inv or NAME_scale: one number, one for each row, or one for each block

weight = code * scale, under either name
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.models.config import MOST, Config
from hybrid_cache.models.files import shown
from hybrid_cache.models.quant_methods.method import (
    BESIDE,
    FLOAT8,
    FLOATS,
    NOT_ACTIVATIONS,
    NOT_KV,
    Part,
    Parts,
    Shape,
    by_rows,
    collect,
    refuse_shapes,
)

SCALES = ("_scale_inv", "_scale")
SCALE_KINDS = FLOATS | {"F8_E8M0"}


class Float8:
    beside: str | None = BESIDE

    def __init__(self, config: Config, title: str, *, cache: bool = False) -> None:
        """config: with `weight_block_size` where scales are those of blocks   cache: float8 is asked for there too"""
        self._block = _block_size(config)
        self.title = f"{title}, float8" + (f", blocks of {self._block[0]} x {self._block[1]}" if self._block else "")
        self.settings = f"float8 {self._block}"
        self.notes = (NOT_ACTIVATIONS, NOT_KV) if cache else (NOT_ACTIVATIONS,)

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for weight, kind in kinds.items():
            if kind in FLOAT8:
                scale = next((ending for ending in SCALES if weight + ending in kinds), SCALES[0])
                parts = (Part("", FLOAT8), Part(scale, SCALE_KINDS))
                found |= collect(kinds, {weight: weight}, parts)
        return found

    def rows(self, found: Mapping[str, Shape]) -> int:
        return found[""][0]

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        ending = next(ending for ending in found if ending)
        scale = found[ending]
        if len(shape) < 2 or prod(scale) not in (
            1,
            prod(shape[:-1]) if self._block is None else self._num_blocks(shape),
        ):
            raise refuse_shapes(weight, found, shape)
        return {"": shape, ending: scale}

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        codes = parts[""].reshape(-1, shape[-1])
        scale = next(tensor for ending, tensor in parts.items() if ending).float()
        return by_rows(lambda *rows: codes[slice(*rows)].float() * self._of_rows(scale, shape, rows), shape, dtype)

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        """Codes are no whole numbers."""
        return None

    def _num_blocks(self, shape: Shape) -> int:
        return prod(shape[:-2]) * prod(_blocks(shape, self._block))

    def _of_rows(self, scale: Tensor, shape: Shape, rows: tuple[int, int]) -> Tensor:
        """Scales [rows, in], or [rows, 1], or [1, 1], of some rows of all matrices one after another."""
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        if self._block is None:
            return scale.reshape(-1, 1)[slice(*rows)]
        high, wide = _blocks(shape, self._block)
        row = torch.arange(*rows)
        blocks = scale.reshape(-1, wide)[row // shape[-2] * high + row % shape[-2] // self._block[0]]
        return blocks.repeat_interleave(self._block[1], dim=1)[:, : shape[-1]]


def _blocks(shape: Shape, block: tuple[int, int] | None) -> tuple[int, int]:
    """How many lie below and beside one another."""
    assert block is not None
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _block_size(config: Config) -> tuple[int, int] | None:
    if not config.has(field := "weight_block_size"):
        return None
    sizes = config.integers(field)
    if len(sizes) != 2 or not all(1 <= size <= MOST for size in sizes):
        raise ModelError(
            f"config.json: quantization_config.{field} is {shown([*sizes])}, expected two positive numbers"
        )
    return sizes[0], sizes[1]
