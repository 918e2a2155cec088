"""Numbers of GGUF tensors, by the decoders of the package `gguf` (https://pypi.org/project/gguf), read when needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.models.gguf.header import TensorInfo

SCALED = ("Q4_0", "Q8_0")  # blocks begin with a scale in float16, and hold whole numbers
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of ggml's: blocks of numbers in so many bytes. decode: None where the package cannot"""

    name: str
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded numbers."""
        return PLAIN.get(self.name, torch.float32)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // self.block * self.block_bytes


@cache
def kind_of(number: int) -> Kind:
    """Raises ModelError for a type that the package does not know, or where the package is not installed."""
    try:
        package: Any = import_module("gguf")
    except ImportError as e:
        raise ModelError("GGUF files are read with the package gguf: pip install gguf") from e
    try:
        kind = package.GGMLQuantizationType(number)
    except ValueError as e:
        raise ModelError(f"tensors of type {number} are unknown to the package gguf") from e
    block, block_bytes = package.GGML_QUANT_SIZES[kind]
    return Kind(kind.name, block, block_bytes, _decoder(package, kind, block_bytes))


def _decoder(package: Any, kind: Any, block_bytes: int) -> Callable[..., Any] | None:
    """Tried out on a block of zeros."""

    def decode(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with np.errstate(all="ignore"):  # what is not finite is found later, and named
            return package.quants.dequantize(rows, kind)  # type: ignore[no-any-return]

    try:
        package.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return None
    return decode


def read_tensor(name: str, info: TensorInfo, expert: int | None) -> Tensor:
    """[*info.shape], or of all experts the one with that number, in the kind's dtype. Raises ModelError."""
    kind, shape, start = kind_of(info.kind), info.shape, info.start
    if expert is not None:
        shape = shape[1:]
        start += expert * kind.num_bytes(shape)
    data = _read(name, info, start, kind.num_bytes(shape))
    if kind.name in PLAIN:
        return torch.from_numpy(data).view(kind.dtype).reshape(shape)
    assert kind.decode is not None
    return torch.from_numpy(kind.decode(data.reshape(-1, kind.num_bytes(shape[-1:])))).reshape(shape)


def read_scales(name: str, info: TensorInfo, expert: int | None) -> Tensor | None:
    """float32 as `read_tensor`: of which each number is a whole multiple; None for kinds that have no such scale."""
    kind, shape, start = kind_of(info.kind), info.shape, info.start
    if kind.name not in SCALED:
        return None
    if expert is not None:
        shape = shape[1:]
        start += expert * kind.num_bytes(shape)
    blocks = _read(name, info, start, kind.num_bytes(shape)).reshape(-1, kind.block_bytes)
    scales = torch.from_numpy(blocks[:, :2].copy().view(np.float16).astype(np.float32))
    return scales.expand(-1, kind.block).reshape(shape)


def _read(name: str, info: TensorInfo, start: int, num_bytes: int) -> np.ndarray[Any, Any]:
    try:
        with info.path.open("rb") as file:
            file.seek(start)
            data = np.fromfile(file, np.uint8, num_bytes)
    except OSError as e:
        raise ModelError(f"weight {name} cannot be read: {e.strerror or e}") from e
    if len(data) != num_bytes:
        raise ModelError(f"weight {name} cannot be read: {info.path.name} is cut")
    return data
