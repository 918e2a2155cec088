"""The small files of a model folder, made from what a GGUF file says: all that reads a folder reads these."""

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from hybrid_cache.errors import ModelError
from hybrid_cache.models.files import errors_begin_with
from hybrid_cache.models.folders import find_gguf
from hybrid_cache.models.gguf.file import read_model
from hybrid_cache.models.gguf.metadata import Metadata
from hybrid_cache.models.gguf.tokenizer import token_id, tokenizer_of

SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SAMPLING |= {"penalty_repeat": "repetition_penalty"}


def text_folder(path: Path) -> Path:
    """Where config.json, tokenizer and templates of a model lie: for a GGUF file, a temporary folder that is removed
    when the process ends; else the path itself. Raises ModelError."""
    found = find_gguf(path)
    return path if found is None else _unpacked(found, found.stat().st_mtime_ns if found.is_file() else 0)


@lru_cache(maxsize=8)
def _unpacked(path: Path, changed: int) -> Path:
    model = read_model(path)
    with errors_begin_with(path):
        rows = model.config.get("vocab_size")
        tokenizer = tokenizer_of(model.meta, rows if isinstance(rows, int) else 0)
        files = {
            "config.json": model.config,
            "generation_config.json": _generation(model.meta),
            "tokenizer.json": tokenizer.tokenizer,
            "tokenizer_config.json": tokenizer.config,
        }
    try:
        parent = Path(tempfile.mkdtemp(prefix="hybrid-cache-"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        folder = parent / path.name
        folder.mkdir()
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8", errors="replace")
    except OSError as e:
        raise ModelError(f"{path}: there is no room for its tokenizer in a temporary folder: {e.strerror or e}") from e
    return folder


def _generation(meta: Metadata) -> dict[str, object]:
    num_tokens = len(meta.texts("tokenizer.ggml.tokens"))
    ends = {token_id(meta, name, num_tokens) for name in ("eos", "eot", "eom")} - {None}
    values: dict[str, object] = {"eos_token_id": sorted(ends, key=str)} if ends else {}
    for name, field in SAMPLING.items():
        if meta.has(f"general.sampling.{name}"):
            value = meta.values[f"general.sampling.{name}"]
            values[field] = value if isinstance(value, int) else meta.number(f"general.sampling.{name}")
    return values
