"""The file of a record: lines are added in whole batches, within a limit; nobody else may read it or add to it."""

import fcntl
import json
import logging
import os
import stat
from pathlib import Path

from hybrid_cache.api.server.recording.header import check_same
from hybrid_cache.api.server.recording.lines import Line, encoded
from hybrid_cache.errors import ConfigError
from hybrid_cache.sizes import format_bytes

MODE = 0o600
MOST_HEADER = 1 << 20  # bytes
LOOK_BACK = 1 << 22  # bytes at the end of a file, among which its last whole line ends
FULL = "limit"

logger = logging.getLogger("hybrid_cache.record")


class RecordFile:
    """Open for adding, from its header on. Used by one thread at a time."""

    def __init__(self, path: Path, limit_bytes: int, header: Line) -> None:
        """Raises ConfigError for what cannot be written, is no record, is another server's, or is full."""
        self.path = path
        self._limit_bytes = limit_bytes
        self.num_bytes = 0
        self.stopped = ""  # why nothing is added any more
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            self._file = os.open(path, flags, MODE)
        except OSError as error:
            raise ConfigError(f"record {path}: cannot be written: {error.strerror or error}") from error
        try:
            self._begin(header)
        except BaseException:
            os.close(self._file)
            raise

    def _begin(self, header: Line) -> None:
        line = encoded(header)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ConfigError(f"record {self.path}: is no ordinary file")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"record {self.path}: another server records to it") from None
            os.fchmod(self._file, MODE)
            self.num_bytes = os.fstat(self._file).st_size
            if self.num_bytes:
                self._check_beginning(header)
                self._mend()
            if self.num_bytes + len(line) > self._limit_bytes:
                there = f"{format_bytes(self.num_bytes)} of the limit of {format_bytes(self._limit_bytes)} are used"
                raise ConfigError(f"record {self.path}: {there}: raise --record-limit or record to another file")
            self._write(line)
        except OSError as error:
            raise ConfigError(f"record {self.path}: cannot be written: {error.strerror or error}") from error

    def add(self, lines: bytes) -> bool:
        """Adds whole lines -> whether they are there; once they are not, none ever is, and `stopped` says why."""
        if self.stopped:
            return False
        last = encoded({"stopped": FULL})
        if self.num_bytes + len(lines) + len(last) > self._limit_bytes:
            self._stop(FULL, f"its limit of {format_bytes(self._limit_bytes)} is reached, see --record-limit", last)
            return False
        try:
            self._write(lines)
        except OSError as error:
            self._stop("error", f"{error.strerror or error}")
            return False
        return True

    def close(self) -> None:
        os.close(self._file)

    def _write(self, lines: bytes) -> None:
        """All or nothing, as far as the system lets us. Raises OSError."""
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self.num_bytes)
            raise
        self.num_bytes += len(lines)

    def _stop(self, why: str, told: str, last: bytes = b"") -> None:
        self.stopped = why
        logger.warning("the record %s ends here: %s; the server goes on", self.path, told)
        try:
            self._write(last)
        except OSError as error:
            logger.warning("the last line of the record is missing: %s", error.strerror or error)

    def _check_beginning(self, header: Line) -> None:
        first, found, _ = os.pread(self._file, MOST_HEADER, 0).partition(b"\n")
        try:
            there = json.loads(first) if found else None
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict) or there.get("format") != header["format"]:
            raise ConfigError(f"record {self.path}: holds something else than a record: it stays as it is")
        check_same(str(self.path), there, header)

    def _mend(self) -> None:
        """Cuts off a line that broke off when an earlier server was killed."""
        start = max(self.num_bytes - LOOK_BACK, 0)
        end = start + os.pread(self._file, LOOK_BACK, start).rfind(b"\n") + 1
        if end < self.num_bytes:
            logger.warning("the last line of the record %s broke off, and is cut off", self.path)
            os.ftruncate(self._file, end)
            self.num_bytes = end
