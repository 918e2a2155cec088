"""The header of a GGUF file, read with a bound on everything that it counts before anything is allocated.

    "GGUF"  version  number of tensors  number of values
    values: name, type, value              as llama.cpp calls them: `granitehybrid.block_count`, `tokenizer.ggml.tokens`
    tensors: name, sizes, type, offset     the innermost size first, offsets from where the data begin
    padding to the alignment, data

The reader of the package `gguf` believes every count that it reads; this one serves files from anywhere. Numbers are
little-endian; versions 2 and 3 differ in nothing that matters here.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct

import numpy as np

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_VALUES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMS = 4
MAX_NAME = 512  # bytes
MAX_TEXT = 16 << 20  # bytes of one string
MAX_ITEMS = 1 << 23  # of an array: a vocabulary's tokens or merges
MAX_SIZE = 1 << 44  # numbers of a tensor
MAX_ALIGNMENT = 1 << 20
STRING, ARRAY, BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRUCTS = {kind: Struct("<" + np.dtype(code).char) for kind, code in _NUMBERS.items()}
_U32, _U64 = Struct("<I"), Struct("<Q")

Value = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how. Its bytes are inside the file."""

    shape: tuple[int, ...]  # the outermost first
    kind: int  # ggml's number of the type
    path: Path
    start: int  # bytes from the beginning of the file


@dataclass(frozen=True, slots=True)
class Header:
    values: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data_start: int  # offsets of tensors count from here


def read_header(path: Path) -> Header:
    """Raises ModelError, which does not name the file, for one that is none, is cut, or counts beyond the bounds."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"cannot be read: {getattr(e, 'strerror', None) or e}") from e


class _Reader:
    """Walks over the bytes of a file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def header(self) -> Header:
        if self._bytes(4, "the magic") != MAGIC:
            raise ModelError("is not a GGUF file: it does not begin with GGUF")
        version = self._u32()
        if version not in VERSIONS:
            raise UnsupportedModel(f"GGUF version is {version}, supported: {', '.join(map(str, VERSIONS))}")
        num_tensors = self._count(MAX_TENSORS, "tensors")
        num_values = self._count(MAX_VALUES, "values")
        values = dict(self._named_value() for _ in range(num_values))
        infos = [self._tensor() for _ in range(num_tensors)]
        start = self._data_start(values.get("general.alignment", 32))
        tensors = {name: TensorInfo(shape, kind, self._path, start + offset) for name, shape, kind, offset in infos}
        if len(tensors) != num_tensors or len(values) != num_values:
            raise ModelError("has two tensors or two values of one name")
        return Header(values, tensors, start)

    def _named_value(self) -> tuple[str, Value]:
        name = self._name("a name")
        kind = self._u32()
        return name, self._array(name) if kind == ARRAY else self._value(kind, name)

    def _value(self, kind: int, name: str) -> Value:
        if kind == STRING:
            return self._text(MAX_TEXT, name)
        if kind not in _STRUCTS:
            raise ModelError(f"{name} has type {kind}, which GGUF does not have")
        number = _STRUCTS[kind]
        (value,) = number.unpack(self._bytes(number.size, name))
        return bool(value) if kind == BOOL else value

    def _array(self, name: str) -> Value:
        kind = self._u32()
        num_items = self._count(MAX_ITEMS, f"items in {name}")
        if kind == STRING:
            self._check_left(8 * num_items, name)
            return [self._text(MAX_TEXT, name) for _ in range(num_items)]
        if kind not in _NUMBERS:
            raise ModelError(f"{name} is an array of type {kind}, expected numbers or strings")
        code = np.dtype(_NUMBERS[kind])
        items = np.frombuffer(self._bytes(num_items * code.itemsize, name), code)
        return (items != 0).tolist() if kind == BOOL else items.tolist()  # type: ignore[no-any-return]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor's name")
        num_dims = self._u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise ModelError(f"tensor {shown(name)} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(self._u64() for _ in range(num_dims))[::-1]
        if not 0 < prod(shape) <= MAX_SIZE:
            raise ModelError(f"tensor {shown(name)} has shape {list(shape)}, expected 1 to {MAX_SIZE} numbers")
        return name, shape, self._u32(), self._u64()

    def _data_start(self, alignment: Value) -> int:
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
            raise ModelError(f"general.alignment is {shown(alignment)}, expected 1 to {MAX_ALIGNMENT}")
        return -(-self._at // alignment) * alignment

    def _count(self, most: int, what: str) -> int:
        count = self._u64()
        if count > most:
            raise ModelError(f"has {count} {what}, at most {most} are read")
        return count

    def _text(self, most: int, what: str) -> str:
        num_bytes = self._u64()
        if num_bytes > most:
            raise ModelError(f"{shown(what)} has {num_bytes} bytes, at most {most} are read")
        return self._bytes(num_bytes, what).decode("utf-8", errors="replace")

    def _name(self, what: str) -> str:
        name = self._text(MAX_NAME, what)
        if not (name.isascii() and name.isprintable()):
            raise ModelError(f"{what} is {shown(name)}, expected printable ASCII")
        return name

    def _u32(self) -> int:
        return int(_U32.unpack(self._bytes(4, "a number"))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._bytes(8, "a number"))[0])

    def _bytes(self, num_bytes: int, what: str) -> bytes:
        self._check_left(num_bytes, what)
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def _check_left(self, num_bytes: int, what: str) -> None:
        if self._at + num_bytes > len(self._data):
            raise ModelError(f"is cut: it ends at byte {len(self._data)}, inside {shown(what)}")
