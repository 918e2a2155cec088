"""The lines of a trace file as JSON objects whose fields are checked when they are asked for.

Plain, `.gz` and `.xz` files are read line by line. Everything that is wrong with a file is a TraceError of one line,
`FILE:LINE: FIELD VALUE: expected ...`; lines count from one in the unpacked text.
"""

import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.bench.traces.trace import RecordedServer, TraceRequest
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.errors import ConfigError

IntArray = NDArray[np.int64]

LARGEST = 2**31 - 1  # of token counts, block ids and token ids


WORDS = {  # for why an answer ended, in the interfaces of others
    Finish.STOP: ("end_turn", "stop_sequence", "content_filter", "refusal"),
    Finish.LENGTH: ("max_tokens",),
    Finish.TOOL_CALL: ("tool_calls", "tool_use", "function_call"),
    Finish.GONE: ("abort",),
    Finish.FAILED: ("error",),
}
FINISHES = {word: finish for finish in Finish for word in (finish.value, *WORDS.get(finish, ()))}


class TraceError(ConfigError):
    """A trace file that cannot be used."""


class Times(Enum):
    """What `arrival_s` counts from."""

    TRACE = "the start of the trace"
    SESSION = "the start of its session"
    NONE = "nothing: all are zero"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the files of a trace say."""

    files: list[list[TraceRequest]]  # in the order of each file
    page_tokens: int
    times: Times
    notes: tuple[str, ...] = ()
    server: RecordedServer | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object of a file."""

    file: Path
    line: int
    fields: dict[str, object]
    place: str = ""  # in the object of its line, e.g. "requests[3]."

    def error(self, name: str, expected: str) -> TraceError:
        value = brief(self.fields[name]) if name in self.fields else "missing"
        return self.fault(f"{name} {value}: expected {expected}")

    def fault(self, problem: str) -> TraceError:
        return TraceError(f"{self.file}:{self.line}: {self.place}{problem}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def integer(self, name: str, least: int = 0) -> int:
        value = self.fields.get(name)
        if type(value) is not int or not least <= value <= LARGEST:
            raise self.error(name, f"an integer from {least} to {LARGEST}")
        return value

    def time(self, name: str, unit_s: float = 1.0) -> float:
        """Seconds. A number counts units; text is a moment in ISO 8601, in UTC unless it says otherwise."""
        value = self.fields.get(name)
        if isinstance(value, str) and (moment := moment_of(value)) is not None:
            return moment
        if type(value) not in (int, float) or not is_time(value):
            raise self.error(name, "a finite number, not negative, or a time in ISO 8601")
        return float(cast(float, value)) * unit_s

    def time_in_text(self, name: str) -> float:
        value = self.fields.get(name)
        if not isinstance(value, str) or not is_time(value):
            raise self.error(name, "a finite number in quotes, not negative")
        return float(value)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def finish(self, name: str) -> Finish:
        """Why an answer ended, in the words of any of the usual interfaces; unknown where the field is not there."""
        if not self.has(name) or self.fields[name] == "":
            return Finish.UNKNOWN
        if (said := self.text(name)) not in FINISHES:
            raise self.error(name, f"one of {', '.join(FINISHES)}")
        return FINISHES[said]

    def texts(self, name: str) -> list[str]:
        value = self.fields.get(name)
        if not isinstance(value, list) or set(map(type, value)) - {str}:
            raise self.error(name, "a list of strings")
        return value

    def integers(self, name: str) -> IntArray:
        value = self.fields.get(name)
        # There may be millions: these two lines must not become a loop.
        if not isinstance(value, list) or set(map(type, value)) - {int}:
            raise self.error(name, "a list of integers")
        if value and not 0 <= min(value) <= max(value) <= LARGEST:
            raise self.error(name, f"integers from 0 to {LARGEST}")
        return np.array(value, np.int64)

    def record(self, name: str) -> "Record":
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Record(self.file, self.line, value, f"{self.place}{name}.")

    def records(self, name: str) -> "list[Record]":
        value = self.fields.get(name)
        if not isinstance(value, list) or set(map(type, value)) - {dict}:
            raise self.error(name, "a list of objects")
        return [Record(self.file, self.line, entry, f"{self.place}{name}[{i}].") for i, entry in enumerate(value)]


def in_order(last: Record | None, record: Record, name: str) -> None:
    """Within one file no time may be less than the one before."""
    if last is not None and last.file == record.file and record.time(name) < last.time(name):
        raise record.error(name, f"at least {brief(last.fields[name])}, the time before it, unless sorted with --sort")


def records_by_time(file: Path, name: str, *, sort: bool) -> Iterator[Record]:
    """The objects of a file, whose times may not fall unless they are to be sorted. Raises TraceError."""
    if sort:
        yield from sorted(read_records(file), key=lambda record: record.time(name))
        return
    last: Record | None = None
    for record in read_records(file):
        in_order(last, record, name)
        last = record
        yield record


def read_records(file: Path) -> Iterator[Record]:
    """The objects of a file, one a line, or those of the array that a file is; blank lines are skipped.

    Raises TraceError.
    """
    line, found = 0, False
    try:
        with unpacked(file) as lines:
            for line, text in enumerate(lines, 1):
                if text.isspace():
                    continue
                if text.lstrip().startswith(b"[") and not found:
                    yield from entries(file, line, text + lines.read())
                    return
                found = True
                yield parsed(file, line, text)
    except EOFError as error:
        raise TraceError(
            f"{file}:{line + 1}: compressed data ends early: expected a whole {file.suffix} file"
        ) from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        problem = f"compressed data broken ({error}): expected a {file.suffix} file"
        raise TraceError(f"{file}:{line + 1}: {problem}") from error
    except OSError as error:
        raise TraceError(f"{file}: cannot be read: {error.strerror or error}") from error


def unpacked(file: Path) -> BinaryIO:
    match file.suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(file))
        case ".xz":
            return cast(BinaryIO, lzma.open(file))
        case _:
            return file.open("rb")


def parsed(file: Path, line: int, text: bytes) -> Record:
    """The object on one line. Raises TraceError."""
    value = json_value(file, line, text)
    if not isinstance(value, dict):
        raise TraceError(f"{file}:{line}: JSON {brief(value)}: expected an object")
    return Record(file, line, value)


def entries(file: Path, line: int, text: bytes) -> Iterator[Record]:
    """The objects of an array that starts on a line and ends with the file. Raises TraceError."""
    values = json_value(file, line, text)
    if not isinstance(values, list) or set(map(type, values)) - {dict}:
        raise TraceError(f"{file}:{line}: JSON {brief(values)}: expected an object, or an array of objects")
    for i, value in enumerate(values):
        yield Record(file, line, value, f"[{i}].")


def json_value(file: Path, line: int, text: bytes) -> object:
    """What some text from a line on says. Raises TraceError."""
    try:
        value: object = json.loads(text.decode().rstrip())
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1
        raise TraceError(f"{file}:{place}: JSON broken at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, an endless number, too deep
        raise TraceError(f"{file}:{line}: JSON broken: {error}") from error
    return value


def moment_of(text: str) -> float | None:
    """Seconds since 1970 of a time in ISO 8601; None for other text."""
    try:
        moment = datetime.fromisoformat(text.strip()) if "-" in text else None
    except ValueError:
        return None
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def from_zero(files: list[list[TraceRequest]]) -> list[list[TraceRequest]]:
    """The requests with times since the first one."""
    start_s = min((r.arrival_s for file in files for r in file), default=0.0)
    return [[replace(r, arrival_s=r.arrival_s - start_s) for r in file] for file in files]


def is_time(value: object) -> bool:
    try:
        return math.isfinite(number := float(cast(float, value))) and number >= 0
    except (ValueError, OverflowError):
        return False


def brief(value: object) -> str:
    """A value in one short line."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{len(value)} values]"
    if isinstance(value, dict):
        return "{object}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
