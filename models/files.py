"""The small files of a model folder. A folder may come from anywhere: all that is read of it has a bound."""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isinf
from pathlib import Path
from stat import S_ISREG
from typing import NoReturn

from hybrid_cache.errors import ModelError

CONFIG_BYTES = 4 << 20
TABLE_BYTES = 64 << 20  # of what has an entry for each token or each weight
MAX_DIGITS = 40  # tokenizers write 10^30 for "no limit"

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@contextmanager
def errors_begin_with(place: object) -> Iterator[None]:
    """Puts the name of a folder or a file before the message of a ModelError, unless it stands there already."""
    try:
        yield
    except ModelError as e:
        if str(e).startswith(f"{place}: "):
            raise
        raise type(e)(f"{place}: {e}") from e


def few(names: Iterable[str]) -> str:
    """The first three in order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def is_there(path: Path) -> bool:
    """Whether a folder has an entry of that name, whatever it is."""
    return path.exists() or path.is_symlink()


def own_or(base: Path | None, path: Path) -> Path:
    """A file, or where it is not there that of the same name in another folder."""
    return path if base is None or is_there(path) else base / path.name


def read_bytes(path: Path, at_most: int) -> bytes:
    """A regular file, or what a link to one leads to. Raises ModelError, which names the file without its folder."""
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):
            raise ModelError(f"{path.name} is not a regular file")
        if found.st_size > at_most:
            raise ModelError(f"{path.name} has {found.st_size} bytes, at most {at_most} are read")
        with path.open("rb") as file:
            data = file.read(at_most + 1)
    except FileNotFoundError as e:
        raise ModelError(f"{path.name} is not there") from e
    except OSError as e:
        raise ModelError(f"{path.name} cannot be read: {e.strerror or e}") from e
    if len(data) > at_most:
        raise ModelError(f"{path.name} has more than {at_most} bytes")
    return data


def read_text(path: Path, at_most: int) -> str:
    """UTF-8; a byte order mark, which some editors write before it, is left out. Raises ModelError as `read_bytes`."""
    try:
        return read_bytes(path, at_most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ModelError(f"{path.name} cannot be read: {e}") from e


def read_json(path: Path, at_most: int = CONFIG_BYTES) -> dict[str, object]:
    """A JSON object. Raises ModelError as `read_bytes`."""
    return parse_json(read_text(path, at_most), path.name)


def read_json_if_there(path: Path) -> dict[str, object]:
    """{} where there is nothing of that name. Raises ModelError as `read_json`."""
    return read_json(path) if is_there(path) else {}


def parse_json(text: str, name: str) -> dict[str, object]:
    """A JSON object of numbers that are finite, or infinite by name, and of strings that UTF-8 can carry.

    Raises ModelError, which begins with `name`.
    """
    try:
        values = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as e:
        raise ModelError(f"{name} cannot be read: it is nested too deeply") from e
    except ValueError as e:
        raise ModelError(f"{name} cannot be read: {e}") from e
    if not isinstance(values, dict):
        raise ModelError(f"{name} is not a JSON object")
    return values


def shown(value: object) -> str:
    """A value in a message: as Python writes it, cut where it is long."""
    return _SHORT.repr(value)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        _refuse_number(text)
    return value


def _constant(name: str) -> float:
    """Published configs have `Infinity` where it means something, as in `time_step_limit`."""
    if name == "NaN":
        _refuse_number(name)
    return float(name)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:MAX_DIGITS]} is not a finite number")
