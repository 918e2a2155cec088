"""One model folder made into another: other dtypes, quantized matrices, shards of another size.

What becomes of a weight follows from how the model takes it:

    --dtype      changes every weight, except those stored in float32 that the model computes in float32 (A_log,
                 dt_bias, D, some norms, some routers)
    --quantize   changes every matrix with both sides of 32 or more, except those that are computed in float32; of
                 embedding and head only in 8 bits. Experts in one tensor are matrices [out, in] too
    neither      what no layer of the text model takes is left out
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from hybrid_cache.errors import ConfigError, ModelError
from hybrid_cache.kernels.codes import Matrix
from hybrid_cache.models import deltas, loading, registry
from hybrid_cache.models.config import Config
from hybrid_cache.models.folders import find_gguf
from hybrid_cache.models.gguf.text import text_folder
from hybrid_cache.models.quantized import BLOCK, CODES, FORMATS, Format, Shape, dequantize, quantize, settings_of
from hybrid_cache.models.weights import DTYPES, INDEX, SafetensorsWeights

STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()} | CODES
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICEN[CS]E*", "NOTICE*", "README*")
MORE_TEMPLATES = "additional_chat_templates"
MIN_SIDE = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A tensor of the new files."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one weight."""

    name: str
    dtype: torch.dtype  # in the file that is read
    shape: Shape
    parts: tuple[TensorPart, ...]  # one, or what a quantized matrix is stored as
    stored: Format | None

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def new_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder that has been checked, and what it is to become."""

    source: Path
    config: Mapping[str, object]  # the new one
    changes: tuple[Change, ...]
    left_out: tuple[str, ...]  # weights that the text model does not take

    @property
    def num_bytes(self) -> int:
        return sum(change.num_bytes for change in self.changes)

    @property
    def new_bytes(self) -> int:
        return sum(change.new_bytes for change in self.changes)


def prepare(source: Path, *, dtype: str | None = None, quantize: str | None = None) -> Conversion:
    """Checks a folder as loading does, all but the values. Raises ModelError, ConfigError for an unknown option."""
    new_dtype = _option("dtype", dtype, STORED_DTYPES)
    stored = _option("quantize", quantize, FORMATS)
    config = loading.load_config(source)
    if (
        new_dtype is None and find_gguf(deltas.base_of(source)) is not None and config["dtype"] == "bfloat16"
    ):  # of decoded blocks
        new_dtype = torch.bfloat16
    if loading.stored_in(source) is not None:
        raise ModelError(f"{source}: config.json: quantization_config is there, convert what it was made from")
    try:
        with Survey(source) as weights:
            vocab_size = weights.taken_by(config)
            changes = tuple(_change(weights, name, new_dtype, stored, vocab_size) for name in weights.in_file_order())
            new = _new_config(config, new_dtype or weights.embedding_dtype(), stored)
            return Conversion(source, new, changes, weights.left_out())
    except ModelError as e:
        raise type(e)(f"{source}: {e}") from e


def write(
    conversion: Conversion,
    out: Path,
    *,
    shard_bytes: int,
    done: Callable[[Change, float], None] = lambda change, error: None,
) -> int:
    """Makes the folder `out`, whole or not at all -> the number of weight files. Weights are read one by one.

    `done` is called for each weight with its relative error: the norm of its change over its own norm.
    Raises ModelError, also for values that are not finite or that the new dtype cannot hold.
    """
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} is there already")
    if not out.parent.is_dir():
        raise ModelError(f"{out.parent} is not a folder")
    try:
        free = shutil.disk_usage(out.parent).free
        if conversion.new_bytes > free:
            raise ModelError(f"{out} needs {conversion.new_bytes} bytes, {out.parent} has room for {free}")
        unfinished = out.parent / f".{out.name}.{secrets.token_hex(4)}"
        unfinished.mkdir()
        try:
            shards = _write_all(conversion, unfinished, shard_bytes, done)
            unfinished.rename(out)
        except BaseException:  # Ctrl-C as well
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as e:
        raise ModelError(f"{out} cannot be written: {e.strerror or e}") from e
    return shards


class Survey(SafetensorsWeights):
    """The weights of a folder, given to a model without being read, to see which it takes and how."""

    def __init__(self, folder: Path) -> None:
        delta = deltas.find(folder)
        super().__init__(folder if delta is None else delta.base, None)
        if delta is not None:
            delta.lay_over(self)
        self.in_float32: dict[str, bool] = {}  # of each weight that was taken

    def taken_by(self, config: Mapping[str, object]) -> int:
        """Builds the model, which checks names, shapes and types -> its vocabulary."""
        build = registry.find(config.get("model_type"))
        return build(Config(config), self, loading.shape_ops(), self.dtype).vocab_size

    def take(self, name: str, *shape: int) -> Tensor:
        return self._note(self._found.find(name), shape, self.dtype, in_float32=False)

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        return self.take(name, out, inputs)

    def take_float32(self, name: str, *shape: int) -> Tensor:
        return self._note(self._found.find(name), shape, torch.float32, in_float32=True)

    def in_file_order(self) -> list[str]:
        return [name for name in self._handle if name in self.in_float32]

    def left_out(self) -> tuple[str, ...]:
        return tuple(name for name in self._handle if name not in self.in_float32)

    def file_dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._kind(name)]

    def file_shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def embedding_dtype(self) -> torch.dtype:
        kinds = {self.file_dtype(name) for name in self.in_float32 if "embed" in name}
        return kinds.pop() if len(kinds) == 1 else torch.float32

    def values(self, name: str) -> Tensor:
        """The weight as it is stored, [*shape]. Raises ModelError for values that are not finite."""
        return self._finite(name)

    def _note(self, name: str, shape: Shape, dtype: torch.dtype, *, in_float32: bool) -> Tensor:
        self._expect(name, shape)
        self.in_float32[name] = in_float32
        return torch.empty(shape, dtype=dtype, device="meta")


def _option(name: str, value: str | None, known: Mapping[str, T]) -> T | None:
    if value is not None and value not in known:
        raise ConfigError(f"{name} {value!r} is not supported; supported: {', '.join(known)}")
    return None if value is None else known[value]


def _change(weights: Survey, name: str, dtype: torch.dtype | None, stored: Format | None, vocab_size: int) -> Change:
    old, shape = weights.file_dtype(name), weights.file_shape(name)
    in_float32 = weights.in_float32[name]
    if stored is not None and not in_float32 and _is_large(shape) and (stored.bits == 8 or shape[0] != vocab_size):
        dtypes = (stored.codes, *[torch.float32] * (len(stored.suffixes) - 1))
        kinds = zip(stored.suffixes, dtypes, stored.shapes(shape), strict=True)
        return Change(name, old, shape, tuple(TensorPart(name + end, kind, size) for end, kind, size in kinds), stored)
    new = old if dtype is None or (in_float32 and old is torch.float32) else dtype
    return Change(name, old, shape, (TensorPart(name, new, shape),), None)


def _is_large(shape: Shape) -> bool:
    return len(shape) >= 2 and min(shape[-2:]) >= MIN_SIDE


def _new_config(config: Mapping[str, object], dtype: torch.dtype, stored: Format | None) -> dict[str, object]:
    new = dict(config)
    for field in [name for name in ("dtype", "torch_dtype") if name in new] or ["dtype"]:
        new[field] = str(dtype).removeprefix("torch.")
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        new["text_config"] = _new_config(nested, dtype, None)
    if stored is not None:
        new["quantization_config"] = settings_of(stored)
    return new


def _write_all(conversion: Conversion, folder: Path, shard_bytes: int, done: Callable[[Change, float], None]) -> int:
    _copy_text_files(text_folder(deltas.base_of(conversion.source)), folder)
    (folder / "config.json").write_text(json.dumps(conversion.config, indent=2) + "\n", encoding="utf-8")
    shards = _shards(conversion.changes, shard_bytes)
    width = len(shards)
    names = [f"model-{i:05}-of-{width:05}.safetensors" for i in range(1, width + 1)]
    if width == 1:
        names = ["model.safetensors"]
    else:
        files = {part.name: file for file, shard in zip(names, shards, strict=True) for c in shard for part in c.parts}
        index = {"metadata": {"total_size": conversion.new_bytes}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with Survey(conversion.source) as weights:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                try:
                    _write_shard(file, shard, weights, done)
                except ModelError as e:
                    raise type(e)(f"{conversion.source}: {e}") from e
                file.flush()
                os.fsync(file.fileno())
    return width


def _copy_text_files(source: Path, folder: Path) -> None:
    """Tokenizer, templates, defaults, licence: all but config.json, weights and programs."""
    found = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    for path in found:
        if path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES)


def _shards(changes: Sequence[Change], shard_bytes: int) -> list[list[Change]]:
    shards: list[list[Change]] = [[]]
    size = 0
    for change in changes:
        if shards[-1] and size + change.new_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(change)
        size += change.new_bytes
    return shards


def _write_shard(
    file: BinaryIO, shard: Sequence[Change], weights: Survey, done: Callable[[Change, float], None]
) -> None:
    """The safetensors format: bytes in the header, the header, the tensors' bytes at the places that it names."""
    parts = sorted((part for change in shard for part in change.parts), key=lambda part: -part.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for part in parts:  # the widest first, so that each lies at a multiple of its width
        begins[part.name], end = end, end + part.num_bytes
        offsets = [begins[part.name], end]
        header[part.name] = {"dtype": KINDS[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
    if len(begins) != len(parts):
        raise ModelError("a weight has the name of another's scale or zero")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    first = file.tell()
    for change in shard:
        tensors, error = _new_tensors(change, weights.values(change.name))
        for part, tensor in zip(change.parts, tensors, strict=True):
            file.seek(first + begins[part.name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        done(change, error)


def _new_tensors(change: Change, old: Tensor) -> tuple[list[Tensor], float]:
    if change.stored is None:
        tensors = [old.to(change.parts[0].dtype)]
        back = tensors[0]
    else:
        tensors = quantize(old, change.stored)
        back = dequantize(tensors, change.shape, change.stored, torch.float32)
    if not back.isfinite().all():
        raise ModelError(f"weight {change.name} has values that {change.parts[-1].dtype} cannot hold")
    return tensors, _relative_error(back, old)


def _relative_error(new: Tensor, old: Tensor) -> float:
    if new.dtype == old.dtype and new.data_ptr() == old.data_ptr():
        return 0.0
    difference = size = 0.0
    blocks = (torch.split(tensor.reshape(-1), BLOCK) for tensor in (new, old))
    for a, b in zip(*blocks, strict=True):
        difference += float((a.float() - b.float()).double().square().sum())
        size += float(b.double().square().sum())
    return (difference / size) ** 0.5 if size else 0.0
