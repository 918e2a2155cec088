"""Fine-tunes as what they change: a folder that names its base and holds the tensors that differ from it.

    delta.json          {"format": "hybrid-cache-delta", "base": "../embedded", "unchanged": "3f0c..."}
    delta.safetensors   the changed tensors, whole, by their names in the base's checkpoint, in the base's dtype

`base` is a model folder, relative to this one if not absolute. `unchanged` is the digest of all tensors of the base
that the delta leaves as they are: over another base, or one that was trained further, it is refused. Config, tokenizer
and templates are those of the base, and the model is bit for bit the one of a folder with all tensors in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import errors_begin_with, is_there, read_json, shown
from hybrid_cache.models.weights import SafetensorsWeights

CONFIG, WEIGHTS = "delta.json", "delta.safetensors"
FORMAT = "hybrid-cache-delta"
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Delta:
    """A model folder, and what a delta folder changes of it."""

    base: Path
    weights: Path
    unchanged: str

    def lay_over(self, weights: SafetensorsWeights) -> None:
        """Changes weights of the base. Raises ModelError for what does not fit."""
        with errors_begin_with(self.weights.parent):
            weights.lay_over(self.weights, self.unchanged)


def find(folder: Path) -> Delta | None:
    """What a folder says of itself, None for one that is no delta. Raises ModelError."""
    if not is_there(folder / CONFIG):
        return None
    with errors_begin_with(folder):
        values = read_json(folder / CONFIG)
        if values.get("format") != FORMAT:
            raise UnsupportedModel(f"{CONFIG}: format is {shown(values.get('format'))}, supported: {FORMAT}")
        return Delta(_base(folder, values.get("base")), folder / WEIGHTS, _digest(values.get("unchanged")))


def base_of(folder: Path) -> Path:
    """Where config, tokenizer and templates of a model folder lie: in the base of a delta. Raises ModelError."""
    delta = find(folder)
    return folder if delta is None else delta.base


def save(folder: Path, base: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; tensors [...] by the names, shapes and dtype that the base has. Raises ModelError."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    with SafetensorsWeights(base, None) as weights:
        unchanged = weights.digest_without(tensors)
        weights.lay_over(folder / WEIGHTS, unchanged)
    where = os.path.relpath(base.resolve(), folder.resolve())
    values = {"format": FORMAT, "base": where, "unchanged": unchanged}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _base(folder: Path, value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ModelError(f"{CONFIG}: base is {shown(value)}, must be a model folder")
    base = (folder.resolve() / value).resolve()
    if not base.is_dir():
        raise ModelError(f"{CONFIG}: base {shown(value)} is not there, looked for {base}")
    if is_there(base / CONFIG):
        raise UnsupportedModel(f"{CONFIG}: base {shown(value)} is a delta itself, which is not supported")
    return base


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ModelError(f"{CONFIG}: unchanged is {shown(value)}, must be a digest of 32 hexadecimal digits")
    return value
