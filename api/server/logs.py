"""Lines of the log: where they go, how they look, and that nothing a client sends can forge one.

All of Python's `logging` passes one handler: ours (below `hybrid_cache`), uvicorn's, warnings, and errors that end a
thread. A line is text for people, or one JSON object for machines.
"""

import json
import logging
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from hybrid_cache.api.server.discretion import words_of
from hybrid_cache.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
TRACEBACK = "Traceback (most recent call last)"  # as people, and tools, look for it
FIELDS = "fields"  # the attribute of a record that holds a mapping of more than its message
IN_MESSAGE = "in_message"  # the one that names those fields that the message shows already
MOST_VALUE = 8192  # characters of one value in a line

logger = logging.getLogger("hybrid_cache")


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What is logged, and how. Checked when made."""

    level: str = "info"
    format: str = "text"
    content: bool = False  # what clients send and what they get, too

    def __post_init__(self) -> None:
        for name, known in (("level", LEVELS), ("format", FORMATS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"log_{name} is {getattr(self, name)!r}, must be one of {', '.join(known)}")
        if self.content and self.level != "debug":
            raise ConfigError(f"log_content shows content at debug level, and log_level is {self.level}")

    @property
    def uvicorn_level(self) -> str:
        """Its greetings are ours already."""
        return "warning" if self.level == "info" else self.level


class LogHandler(logging.Handler):
    """Writes each record as one piece of text. A record that cannot be written is counted, and harms nobody."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._num_failed = 0

    @property
    def num_lost(self) -> int:
        """Records that were not written, with those that the stream itself has dropped."""
        dropped: int = getattr(self._stream, "num_dropped", 0)
        return self._num_failed + dropped

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except Exception:
            self._num_failed += 1


class TextFormatter(logging.Formatter):
    """`TIME LEVEL logger: message name=value ...`; a traceback follows in lines that begin with blanks."""

    def __init__(self, *, content: bool = False) -> None:
        """content: whether messages of exceptions are shown as they are"""
        super().__init__()
        self._content = content

    def format(self, record: logging.LogRecord) -> str:
        words = [_time_of(record), f"{record.levelname:7}", f"{record.name}:", escaped(record.getMessage())]
        shown: Collection[str] = getattr(record, IN_MESSAGE, ())
        fields = {name: value for name, value in fields_of(record).items() if name not in shown}
        words += [f"{name}={text_of(value)}" for name, value in fields.items() if value is not None]
        trace = trace_of(record, content=self._content)
        lines = [" ".join(words).rstrip(), *(f"    {line}" for line in ([TRACEBACK, *trace] if trace else []))]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: time, level, logger, message, then the fields of the record."""

    def __init__(self, *, content: bool = False) -> None:
        """content: as in `TextFormatter`"""
        super().__init__()
        self._content = content

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        trace = trace_of(record, content=self._content)
        if trace:
            line["traceback"] = trace
        return json.dumps(line, default=str)


@contextmanager
def logging_to(stream: TextIO, options: LogOptions) -> Iterator[LogHandler]:
    """While it lasts, all that is logged goes to `stream`."""
    formatter = TextFormatter if options.format == "text" else JsonFormatter
    handler = LogHandler(stream, formatter(content=options.content))
    level = options.level.upper()
    root, excepthook = logging.getLogger(), threading.excepthook
    before = root.level, logger.level
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level]))
    logger.setLevel(level)
    logging.captureWarnings(True)
    threading.excepthook = _log_end_of_thread
    try:
        yield handler
    finally:
        threading.excepthook = excepthook
        logging.captureWarnings(False)
        root.setLevel(before[0])
        logger.setLevel(before[1])
        root.removeHandler(handler)


def lines_lost() -> int:
    """Records that no handler of ours could write, since these were installed."""
    return sum(handler.num_lost for handler in logging.getLogger().handlers if isinstance(handler, LogHandler))


def trace_of(record: logging.LogRecord, *, content: bool) -> list[str]:
    """The traceback of a record in lines: places, and what was raised. Values in messages only with content."""
    error = record.exc_info[1] if record.exc_info else None
    lines, seen = list[str](), set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame in traceback.extract_tb(error.__traceback__):
            lines.append(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}")
        message = str(error) if content else words_of(error).removeprefix(f"{type(error).__name__}: ")
        lines.append(f"{type(error).__name__}: {message}"[:MOST_VALUE])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [escaped(line) for line in lines]


def escaped(text: str) -> str:
    """A text without what ends a line, moves a cursor or reorders what is shown: that is escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, FIELDS, {})
    return {name: _bounded(value) for name, value in fields.items()}


def _bounded(value: object) -> object:
    return value[:MOST_VALUE] + "..." if isinstance(value, str) and len(value) > MOST_VALUE else value


def text_of(value: object) -> str:
    """A value such that it can be told from what follows it, within a bound."""
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    text = escaped(str(_bounded(value)))
    plain = text and not any(c in ' "=\\' for c in text)
    return text if plain else '"' + text.replace('"', '\\"') + '"'


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _log_end_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    name = args.thread.name if args.thread else "?"
    logger.critical("the thread %s has ended with an error", name, exc_info=args.exc_value)


def log_stream() -> TextIO:
    """Where the log of a process goes."""
    return sys.stderr
