"""What a server says, written so that nobody waits for a reader and no missing reader or full disk harms anything."""

import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TextIO

MOST_WAITING = 4096  # pieces of text; more are dropped
LAST_S = 0.5  # for what is still unwritten at the end


class Outlet(io.TextIOBase):
    """A text stream whose writers neither wait nor fail: a thread passes on to a target what it takes."""

    def __init__(self, target: TextIO | None) -> None:
        """target: None drops everything, as a process without such a stream does"""
        self.num_dropped = 0  # pieces
        self._target = target
        self._pieces: SimpleQueue[str | threading.Event] = SimpleQueue()  # may be put to in a signal handler
        threading.Thread(target=self._pass_on, name="hybrid-cache-outlet", daemon=True).start()

    def write(self, text: str) -> int:
        if self._pieces.qsize() < MOST_WAITING:
            self._pieces.put(text)
        else:
            self.num_dropped += 1
        return len(text)

    def settle(self, seconds: float) -> bool:
        """Waits that long for all that was written before -> whether it is out, or lost."""
        done = threading.Event()
        self._pieces.put(done)
        return done.wait(seconds)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._target is not None and self._target.isatty()

    def fileno(self) -> int:
        if self._target is None:
            raise io.UnsupportedOperation("there is no stream")
        return self._target.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # of a class in C, which cannot be assigned to either
        return (self._target and self._target.encoding) or "utf-8"

    def _pass_on(self) -> None:
        while True:
            piece = self._pieces.get()
            if isinstance(piece, threading.Event):
                piece.set()
            elif self._target is not None:
                try:
                    self._write_now(self._target, piece)
                except (OSError, ValueError):  # nobody reads, a full disk, a closed file
                    self.num_dropped += 1

    def _write_now(self, target: TextIO, text: str) -> None:
        """Past the target's own buffer, which would keep what could not be written."""
        try:
            number = target.fileno()
        except io.UnsupportedOperation:  # a test's
            target.write(text)
            return
        data = text.encode(self.encoding, "backslashreplace")
        while data:
            data = data[os.write(number, data) :]


@contextmanager
def unhindered() -> Iterator[None]:
    """While it lasts, nothing that is written to standard output and error waits or fails, logs included."""
    before = sys.stdout, sys.stderr, logging.raiseExceptions
    outlets = Outlet(sys.stdout), Outlet(sys.stderr)
    sys.stdout, sys.stderr = outlets
    logging.raiseExceptions = False
    try:
        yield
    finally:
        for outlet in outlets:
            outlet.settle(LAST_S)
        sys.stdout, sys.stderr, logging.raiseExceptions = before
