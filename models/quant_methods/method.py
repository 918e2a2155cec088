"""What quantized checkpoints of other tools have in common: a matrix [out, in] lies in a file as several tensors.

They are formats of files only: a matrix is dequantized when it is read, a few rows at a time, and from then on has the
compute dtype. What a method does to activations or to the KV cache is not done, and `notes` say so.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.codes import GROUP
from hybrid_cache.models.files import few

Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]  # tensors of one matrix, by the ending of their names
DecodeRows = Callable[[int, int], Tensor]  # first row, end -> float32 [rows, in]

BLOCK = 1 << 22  # weights that are worked on in float32 at a time
GRAIN = 32  # rows that packed zero points may share words with
FLOATS = frozenset({"F32", "F16", "BF16"})
INTEGERS = frozenset({"I32", "I64"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
# Of activations and of the KV cache.
BESIDE = r"\.(?:input|output|activation|[qkv])_(?:scale|zero_point|global_scale|scale_inv)$|\.(?:k|v|prob)_scale$"
NOT_ACTIVATIONS = "only weights are quantized here: activations are not, as the file means them to be"
NOT_KV = "the KV cache is not quantized, as the file means it to be"


class Method(Protocol):
    """How the matrices of one checkpoint are stored."""

    @property
    def title(self) -> str:
        """For people: its name and sizes."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file asks for and is not done."""
        ...

    @property
    def settings(self) -> str:
        """All that changes what the tensors mean, for the model's fingerprint; "" where tensors say it all."""
        ...

    @property
    def beside(self) -> str | None:
        """A regular expression for names of tensors that are not read."""
        ...

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """kinds: types of all tensors, by name -> for each matrix by the weight's name, its tensors' names by ending.

        Raises ModelError where a part is missing or has a type that it cannot have.
        """
        ...

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        """Of the parts of a matrix of that shape. Raises ModelError where there can be none.

        found: what the files have, from which a method may learn its sizes
        """
        ...

    def rows(self, found: Mapping[str, Shape]) -> int:
        """Of the matrix that has such parts."""
        ...

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """-> the matrix [*shape]."""
        ...

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        """float32 [out, in / 32] of which a matrix's numbers are whole multiples; None if there are none."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a matrix."""

    ending: str
    kinds: frozenset[str]
    needed: bool = True


def collect(kinds: Mapping[str, str], stems: Mapping[str, str], parts: tuple[Part, ...]) -> dict[str, dict[str, str]]:
    """As `Method.matrices`; stems: for each weight what the names of its parts begin with."""
    return {weight: dict(_parts_of(stem, kinds, parts)) for weight, stem in stems.items()}


def _parts_of(stem: str, kinds: Mapping[str, str], parts: tuple[Part, ...]) -> Iterator[tuple[str, str]]:
    for part in parts:
        name = stem + part.ending
        kind = kinds.get(name)
        if kind is None and not part.needed:
            continue
        if kind is None:
            raise ModelError(f"missing weight: {name}, a part of a quantized matrix")
        if kind not in part.kinds:
            raise UnsupportedModel(f"weight {name} is {kind}, supported: {', '.join(sorted(part.kinds))}")
        yield part.ending, name


def stems_ending(kinds: Mapping[str, str], ending: str) -> dict[str, str]:
    """Weights stored in tensors of this ending -> what the names of their parts begin with."""
    stems = [name.removesuffix(ending) for name in kinds if name.endswith(ending)]
    return {f"{stem}.weight": stem for stem in stems}


def same_shape(found: Shape, expected: Shape) -> bool:
    """Sides of one are often left out."""
    return [n for n in found if n != 1] == [n for n in expected if n != 1]


def by_rows(decode: DecodeRows, shape: Shape, dtype: torch.dtype, grain: int = GRAIN) -> Tensor:
    """-> a matrix [*shape], decoded a few rows at a time, as many as a multiple of `grain`."""
    rows, width = prod(shape[:-1]), shape[-1]
    out = torch.empty(rows, width, dtype=dtype)
    size = max(1, BLOCK // (grain * max(1, width))) * grain
    for first in range(0, rows, size):
        end = min(first + size, rows)
        out[first:end] = decode(first, end).to(dtype)
    return out.view(shape)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> [rows, 32 * words / bits] of `bits` each, one after another from the lowest bit on.

    2, 3, 4 and 8 bits: so many bytes hold eight values.
    """
    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    octets = codes.view(len(codes), -1, bits).int()
    eight = sum(octets[..., i] << 8 * i for i in range(bits))
    assert isinstance(eight, Tensor)
    shifts = torch.arange(0, 8 * bits, bits, dtype=torch.int32)
    return (eight[..., None] >> shifts & (1 << bits) - 1).view(len(codes), -1).to(torch.uint8)


def scales_of_groups(scales: Tensor, group: Tensor) -> Tensor | None:
    """scales [out, groups], group [in] of each input -> [out, in / 32]; None where inputs of 32 are of several."""
    if len(group) % GROUP or bool((group.view(-1, GROUP) != group[::GROUP, None]).any()):
        return None
    return scales.float()[:, group[::GROUP]]


def groups_named(weight: str, named: Tensor, num_groups: int) -> Tensor:
    """[in], the group of each input, from a tensor of the file. Raises ModelError for one that is not there."""
    group = named.long()
    low, high = int(group.min()), int(group.max())
    if low < 0 or high >= num_groups:
        raise ModelError(f"weight {weight}: g_idx names group {low if low < 0 else high}, there are {num_groups}")
    return group


def refuse_shapes(weight: str, found: Mapping[str, Shape], shape: Shape) -> ModelError:
    """The error for parts that make no such matrix."""
    parts = few(f"{ending.lstrip('.') or 'codes'} {[*size]}" for ending, size in found.items())
    return ModelError(f"weight {weight} {[*shape]} cannot be stored as {parts}")
