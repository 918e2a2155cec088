"""What lies in a folder, as it comes and goes, whichever process changes it: for those who tell others."""

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_cache.cache.disk.entries import Entry
from hybrid_cache.cache.disk.index import COLUMNS, NAME, read_entries
from hybrid_cache.cache.keys import KEY_BYTES, NAME_BYTES

MOST_NEW = 512  # entries that are told of at once
BUSY_S = 0.1
_THERE = "FROM entry WHERE identity = ? AND committed > 0"
_SAID = "(SELECT length(tokens) FROM said WHERE said.id = entry.id)"
_IS_SAID = f"kind != 'pages' OR {_SAID} = length(pages) * {KEY_BYTES // NAME_BYTES}"
_NEW = f"SELECT {COLUMNS}, committed, {_IS_SAID} {_THERE} AND (committed, id) > (?, ?) ORDER BY committed, id LIMIT ?"


@dataclass(frozen=True, slots=True)
class Seen:
    """What has changed since the last look. Those that went are to be taken away first."""

    gone: tuple[int, ...]
    new: tuple[Entry, ...]
    more: bool  # there is more that is new


@dataclass(slots=True)
class _Known:
    """Of a model: which entries were seen, and the last of them."""

    ids: set[int] = field(default_factory=set)
    last: tuple[int, int] = (0, 0)  # commit, and id


class Watch:
    """Reads an index with a connection of its own, without ever keeping writers waiting. For one thread.

    Methods raise sqlite3.Error.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._db: sqlite3.Connection | None = None
        self._known: dict[str, _Known] = {}
        self._version = -1
        self._identities: Collection[str] = ()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def rewind(self) -> None:
        """From now on all is new again."""
        self._known = {}
        self._version = -1

    @contextmanager
    def look(self, identities: Collection[str]) -> Iterator[Seen]:
        """What has changed of some models. While it lasts, `tokens` knows what was there at its beginning."""
        db = self._opened()
        (version,) = db.execute("PRAGMA data_version").fetchone()
        if version == self._version and identities == self._identities:
            yield Seen((), (), more=False)
            return
        db.execute("BEGIN")
        try:
            seen = self._changes(db, identities)
            if not seen.more:
                self._version, self._identities = version, tuple(identities)
            yield seen
        finally:
            db.execute("ROLLBACK")

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            self._db = sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        return self._db

    def tokens(self, entry: int) -> bytes:
        """What is said in the pages of an entry, or behind them."""
        row = self._opened().execute("SELECT tokens FROM said WHERE id = ?", (entry,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def _changes(self, db: sqlite3.Connection, identities: Collection[str]) -> Seen:
        gone = [each for identity in self._known.keys() - set(identities) for each in self._known.pop(identity).ids]
        new, more = list[Entry](), False
        for identity in identities:
            known = self._known.setdefault(identity, _Known())
            rows = db.execute(_NEW, (identity, *known.last, MOST_NEW)).fetchall()
            new += read_entries(row[:-2] for row in rows if row[-1])
            known.ids.update(row[0] for row in rows)
            known.last = (rows[-1][-2], rows[-1][0]) if rows else known.last
            if len(rows) == MOST_NEW:
                more = True
            else:
                gone += self._gone(db, identity, known)
        return Seen(tuple(gone), tuple(new), more)

    def _gone(self, db: sqlite3.Connection, identity: str, known: _Known) -> set[int]:
        """What is no longer there, of a model of which all is known that is."""
        (count,) = db.execute(f"SELECT count(*) {_THERE}", (identity,)).fetchone()
        if count == len(known.ids):
            return set()
        gone = known.ids - {row[0] for row in db.execute(f"SELECT id {_THERE}", (identity,))}
        known.ids -= gone
        return gone
