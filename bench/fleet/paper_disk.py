"""A disk on paper: the index of the disk tier as it is, without files. Sizes, and seconds by a stated rate.

One folder may be for several caches, as several servers share one; each has its own `PaperStorage`, and hears of what
others have written when the tier asks for it. What it is asked to write is written at once, and what it is asked to
read is read at once; how long that takes is told to the tier, which decides by it.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hybrid_cache.cache.commands import Command, Forget, Save
from hybrid_cache.cache.disk.entries import (
    DIGEST_BYTES,
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
from hybrid_cache.cache.disk.index import Index

IDENTITY = "on paper"
IN_MEMORY = Path("/dev/shm")  # where an index costs no time of a real disk
NO_DIGEST = bytes(DIGEST_BYTES)  # nothing is read that could differ
TRIALS = 60  # loads that teach the tier its rates at the start, small and large ones


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a load takes."""

    bytes_per_s: float
    latency_s: float = 0.001

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class PaperFolder:
    """The index, and who wrote what is there. To be closed."""

    def __init__(self, budget_bytes: int, speed: DiskSpeed) -> None:
        self.budget_bytes = budget_bytes
        self.speed = speed
        usable = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK)
        self._folder = TemporaryDirectory(prefix="hybrid-cache-", dir=IN_MEMORY if usable else None)
        self.index = Index(Path(self._folder.name), budget_bytes, "paper", lambda: 0.0)
        self.writers: dict[int, int] = {}  # of the entries that are there, by id
        self.written_bytes = self.read_bytes = 0
        self.moved_bytes = 0  # read by others than who wrote it

    def close(self) -> None:
        self.index.close()
        self._folder.cleanup()

    def forget(self, gone: Sequence[int]) -> None:
        for entry in gone:
            self.writers.pop(entry, None)

    def read(self, entry: Entry, reader: int) -> None:
        num_bytes = entry.facts.num_bytes
        self.read_bytes += num_bytes
        self.moved_bytes += num_bytes * (self.writers[entry.id] != reader)


class PaperStorage:
    """What one cache sees of a folder; see `cache.disk.entries.Storage`."""

    def __init__(self, folder: PaperFolder, owner: int) -> None:
        """owner: the number of the cache"""
        self._folder, self._index, self._owner = folder, folder.index, owner
        self._reports = deque[Report]()
        self._known = 0  # the latest commit
        self.queued_bytes = 0
        self.spent_s = 0.0
        self.loaded_s = 0.0  # that loads have taken
        for num_bytes in (1, 1 << 30) * TRIALS:
            self._reports.append(Loaded(0, num_bytes, folder.speed.seconds(num_bytes)))

    def run(self, command: Command) -> None:
        """Takes the commands of the books. What moves inside a memory has no place here."""
        if isinstance(command, Save):
            self._save(command.job, command.entries)
        elif isinstance(command, Forget):
            self.forget(command.ticket)

    @property
    def usage(self) -> Usage:
        return Usage(self._index.num_bytes, self._index.inflation)

    def entries(self, identity: str) -> list[Entry]:
        found, self._known = self._index.entries(identity)
        return found

    def reports(self) -> list[Report]:
        reports = list(self._reports)
        self._reports.clear()
        return reports

    # Writing

    def _save(self, job: int, entries: Sequence[NewEntry]) -> None:
        reserved = self._index.reserve(entries)
        self._gone(reserved.gone)
        if reserved.refused:
            self._reports.append(NotSaved(job, reserved.refused))
            return
        taken = [(each, new) for each, new in zip(reserved.ids, entries, strict=True) if each is not None]
        self._index.commit([(each, NO_DIGEST) for each, _ in taken])
        for each, new in taken:
            self._folder.writers[each] = self._owner
            self._folder.written_bytes += new.facts.num_bytes
        self.refresh()
        self._reports.append(Saved(job))

    def drop(self, entries: Sequence[int]) -> None:
        self._gone(self._index.remove(entries))

    def drop_namespaces(self, may: Callable[[str], bool]) -> None:
        self.drop(self._index.of_namespaces(may))

    def use(self, used: Sequence[tuple[int, float, bool]]) -> None:
        self._index.use(used)

    def refresh(self) -> None:
        found, self._known = self._index.entries(IDENTITY, self._known)
        if found:
            self._reports.append(Found(tuple(found)))

    def remember(self, name: str, value: bytes) -> None:
        self._gone(self._index.remember(name, value))

    def recall(self, name: str) -> bytes | None:
        return self._index.recall(name)

    def _gone(self, entries: Sequence[int]) -> None:
        self._folder.forget(entries)
        if entries:
            self._reports.append(Gone(tuple(entries)))

    # Reading

    def load(self, ticket: int, entries: Sequence[Entry]) -> None:
        """What another cache had to drop is not there any more, as a file that has gone."""
        for entry in entries:
            if entry.id not in self._folder.writers:
                self._reports.append(NotLoaded(ticket, entry.id, "gone"))
                return
        for entry in entries:
            self._folder.read(entry, self._owner)
        num_bytes = sum(entry.facts.num_bytes for entry in entries)
        seconds = self._folder.speed.seconds(num_bytes)
        self.loaded_s += seconds
        self._reports.append(Loaded(ticket, num_bytes, seconds))

    def forget(self, ticket: int) -> None:
        """Nothing is held."""
