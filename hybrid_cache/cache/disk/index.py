"""The database of a folder: which entries are there, how many bytes they take, and which go first.

Several processes may use one folder. Each change is one transaction; a row is there before its file is, and says who
writes it, so that what a process left half done is told from what another is writing now.
"""

import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_cache.cache.disk.entries import Entry, EntryKind, Facts, NewEntry
from hybrid_cache.errors import ConfigError

VERSION = 2
NAME = "index.sqlite"
BUSY_S = 5.0  # for another process to end its transaction
MOST_VICTIMS = 64  # that are looked at together
RUN_SCORE = -1.0  # of pages: they go as soon as nothing needs them
LOG_PAGES = 32  # of the database's log, after which it is worked into the database
LOG_BYTES = (1 << 18) + (1 << 15)  # of a budget, for the log and what its readers share

_TABLES = """
CREATE TABLE entry (
    id INTEGER PRIMARY KEY AUTOINCREMENT, identity TEXT NOT NULL, kind TEXT NOT NULL, name BLOB NOT NULL,
    namespace TEXT NOT NULL, label TEXT NOT NULL, first INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    pages BLOB NOT NULL, position INTEGER NOT NULL, num_bytes INTEGER NOT NULL, file_bytes INTEGER NOT NULL,
    digest BLOB, above INTEGER,
    value REAL NOT NULL, score REAL NOT NULL, uses INTEGER NOT NULL DEFAULT 0, made REAL NOT NULL, used REAL NOT NULL,
    writer TEXT, committed INTEGER NOT NULL DEFAULT 0,
    UNIQUE (identity, kind, name));
CREATE INDEX entry_above ON entry (above);
CREATE INDEX entry_score ON entry (score);
CREATE INDEX entry_committed ON entry (identity, committed);
CREATE TABLE fact (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
INSERT INTO fact VALUES ('bytes', 0), ('inflation', 0.0), ('commits', 0);
CREATE TRIGGER entry_added AFTER INSERT ON entry BEGIN
    UPDATE fact SET value = value + NEW.file_bytes WHERE name = 'bytes'; END;
CREATE TRIGGER entry_removed AFTER DELETE ON entry BEGIN
    UPDATE fact SET value = value - OLD.file_bytes WHERE name = 'bytes'; END;
"""
_LATER_TABLES = """
CREATE TABLE IF NOT EXISTS said (id INTEGER PRIMARY KEY, tokens BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS said_removed AFTER DELETE ON entry BEGIN DELETE FROM said WHERE id = OLD.id; END;
"""  # beside the entries, as only those who publish or show them read tokens
_KINDS = {kind.value: kind for kind in EntryKind}  # faster than to make one
_WRITTEN = (
    "identity, kind, name, namespace, label, first, num_tokens, pages, position, num_bytes, file_bytes, above, value, "
    "made, used, writer, score"
)
_INFLATED = f"CASE WHEN value <= 0 THEN {RUN_SCORE} ELSE value + (SELECT value FROM fact WHERE name = 'inflation') END"
_INSERT = f"INSERT INTO entry ({_WRITTEN}) VALUES ({', '.join('?' * 16)}, 0)"
_SCORE = f"UPDATE entry SET score = {_INFLATED} WHERE id = ?"
_USE = "UPDATE entry SET value = ?, uses = uses + ?, used = ? WHERE id = ?"
_COMMIT = (
    "UPDATE entry SET writer = NULL, digest = ?, committed = (SELECT value FROM fact WHERE name = 'commits') "
    "WHERE id = ?"
)
COLUMNS = (
    "id, identity, kind, name, namespace, label, first, num_tokens, pages, num_bytes, value, position, above, digest"
)
_BELOW = (
    "WITH RECURSIVE below(id) AS (SELECT id FROM entry WHERE id = ? "
    "UNION SELECT entry.id FROM entry JOIN below ON entry.above = below.id) "
)
_LEAVES = (
    "SELECT id, file_bytes, score FROM entry AS e WHERE writer IS NULL AND NOT EXISTS "
    "(SELECT 1 FROM entry WHERE above = e.id) ORDER BY score, id LIMIT ?"
)


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room for some files."""

    ids: tuple[int | None, ...]  # of each; None for one that is there already, or was refused
    gone: tuple[int, ...]  # entries that had to go for them
    refused: str = ""  # why, in a word


@dataclass(frozen=True, slots=True)
class Use:
    """How an entry was of use."""

    at: float  # the last time, or when it was made; Unix time, for people only
    count: int
    score: float


class _Refused(Exception):
    """A job is not taken. The message is a word for a counter.

    score: of what was worth too little
    """

    def __init__(self, why: str, score: float | None = None) -> None:
        super().__init__(why)
        self.score = score


class Index:
    """See the module docstring. To be used by one thread. Methods raise sqlite3.Error."""

    def __init__(self, folder: Path, budget_bytes: int, writer: str, now: Callable[[], float] = time.time) -> None:
        """budget_bytes: of all files and of the database   writer: names this process
        Raises ConfigError for a database of another version or that is none."""
        self._path = folder / NAME
        self._writer = writer
        self._now = now  # for people only: nothing is decided by it
        self._budget_bytes = budget_bytes
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # its log has the same mode
        self._db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ConfigError(f"{self._path} cannot be used as an index of a cache: {error}") from error
        except ConfigError:
            self._db.close()
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and not tables:
                for statement in _statements(_TABLES):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise ConfigError(f"{self._path} is an index of version {version}, this one reads version {VERSION}")
            for statement in _statements(_LATER_TABLES):
                self._db.execute(statement)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # not after an error that has ended it
                self._db.execute("ROLLBACK")
            raise

    # What is there

    @property
    def num_bytes(self) -> int:
        """Of the database and of all files, those included that are being written."""
        (pages,), (size,) = (self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        (beside,) = self._db.execute("SELECT total(length(value)) FROM fact WHERE typeof(value) = 'blob'").fetchone()
        return int(self._fact("bytes")) + int(pages) * int(size) + int(beside) + LOG_BYTES  # the log has these again

    @property
    def inflation(self) -> float:
        return self._fact("inflation")

    def _fact(self, name: str) -> float:
        found: float = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()[0]
        return found

    def entries(self, identity: str, after: int = 0) -> tuple[list[Entry], int]:
        """Those of a model that were committed later, those that others need before them -> and the latest commit."""
        latest = int(self._fact("commits"))
        query = f"SELECT {COLUMNS} FROM entry WHERE identity = ? AND committed BETWEEN ? AND ? ORDER BY id"
        return [*read_entries(self._db.execute(query, (identity, after + 1, latest)))], latest

    def all(self) -> list[Entry]:
        """Those of all models, those that others need before them."""
        return [*read_entries(self._db.execute(f"SELECT {COLUMNS} FROM entry WHERE writer IS NULL ORDER BY id"))]

    def tokens(self, entry: int) -> bytes:
        """What is said in the pages of an entry, or behind them; empty where that is not known."""
        row = self._db.execute("SELECT tokens FROM said WHERE id = ?", (entry,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def uses(self) -> dict[int, Use]:
        """Of all entries."""
        return {row[0]: Use(*row[1:]) for row in self._db.execute("SELECT id, used, uses, score FROM entry")}

    def ids(self) -> set[int]:
        """Of all entries, those included that are being written."""
        return {row[0] for row in self._db.execute("SELECT id FROM entry")}

    def of_namespaces(self, may: Callable[[str], bool]) -> list[int]:
        """Entries of the namespaces that are meant, of whatever model."""
        return [row[0] for row in self._db.execute("SELECT id, namespace FROM entry") if may(row[1])]

    def writers(self) -> set[str]:
        """Who is writing, or was."""
        return {row[0] for row in self._db.execute("SELECT DISTINCT writer FROM entry WHERE writer IS NOT NULL")}

    # Changes

    def reserve(self, job: Sequence[NewEntry]) -> Reserved:
        """Makes room for the files of a job, each of which needs the one before it or one that is there, and notes
        that they are being written. What is there already is not written again; all are refused where what would have
        to go is worth more, or what they need has gone.
        """
        try:
            with self._transaction():
                return self._reserve(job)
        except _Refused as refused:
            if refused.score is not None:
                self._inflate(refused.score)
            return Reserved((None,) * len(job), (), str(refused))

    def _reserve(self, job: Sequence[NewEntry]) -> Reserved:
        there = [self._find(new.facts) for new in job]
        missing = [new for new, entry in zip(job, there, strict=True) if entry is None]
        above = [self._above(new) for new in job]
        num_bytes = sum(new.facts.file_bytes + len(new.tokens) for new in missing)
        value = max(new.facts.value for new in job)
        gone = self._make_room(num_bytes, self.inflation + value, {*above, *there} - {None})
        ids, before = list[int | None](), None
        for new, entry, needed in zip(job, there, above, strict=True):
            taken = self._take(new, before if needed is None else needed) if entry is None else None
            ids.append(taken)
            before = entry if taken is None else taken
        return Reserved(tuple(ids), tuple(gone))

    def _find(self, facts: Facts) -> int | None:
        query = "SELECT id FROM entry WHERE identity = ? AND kind = ? AND name = ?"
        row = self._db.execute(query, (facts.identity, facts.kind.value, facts.name)).fetchone()
        return None if row is None else int(row[0])

    def _above(self, new: NewEntry) -> int | None:
        """What a new entry needs and is there, or will be."""
        if new.above is None:
            return None
        which, value = (
            ("id = ?", new.above) if isinstance(new.above, int) else ("kind = 'pages' AND name = ?", new.above)
        )
        query = f"SELECT id FROM entry WHERE identity = ? AND {which}"
        row = self._db.execute(query, (new.facts.identity, value)).fetchone()
        if row is None:
            raise _Refused("needs")
        return int(row[0])

    def _take(self, new: NewEntry, above: int | None) -> int:
        facts, now = new.facts, self._now()
        row: list[object] = [facts.identity, facts.kind.value, facts.name, facts.namespace, facts.label, facts.first]
        row += [facts.num_tokens, facts.pages, facts.position, facts.num_bytes, facts.file_bytes]
        row += [above, facts.value, now, now, self._writer]
        done = self._db.execute(_INSERT, row)
        assert done.lastrowid is not None
        self._db.execute(_SCORE, (done.lastrowid,))
        if new.tokens:
            self._db.execute("INSERT INTO said VALUES (?, ?)", (done.lastrowid, new.tokens))
        return done.lastrowid

    def _make_room(self, num_bytes: int, score: float, spared: Collection[int | None]) -> list[int]:
        """Removes entries that nothing needs, the lowest first, while they score no more -> those."""
        gone, missing = list[int](), self.num_bytes + num_bytes - self._budget_bytes
        while missing > 0:
            victims = self._victims(missing, score, spared)
            if not victims:
                raise _Refused("worth", score)
            for victim, size, each in victims:
                self._db.execute("DELETE FROM entry WHERE id = ?", (victim,))
                self._inflate(each)
                gone.append(victim)
                missing -= size
        return gone

    def _inflate(self, score: float) -> None:
        """Something with this score went, or was not even taken."""
        self._db.execute("UPDATE fact SET value = max(value, ?) WHERE name = 'inflation'", (score,))

    def _victims(self, missing: int, score: float, spared: Collection[int | None]) -> list[tuple[int, int, float]]:
        found = list[tuple[int, int, float]]()
        for victim, size, each in self._db.execute(_LEAVES, (MOST_VICTIMS + len(spared),)):
            if missing <= 0 or each > score:
                break
            if victim not in spared:
                found.append((victim, size, each))
                missing -= size
        return found

    def commit(self, written: Iterable[tuple[int, bytes]]) -> None:
        """The files of these entries are there, each with the digest of its payload."""
        with self._transaction():
            self._db.execute("UPDATE fact SET value = value + 1 WHERE name = 'commits'")
            for entry, digest in written:
                self._db.execute(_COMMIT, (digest, entry))

    def remove(self, entries: Iterable[int]) -> list[int]:
        """Removes entries and all that need them -> those that are removed."""
        gone = list[int]()
        with self._transaction():
            for entry in entries:
                below = [row[0] for row in self._db.execute(_BELOW + "SELECT id FROM below", (entry,))]
                self._db.executemany("DELETE FROM entry WHERE id = ?", ((each,) for each in below))
                gone += below
        return gone

    def remove_left(self, writers: Iterable[str]) -> list[int]:
        """Removes what these processes have not finished -> those entries."""
        gone = list[int]()
        for writer in writers:
            rows = self._db.execute("SELECT id FROM entry WHERE writer = ?", (writer,)).fetchall()
            gone += self.remove(row[0] for row in rows)
        return gone

    def use(self, used: Iterable[tuple[int, float, bool]]) -> None:
        """Entries have these values now, and scores as if they were new; and whether each was read."""
        now = self._now()
        with self._transaction():
            for entry, value, read in used:
                self._db.execute(_USE, (value, int(read), now, entry))
                self._db.execute(_SCORE, (entry,))

    def remember(self, name: str, value: bytes) -> list[int]:
        """Keeps something else under a name, if there is room -> entries that had to go for it."""
        try:
            with self._transaction():
                gone = self._make_room(2 * len(value), math.inf, ())
                self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (f"of {name}", value))
        except _Refused:
            return []
        return gone

    def recall(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM fact WHERE name = ?", (f"of {name}",)).fetchone()
        return None if row is None else bytes(row[0])


def _statements(script: str) -> list[str]:
    """Those of a script whose triggers hold one statement each."""
    found, statement = list[str](), ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return found


def read_entries(rows: Iterable[Sequence[Any]]) -> Iterator[Entry]:
    """What rows say, without those that no process has written so."""
    for (
        number,
        identity,
        kind,
        name,
        namespace,
        label,
        first,
        num_tokens,
        pages,
        num_bytes,
        value,
        position,
        above,
        digest,
    ) in rows:
        named = isinstance(name, bytes) and isinstance(pages, bytes) and isinstance(digest, bytes)
        counted = all(isinstance(number, int) for number in (first, num_tokens, num_bytes, position))
        texts = isinstance(namespace, str) and isinstance(label, str) and isinstance(above, int | None)
        if not (named and counted and texts and kind in _KINDS):
            continue
        place = first, num_tokens, pages, num_bytes, value, position
        facts = Facts(identity, _KINDS[kind], name, namespace, label, *place)
        yield Entry(number, facts, above, digest)
