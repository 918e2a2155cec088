"""Matrices stored in fewer bits than they are computed in: what `hybrid-cache model convert --quantize` writes.

A matrix NAME [..., out, in] is stored as codes under its own name, scales and zeros under names that begin with it:

    8 bits   NAME int8 [..., out, in], NAME_scale float32 [..., out]
             weight = code * scale, one scale for each row
    4 bits   NAME uint8 [..., out, ceil(in / 2)], two codes a byte, the lower half first;
             NAME_scale, NAME_zero float32 [..., out, ceil(in / 128)], for each group of 128 inputs
             weight = code * scale + zero

It is a format of files only: a loaded matrix has the compute dtype.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.models.files import shown

METHOD = "hybrid-cache"
CODES = {torch.int8: "I8", torch.uint8: "U8"}  # how safetensors calls them
GROUP = 128
BLOCK = 1 << 22  # weights that are worked on in float32 at a time
Shape = tuple[int, ...]


class Format(Protocol):
    """How rows of a matrix are stored. `suffixes` end the names of the tensors, the codes first."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def codes(self) -> torch.dtype: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Of the tensors that a matrix [..., out, in] is stored as."""
        ...

    def encode(self, w: Tensor) -> tuple[Tensor, ...]:
        """float32 [rows, in] -> tensors [rows, ...]."""
        ...

    def decode(self, parts: Sequence[Tensor], in_features: int) -> Tensor:
        """tensors [rows, ...] -> float32 [rows, in]."""
        ...


class Int8:
    """-127 to 127 times the scale of the row."""

    bits, group_size, codes = 8, None, torch.int8
    suffixes = ("", "_scale")

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return shape, shape[:-1]

    def encode(self, w: Tensor) -> tuple[Tensor, ...]:
        scale = _not_zero(w.abs().amax(dim=1) / 127)
        return torch.round(w / scale[:, None]).clamp(-127, 127).to(torch.int8), scale

    def decode(self, parts: Sequence[Tensor], in_features: int) -> Tensor:
        codes, scale = parts
        return codes.float() * scale[:, None]


class Int4:
    """0 to 15 steps above the smallest weight of a group."""

    bits, group_size, codes = 4, GROUP, torch.uint8
    suffixes = ("", "_scale", "_zero")

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        groups = (*shape[:-1], -(-shape[-1] // GROUP))
        return (*shape[:-1], -(-shape[-1] // 2)), groups, groups

    def encode(self, w: Tensor) -> tuple[Tensor, ...]:
        rows, in_features = w.shape
        filler = w[:, -1:].expand(rows, -in_features % GROUP)  # changes no smallest and no largest weight
        groups = torch.cat([w, filler], dim=1).view(rows, -1, GROUP)
        zero = groups.amin(dim=2)
        scale = _not_zero((groups.amax(dim=2) - zero) / 15)
        steps = torch.round((groups - zero[..., None]) / scale[..., None]).clamp(0, 15).to(torch.uint8)
        codes = F.pad(steps.view(rows, -1)[:, :in_features], (0, in_features % 2))
        return codes[:, ::2] | codes[:, 1::2] << 4, scale, zero

    def decode(self, parts: Sequence[Tensor], in_features: int) -> Tensor:
        packed, scale, zero = parts
        codes = torch.stack([packed & 15, packed >> 4], dim=2).view(len(packed), -1)[:, :in_features].float()
        return codes * _each(scale, in_features) + _each(zero, in_features)


FORMATS: dict[str, Format] = {"int8": Int8(), "int4": Int4()}


def format_of(settings: Mapping[str, object]) -> Format:
    """What `quantization_config` says of our own method. Raises UnsupportedModel for sizes that we do not write."""
    stored = {"bits": settings.get("bits"), "group_size": settings.get("group_size")}
    known = {name: {"bits": f.bits, "group_size": f.group_size} for name, f in FORMATS.items()}
    name = next((name for name, values in known.items() if values == stored), None)
    if name is None:
        raise UnsupportedModel(
            f"quantization_config has {shown(stored)}, supported: {', '.join(map(str, known.values()))}"
        )
    return FORMATS[name]


def settings_of(stored: Format) -> dict[str, object]:
    """What config.json says as `quantization_config`."""
    return {"quant_method": METHOD, "bits": stored.bits, "group_size": stored.group_size}


def quantize(matrix: Tensor, stored: Format) -> list[Tensor]:
    """-> the tensors that a matrix [..., out, in] is stored as, in the order of `suffixes`."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    blocks = [stored.encode(rows[block].float()) for block in _blocks(rows.shape)]
    shapes = stored.shapes(tuple(matrix.shape))
    return [torch.cat(parts).view(shape) for parts, shape in zip(zip(*blocks, strict=True), shapes, strict=True)]


def dequantize(parts: Sequence[Tensor], shape: Shape, stored: Format, dtype: torch.dtype) -> Tensor:
    """-> a matrix [..., out, in]."""
    out = torch.empty(prod(shape[:-1]), shape[-1], dtype=dtype)
    kinds = stored.shapes((len(out), shape[-1]))
    rows = [part.reshape(kind) for part, kind in zip(parts, kinds, strict=True)]
    for block in _blocks(out.shape):
        out[block] = stored.decode([part[block] for part in rows], shape[-1]).to(dtype)
    return out.view(shape)


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows, a few at a time, so that float32 copies stay small."""
    size = max(1, BLOCK // max(1, shape[1]))
    return (slice(row, row + size) for row in range(0, shape[0], size))


def _each(values: Tensor, in_features: int) -> Tensor:
    """[rows, groups] -> [rows, in]."""
    return values.repeat_interleave(GROUP, dim=1)[:, :in_features]


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
