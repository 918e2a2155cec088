"""A GGUF file, or the files that one was split into, with the names and shapes of a checkpoint's weights."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.codes import GROUP
from hybrid_cache.models.files import errors_begin_with, few, shown
from hybrid_cache.models.folders import GGUF, PARTS
from hybrid_cache.models.gguf.families import Fields, Source, family_of
from hybrid_cache.models.gguf.header import Header, TensorInfo, read_header
from hybrid_cache.models.gguf.metadata import Metadata
from hybrid_cache.models.gguf.quants import PLAIN, kind_of, read_scales, read_tensor
from hybrid_cache.models.gguf.rotary import FREQUENCIES, with_frequencies
from hybrid_cache.models.gguf.rules import Names, Rule

MAX_PARTS = 4096
MAX_EXPERTS = 4096
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LAYER = re.compile(r"blk\.(\d{1,9})\.")


def title_of(path: Path) -> str:
    """A file's name without what it ends with."""
    part = PARTS.fullmatch(path.name)
    return part[1] if part else path.name.removesuffix(GGUF)


class GgufModel(NamedTuple):
    """What the headers of a model's files say."""

    meta: Metadata
    config: Fields
    rules: Mapping[str, Rule]  # by the names of checkpoints
    tensors: Mapping[str, TensorInfo]


def read_model(path: Path) -> GgufModel:
    """Raises ModelError, which names the file, for a broken one, UnsupportedModel for a family that is not ours."""
    try:
        found = path.stat()
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    return _read_model(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2)
def _read_model(path: Path, size: int, changed: int) -> GgufModel:
    headers = [(part, read_part(part)) for part in _parts(path)]
    with errors_begin_with(path):
        meta = Metadata(headers[0][1].values)
        tensors: dict[str, TensorInfo] = {}
        for part, header in headers:
            if twice := tensors.keys() & header.tensors.keys():
                raise ModelError(f"{part.name} has tensors of another part again: {few(twice)}")
            tensors |= header.tensors
        if meta.text("general.type", "model") != "model":
            raise UnsupportedModel(f"general.type is {shown(meta.values['general.type'])}, expected a model")
        family = family_of(meta.arch)
        tensors = _without_predictors(meta, tensors)
        config, names = family(Source(meta, {name: info.shape for name, info in tensors.items()}))
        rope = config.get("rope_parameters")
        if FREQUENCIES in tensors and isinstance(rope, dict):
            divisors = read_tensor(FREQUENCIES, tensors[FREQUENCIES], None)
            config["rope_parameters"] = with_frequencies(rope, meta.number("rope.freq_base", 10000.0), divisors)
        rules = dict(_rules(names, tensors))
        said = {name: value for name, value in config.items() if value is not None}
        return GgufModel(meta, {**said, "dtype": _dtype(tensors)}, rules, tensors)


def read_part(path: Path) -> Header:
    """The header of one file whose tensors are all inside it. Raises ModelError."""
    with errors_begin_with(path):
        header = read_header(path)
        size = path.stat().st_size
        for name, info in header.tensors.items():
            kind = kind_of(info.kind)
            if info.shape[-1] % kind.block:
                raise ModelError(f"tensor {name} has rows of {info.shape[-1]}, {kind.name} has blocks of {kind.block}")
            if info.start + kind.num_bytes(info.shape) > size:
                raise ModelError(f"is cut: it ends at byte {size}, inside tensor {name}")
    return header


def _without_predictors(meta: Metadata, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Without the layers, behind all others, that predict more than one token."""
    last = meta.integer("nextn_predict_layers", 0)
    first = meta.integer("block_count", 0) - last
    layers = {name: int(m[1]) for name in tensors if last and (m := _LAYER.match(name))}
    return {name: info for name, info in tensors.items() if layers.get(name, -1) < first}


def _parts(path: Path) -> list[Path]:
    """All files of a model, of which one is given. Raises ModelError if one is not there."""
    part = PARTS.fullmatch(path.name)
    if part is None:
        return [path]
    if not 1 <= int(part[3]) <= MAX_PARTS:
        raise ModelError(f"{path} is one of {int(part[3])} parts, expected 1 to {MAX_PARTS}")
    paths = [path.with_name(f"{part[1]}-{i:05}-of-{part[3]}{GGUF}") for i in range(1, int(part[3]) + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise ModelError(f"{path} is one of {len(paths)} parts, and these are not there: {few(missing)}")
    return paths


def _rules(names: Names, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Rule]]:
    """What no rule reads keeps its name, so that it is named as left over."""
    shapes = {name: info.shape for name, info in tensors.items()}
    read = {FREQUENCIES}
    for name, rule in names.rules(shapes):
        if rule.expert is not None and rule.expert >= MAX_EXPERTS:
            raise ModelError(f"tensor {rule.sources[0]} has more than {MAX_EXPERTS} experts")
        read.update(rule.sources)
        yield name, rule
    yield from ((name, Rule((name,), lambda tensor: tensor)) for name in tensors if name not in read)


def _dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """That the model is computed in if nobody says otherwise: float32 holds what F32 and F16 hold, and decoded blocks
    have fewer digits than bfloat16 in all but the least of their formats."""
    kinds = {kind_of(info.kind).name for info in tensors.values() if len(info.shape) > 1}
    return "float32" if kinds <= {"F32", "F16"} else "bfloat16"


class GgufFile:
    """A file's weights by the names that they have in checkpoints, decoded one by one."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError."""
        self._model = read_model(path)

    def keys(self) -> list[str]:
        return list(self._model.rules)

    def get_slice(self, name: str) -> "GgufSlice":
        rule = self._model.rules[name]
        infos = [self._model.tensors[source] for source in rule.sources]
        shapes = [info.shape if rule.expert is None else info.shape[1:] for info in infos]
        kinds = [kind_of(info.kind) for info in infos]
        coarse = next((kind.name for kind in kinds if kind.name not in PLAIN and kind.decode is None), None)
        parts = [torch.empty(shape, dtype=kind.dtype, device="meta") for shape, kind in zip(shapes, kinds, strict=True)]
        made = self._made(name, rule, parts)
        return GgufSlice(list(made.shape), coarse or KINDS[made.dtype])

    def get_tensor(self, name: str) -> Tensor:
        rule = self._model.rules[name]
        parts = [read_tensor(source, self._model.tensors[source], rule.expert) for source in rule.sources]
        return self._made(name, rule, parts).contiguous()

    def scales(self, name: str) -> Tensor | None:
        """float32 [out, in / 32]: of which a matrix's numbers are whole multiples; None where they are not."""
        rule = self._model.rules[name]
        parts = [read_scales(source, self._model.tensors[source], rule.expert) for source in rule.sources]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        each = self._made(name, rule, known)
        return None if each.dim() != 2 or each.shape[1] % GROUP else each[:, ::GROUP].contiguous()

    def _made(self, name: str, rule: Rule, parts: list[Tensor]) -> Tensor:
        try:
            return rule.make(*parts)
        except (RuntimeError, IndexError) as e:
            shapes = ", ".join(f"{source} {list(part.shape)}" for source, part in zip(rule.sources, parts, strict=True))
            raise ModelError(f"weight {name} cannot be made of {shapes}") from e


class GgufSlice(NamedTuple):
    """The shape of a weight, and what its decoded numbers are stored in; where they cannot be decoded, ggml's name."""

    shape: list[int]
    kind: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.kind
