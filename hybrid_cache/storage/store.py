"""The threads of a disk tier: one writes and keeps the index, one reads. What they did is reported."""

import errno
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from hybrid_cache.cache.disk.entries import (
    Entry,
    Found,
    Gone,
    Loaded,
    NewEntry,
    NotLoaded,
    NotSaved,
    Report,
    Saved,
    Usage,
)
from hybrid_cache.errors import ConfigError
from hybrid_cache.storage.folder import BadEntry, Bytes, Folder

Task = Callable[[], None]
T = TypeVar("T")

logger = logging.getLogger("hybrid_cache")


class Store:
    """See the module docstring. Its methods are for the engine's thread; see `cache.disk.entries.Storage`."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        """Raises ConfigError for a folder that cannot be used."""
        self._path = path
        self._folder = Folder(path, budget_bytes)
        self._said = ""  # what goes wrong now, as a word
        self._index = self._folder.index  # the writer's, once it runs
        self.usage = Usage(self._index.num_bytes, self._index.inflation)
        self.queued_bytes = 0
        self.copied_s = self._written_s = 0.0
        self._lock = threading.Lock()
        self._reports: deque[Report] = deque()
        self._reported = threading.Event()
        self._loaded: dict[int, dict[int, Bytes]] = {}
        self._forgotten: set[int] = set()  # tickets that are still to be read
        self._commits: dict[str, int] = {}  # the latest that is known, by identity
        self._writing, self._reading = _Worker("hybrid-cache-disk"), _Worker("hybrid-cache-disk-reader")

    @property
    def spent_s(self) -> float:
        return self.copied_s + self._written_s

    def close(self, within_s: float) -> None:
        """Ends both threads, once what waits is written or after some seconds."""
        self._reading.end(0.0)
        if self._writing.end(within_s):
            self._folder.close()

    def entries(self, identity: str) -> list[Entry]:
        try:
            found, self._commits[identity] = self._writing.ask(partial(self._index.entries, identity))
        except sqlite3.Error as error:
            raise ConfigError(f"the index of the disk tier cannot be read: {error}") from error
        return found

    def reports(self) -> list[Report]:
        self._reported.clear()
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def wait(self, seconds: float) -> None:
        """Until something is reported, or for some seconds."""
        self._reported.wait(seconds)

    def _report(self, report: Report) -> None:
        self._reports.append(report)
        self._reported.set()

    # Writing

    def save(self, job: int, entries: Sequence[NewEntry], payloads: Sequence[Bytes]) -> None:
        """Files that belong together, each with its payload."""
        num_bytes = sum(len(payload) for payload in payloads)
        with self._lock:
            self.queued_bytes += num_bytes
        self._change(partial(self._save, job, entries, payloads), partial(NotSaved, job), num_bytes)

    def give_up(self, job: int, why: str) -> None:
        """A job could not be copied."""
        self._report(NotSaved(job, why))

    def drop(self, entries: Sequence[int]) -> None:
        self._change(partial(self._drop, tuple(entries)))

    def drop_namespaces(self, may: Callable[[str], bool]) -> None:
        self._change(lambda: self._drop(self._index.of_namespaces(may)))

    def use(self, used: Sequence[tuple[int, float, bool]]) -> None:
        self._change(partial(self._index.use, tuple(used)))

    def refresh(self) -> None:
        self._change(self._refresh)

    def remember(self, name: str, value: bytes) -> None:
        """Keeps something beside the entries."""
        self._change(partial(self._remember, name, value))

    def recall(self, name: str) -> bytes | None:
        try:
            return self._writing.ask(partial(self._index.recall, name))
        except sqlite3.Error:
            return None

    def _change(self, task: Task, failed: Callable[[str], Report] | None = None, num_bytes: int = 0) -> None:
        self._writing.put(partial(self._guarded, task, failed, num_bytes))

    def _guarded(self, task: Task, failed: Callable[[str], Report] | None, num_bytes: int) -> None:
        began_s = time.thread_time()
        try:
            task()
            self.usage = Usage(self._index.num_bytes, self._index.inflation)
        except (OSError, sqlite3.Error, MemoryError) as error:
            self._say(error)
            if failed is not None:
                self._report(failed(_word(error)))
        finally:
            with self._lock:
                self.queued_bytes -= num_bytes
            self._written_s += time.thread_time() - began_s

    def _say(self, error: BaseException) -> None:
        """Once, until something is written again or another thing goes wrong."""
        if _word(error) != self._said:
            self._said = _word(error)
            logger.warning("nothing is written to the disk tier in %s for now: %s", self._path, error)

    def _save(self, job: int, entries: Sequence[NewEntry], payloads: Sequence[Bytes]) -> None:
        reserved = self._index.reserve(entries)
        self._folder.erase(reserved.gone)
        if reserved.refused:
            self._report(NotSaved(job, reserved.refused))
            return
        taken = [each for each in zip(reserved.ids, entries, payloads, strict=True) if each[0] is not None]
        try:
            digests = [(entry, self._folder.write(entry, new.facts, data)) for entry, new, data in taken if entry]
            self._folder.settle()
            self._index.commit(digests)
        except (OSError, sqlite3.Error):
            lost = [entry for entry, _, _ in taken if entry is not None]
            self._folder.erase(lost)  # first: on a full disk, the index needs the room
            self._index.remove(lost)
            raise
        self._report(Gone(reserved.gone))
        self._refresh(entries[0].facts.identity)
        self._report(Saved(job))
        if taken:
            self._said = ""

    def _remember(self, name: str, value: bytes) -> None:
        gone = self._index.remember(name, value)
        self._folder.erase(gone)
        self._report(Gone(tuple(gone)))

    def _drop(self, entries: Sequence[int]) -> None:
        gone = self._index.remove(entries)
        self._folder.erase(gone)
        self._report(Gone(tuple(gone)))

    def _refresh(self, identity: str = "") -> None:
        for each in [identity] if identity else list(self._commits):
            found, self._commits[each] = self._index.entries(each, self._commits.get(each, 0))
            if found:
                self._report(Found(tuple(found)))

    # Reading

    def load(self, ticket: int, entries: Sequence[Entry]) -> None:
        self._reading.put(partial(self._load, ticket, tuple(entries)))

    def payload(self, ticket: int, entry: int) -> Bytes:
        """What was read of an entry."""
        return self._loaded[ticket][entry]

    def forget(self, ticket: int) -> None:
        with self._lock:
            if self._loaded.pop(ticket, None) is None:
                self._forgotten.add(ticket)

    def _load(self, ticket: int, entries: Sequence[Entry]) -> None:
        began_s, payloads = time.monotonic(), dict[int, Bytes]()
        for entry in entries:
            if ticket in self._forgotten:
                break
            try:
                payloads[entry.id] = self._folder.read(entry)
            except (BadEntry, OSError, MemoryError) as error:
                why = str(error) if isinstance(error, BadEntry) else _word(error)
                self._forgotten.add(ticket)
                self._report(NotLoaded(ticket, entry.id, why))
        with self._lock:
            if ticket in self._forgotten:
                return self._forgotten.discard(ticket)
            self._loaded[ticket] = payloads
        num_bytes = sum(map(len, payloads.values()))
        self._report(Loaded(ticket, num_bytes, time.monotonic() - began_s))


class _Worker:
    """A thread that does one task after the other."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        self._tasks.put(task)

    def ask(self, function: Callable[[], T]) -> T:
        """The result of a function that is called on the thread, in its turn. Raises what it raises."""
        answer = Future[T]()

        def task() -> None:
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        self.put(task)
        return answer.result()

    def end(self, within_s: float) -> bool:
        """-> whether it has ended."""
        self._tasks.put(None)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                logger.exception("the disk tier: a task failed")


def _word(error: BaseException) -> str:
    """Why, in a word for a counter."""
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, "oserror").lower()
    return "sqlite" if isinstance(error, sqlite3.Error) else "memory" if isinstance(error, MemoryError) else "oserror"
