"""tokenizer.json, checked before and after the library reads it: what a text becomes has a bound known beforehand.

The steps of a tokenizer may replace a character by many, one step after the other. The product of the most that each
can make is bounded; steps of the library's own that make a few characters of one at most count as nothing.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path

from tokenizers import Tokenizer as Backend

from hybrid_cache.errors import ModelError
from hybrid_cache.models.files import TABLE_BYTES, is_there, parse_json, read_json, read_text, shown

FILE = "tokenizer.json"
OLDER = ("vocab.json", "merges.txt", "added_tokens.json", "*.model")  # what transformers converts
MAX_GROWTH = 64
MAX_QUOTED = 300  # characters of an error of the library
MAX_STRING = 4096  # characters of a token or a setting
PARTS = ("normalizer", "pre_tokenizer", "decoder")
PROBE = "Hello, 世界! 3 < 4\n\te\u0301 "
_INSIDE = ("normalizers", "pretokenizers", "decoders")
_BYTES_OF_A_CHARACTER = 4


def read_backend(folder: Path) -> Backend:
    """Reads tokenizer.json, or has transformers convert an older format. Raises ModelError."""
    if is_there(folder / FILE):
        text = read_text(folder / FILE, TABLE_BYTES)
        _check_settings(parse_json(text, FILE))
        backend = _parsed(text)
    else:
        backend = _converted(folder)
        _check_settings(parse_json(backend.to_str(), FILE))
    _check_tokens(backend)
    _try_out(backend)
    return backend


def has_backend(folder: Path) -> bool:
    """Whether a folder says what a tokenizer does, in whatever format."""
    return is_there(folder / FILE) or any(any(folder.glob(pattern)) for pattern in OLDER)


def is_byte_level(backend: Backend) -> bool:
    """Whether tokens are spelled in GPT-2's stand-ins for bytes."""
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def is_panic(error: BaseException) -> bool:
    """A failure inside the library, which is no Exception."""
    return type(error).__name__ == "PanicException"


def _parsed(text: str) -> Backend:
    try:
        return Backend.from_str(text)
    except BaseException as e:  # the library raises plain Exception, or panics
        if isinstance(e, Exception) or is_panic(e):
            raise ModelError(f"{FILE} cannot be read: the tokenizer is not understood: {first_line(e)}") from e
        raise


def _converted(folder: Path) -> Backend:
    sources = [path for pattern in OLDER for path in folder.glob(pattern)]
    if not any(path.suffix == ".model" or path.name == "vocab.json" for path in sources):
        raise ModelError(f"{FILE} is not there")
    for path in sources:
        if not path.is_file() or path.stat().st_size > TABLE_BYTES:
            raise ModelError(f"{path.name} is not a file of at most {TABLE_BYTES} bytes")
    for path in sources:
        if path.suffix == ".json":
            read_json(path, TABLE_BYTES)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as e:
        if isinstance(e, Exception) or is_panic(e):
            raise ModelError(f"the tokenizer cannot be converted: {first_line(e)}") from e
        raise
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(f"this kind of tokenizer has no {FILE} form")
    return backend


def _check_settings(settings: Mapping[str, object]) -> None:
    for part in PARTS:
        steps = list(_steps(settings.get(part)))
        if (growth := prod(map(_growth, steps))) > MAX_GROWTH:
            raise ModelError(f"{FILE}: {part} makes up to {growth} characters of one, at most {MAX_GROWTH} are allowed")
    model = settings.get("model")
    fields = model.items() if isinstance(model, dict) else ()
    for name, value in fields:
        if isinstance(value, str) and len(value) > MAX_STRING:
            raise ModelError(f"{FILE}: model.{name} has {len(value)} characters, at most {MAX_STRING} are allowed")
        if name == "dropout" and value:
            raise ModelError(f"{FILE}: model.dropout is {shown(value)}: a text would have other tokens each time")


def _steps(part: object) -> Iterator[Mapping[str, object]]:
    """A part of a tokenizer, and what a sequence holds."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            waiting.extend(item for name in _INSIDE if isinstance(step.get(name), list) for item in step[name])


def _growth(step: Mapping[str, object]) -> int:
    """The most characters that a step makes of one."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            if not pattern:
                raise ModelError(f"{FILE}: a Replace step has an empty pattern")
            return max(1, -(-len(content) // len(pattern)))
        case {"type": "Replace", "content": str(content)}:  # an expression may find nothing between two characters
            return 1 + len(content)
        case {"type": "Prepend", "prepend": str(text)}:
            return 1 + len(text)
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            return _longest_of_table(table)
        case {"type": "ByteLevel"}:
            return _BYTES_OF_A_CHARACTER
    for name, value in step.items():
        if isinstance(value, str) and len(value) > MAX_STRING:
            raise ModelError(f"{FILE}: {shown(name)} has {len(value)} characters, at most {MAX_STRING} are allowed")
    return 1


def _longest_of_table(table: str) -> int:
    """SentencePiece's table: the size of a trie, the trie, then texts that each end in a zero byte."""
    try:
        data = base64.b64decode(table)
    except (binascii.Error, ValueError) as e:
        raise ModelError(f"{FILE}: precompiled_charsmap is not base64: {e}") from e
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    ends = [-1, *(i for i, byte in enumerate(texts) if byte == 0), len(texts)]
    return max(1, max(end - start - 1 for start, end in pairwise(ends)))


def _check_tokens(backend: Backend) -> None:
    longest = max(backend.get_vocab(with_added_tokens=True), key=len, default="")
    if len(longest) > MAX_STRING:
        raise ModelError(f"{FILE}: a token has {len(longest)} characters, at most {MAX_STRING} are allowed")


def _try_out(backend: Backend) -> None:
    """A short text, there and back."""
    try:
        backend.decode(backend.encode(PROBE, add_special_tokens=True).ids, skip_special_tokens=False)
    except BaseException as e:
        if isinstance(e, Exception) or is_panic(e):
            raise ModelError(f"the tokenizer cannot read a short text: {first_line(e)}") from e
        raise


def first_line(error: BaseException) -> str:
    """Of its message, cut where it is long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_QUOTED]
