"""The folder of a disk tier: who uses it, and its files, each of which appears whole or not at all.

index.sqlite           see `cache.disk.index`
entries/ID.safetensors
writers/NAME           of each process that uses it, locked while it does
writers/NAME.N.tmp     what it is writing
"""

import fcntl
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.cache.disk.entries import DIGEST_BYTES, Entry, Facts, file_name
from hybrid_cache.cache.disk.index import Index
from hybrid_cache.errors import ConfigError

Bytes = NDArray[np.uint8]
_FILE = re.compile(r"([0-9a-f]{16})\.safetensors")
_LEFT = re.compile(r"([0-9a-f]{16})(\.\d+\.tmp)?")


class BadEntry(Exception):
    """A file that is not what the index says. The message is a word for a counter."""


class Folder:
    """See the module docstring. Methods raise OSError, and those of the index sqlite3.Error."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        """Makes it if it is not there, and cleans up after processes that ended. Raises ConfigError."""
        self.writer = secrets.token_hex(8)
        self._entries, self._writers = path / "entries", path / "writers"
        self._num_written = 0
        try:
            for each in (path, self._entries, self._writers):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(self._writers / self.writer)
            self.index = Index(path, budget_bytes, self.writer)
        except OSError as error:
            raise ConfigError(f"{path} cannot be used for a cache: {error.strerror or error}") from error
        except sqlite3.Error as error:
            raise ConfigError(f"{path} cannot be used for a cache: {error}") from error
        self._clean_up()

    def close(self) -> None:
        """Also where the folder is gone, or nothing can be written to it any more."""
        with suppress(sqlite3.Error):
            self.index.close()
        with suppress(OSError):
            (self._writers / self.writer).unlink(missing_ok=True)
        os.close(self._lock)

    # Files

    def write(self, entry: int, facts: Facts, payload: Bytes) -> bytes:
        """Makes the file of an entry, which is there once `settle` has returned -> the digest of its payload."""
        digest = digest_of(payload)
        self._num_written += 1
        temporary = self._writers / f"{self.writer}.{self._num_written}.tmp"
        try:
            file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                _write_all(file, memoryview(facts.header(digest)), payload.data)
                os.fsync(file)
            finally:
                os.close(file)
            temporary.rename(self._entries / file_name(entry))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return digest

    def settle(self) -> None:
        """Files that were written until now are still there after a loss of power."""
        folder = os.open(self._entries, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, entry: Entry) -> Bytes:
        """The payload of an entry. Raises BadEntry if a byte of its file is not what it was."""
        header, facts = entry.facts.header(entry.digest), entry.facts
        try:
            file = os.open(self._entries / entry.file_name, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise BadEntry("gone") from None
        try:
            if os.fstat(file).st_size != len(header) + facts.num_bytes:
                raise BadEntry("size")
            if os.read(file, len(header)) != header:
                raise BadEntry("header")
            payload = np.empty(facts.num_bytes, np.uint8)
            if _read_all(file, payload) != facts.num_bytes:
                raise BadEntry("size")
        finally:
            os.close(file)
        if digest_of(payload) != entry.digest:
            raise BadEntry("checksum")
        return payload

    def erase(self, entries: Iterable[int]) -> None:
        """Removes the files of entries that are no longer in the index, unless they cannot be removed."""
        for entry in entries:
            with suppress(OSError):
                (self._entries / file_name(entry)).unlink(missing_ok=True)

    # What others left

    def _clean_up(self) -> None:
        """Removes what processes that ended had not finished, and files without a row. Others' files stay."""
        try:
            files = {int(match[1], 16) for name in os.listdir(self._entries) if (match := _FILE.fullmatch(name))}
            left = {name: match[1] for name in os.listdir(self._writers) if (match := _LEFT.fullmatch(name))}
            known = {*left.values(), *self.index.writers()} - {self.writer}
            dead = {name for name in known if self._has_ended(name)}
            for name in (name for name, writer in left.items() if writer in dead):
                (self._writers / name).unlink(missing_ok=True)
            self._remove_left(dead)
            self.erase(files - self.index.ids())
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{self._entries.parent} cannot be used for a cache: {error}") from error

    def _remove_left(self, dead: Iterable[str]) -> None:
        """Where the disk is full, what they left stays in the index, and counts, until a later start."""
        try:
            self.index.remove_left(dead)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise

    def _has_ended(self, name: str) -> bool:
        try:
            file = os.open(self._writers / name, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True


def _locked(path: Path) -> int:
    """A new file, locked until it is closed or the process ends. Nobody sees it before it is locked."""
    unseen = path.with_name(f".{path.name}")
    file = os.open(unseen, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    unseen.rename(path)
    return file


def digest_of(payload: Bytes) -> bytes:
    return blake2b(payload.data, digest_size=DIGEST_BYTES).digest()


def _write_all(file: int, *parts: memoryview) -> None:
    for left in parts:
        while left:
            left = left[os.write(file, left) :]


def _read_all(file: int, into: Bytes) -> int:
    """-> bytes that were there."""
    view, start = memoryview(into.data), 0
    while start < len(view):
        count = os.readv(file, [view[start:]])
        if not count:
            break
        start += count
    return start
