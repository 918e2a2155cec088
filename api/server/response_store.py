"""Responses that clients ask for again, or continue: bounded in bytes and in time, in memory or in a file of SQLite.

A response holds its own input and output, and names the one that it continues: a conversation is a chain of them. Each
use of a response is a use of all that it continues. What was not used for longest leaves first, of the tenant that
takes most. Nothing here is tied to what the prefix cache holds.
"""

import asyncio
import hashlib
import logging
import os
import re
import sqlite3
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from hybrid_cache.api.server.errors import ResponseNotFound, current_request_id, quoted
from hybrid_cache.api.server.settings import RESPONSE_LIFE_S, RESPONSE_STORE_BYTES
from hybrid_cache.api.server.tenants import current_tenant
from hybrid_cache.errors import ConfigError, RequestError, RequestFailed
from hybrid_cache.sizes import format_bytes

T = TypeVar("T")
LEAST_BYTES = 1 << 20
SHARE = 8  # one response takes at most an eighth of the bytes
READERS = 2
PAGE_BYTES = 4096
ROW_BYTES = 1024  # of a response beside its text: names, indexes, and its part of the pages that hold these
FILE_CACHE_BYTES = 2 << 20  # what SQLite holds of a file in memory
MOST_CHAIN = 4096  # responses of one conversation
APPLICATION = 0x48435231  # says that a file is ours
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LIFE = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_NAME = re.compile(r"resp_[0-9a-f]{32}")
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL, tenant TEXT NOT NULL, previous TEXT, used REAL NOT NULL,
    bytes INTEGER NOT NULL, head BLOB NOT NULL, input BLOB NOT NULL, output BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
CREATE INDEX IF NOT EXISTS responses_of_tenant ON responses (tenant, used);
"""
_CHAIN = """
WITH RECURSIVE chain (name, place) AS (
    VALUES (?1, 0)
    UNION ALL SELECT previous, place + 1 FROM responses JOIN chain USING (name)
    WHERE previous IS NOT NULL AND place < ?3
)
"""

logger = logging.getLogger("hybrid_cache.api")


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, all of it in JSON."""

    name: str
    previous: str | None  # the one that it continues
    head: bytes  # an object: all that a client gets but the output
    input: bytes  # a list of items: its own, without those of the ones before
    output: bytes  # a list of items

    @property
    def body(self) -> bytes:
        """As clients get it."""
        return self.head[:-1] + b',"output":' + self.output + b"}"

    @property
    def num_bytes(self) -> int:
        """At most so many it takes in the store."""
        text = len(self.head) + len(self.input) + len(self.output)
        return -(-(text + ROW_BYTES) // (PAGE_BYTES - 4)) * PAGE_BYTES + ROW_BYTES


def memory_bytes(path: Path | None, most_bytes: int) -> int:
    """Most that a store takes of the process's memory, with what one change may take back."""
    return most_bytes + 2 * most_bytes // SHARE if path is None else FILE_CACHE_BYTES


def owner_of(cache_salt: str | None) -> str:
    """Who may see responses to the request that is being handled: its API key, with the salt that it names."""
    return hashlib.sha256(f"{current_tenant.get()}\0{cache_salt or ''}".encode()).hexdigest()[:32]


def parse_life(text: str) -> float:
    """`30m`, `24h`, `7d` -> seconds. Raises ConfigError."""
    found = _LIFE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no duration such as '30m', '24h' or '7d'")
    return int(found[1]) * _UNITS_S[found[2]]


class ResponseStore:
    """All calls that touch the database are made on one thread of its own, one after the other."""

    def __init__(
        self,
        path: Path | None = None,
        most_bytes: int = RESPONSE_STORE_BYTES,
        life_s: float = RESPONSE_LIFE_S,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """path: of the file that outlives the process; None for memory

        Raises ConfigError for a file that cannot be used.
        """
        if most_bytes < LEAST_BYTES:
            raise ConfigError(f"response_store_bytes is {most_bytes}, must be at least {LEAST_BYTES}")
        self.most_bytes, self.life_s = most_bytes, life_s
        self.reading = asyncio.Semaphore(READERS)  # for those who look at whole conversations
        self._now = now
        self._held: Counter[str] = Counter()  # bytes by tenant
        self._num_responses = 0
        self._left: Counter[str] = Counter()  # how many have gone, by reason
        self._database = _opened(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hybrid-cache-responses")
        self._close = weakref.finalize(self, self._database.close)
        with _refused_as_config_error(path):
            self._count()
            self._whole_or_not_at_all(lambda: self._make_room(0))

    @property
    def num_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def most_of_one(self) -> int:
        """Bytes that one response may take."""
        return self.most_bytes // SHARE

    async def put(self, stored: Stored, cache_salt: str | None) -> bool:
        """Keeps a response -> whether it is kept: a large one is not, nor one that cannot be written."""
        owner, tenant = owner_of(cache_salt), current_tenant.get()
        try:
            return await self._run(lambda: self._put(stored, owner, tenant))
        except RequestFailed:
            logger.exception("the response to request %s is not kept", current_request_id.get())
            return False

    async def find(self, name: str, cache_salt: str | None) -> Stored:
        """Raises RequestError for one that is not there for those who ask."""
        owner = owner_of(cache_salt)
        found = await self._run(lambda: self._find(name, owner)) if _NAME.fullmatch(name) else None
        if found is None:
            raise self.not_found(name)
        return found

    async def chain(self, name: str, cache_salt: str | None, room: int) -> list[Stored]:
        """A response after all those that it continues, without their heads.

        room: most bytes of their items
        Raises RequestError if they take more, or if any of them is not there.
        """
        owner = owner_of(cache_salt)
        found = await self._run(lambda: self._chain(name, owner, room)) if _NAME.fullmatch(name) else None
        if found is None:
            raise self.not_found(name)
        return found

    async def delete(self, name: str, cache_salt: str | None) -> None:
        """Raises RequestError for one that is not there for those who ask."""
        owner = owner_of(cache_salt)
        if not _NAME.fullmatch(name) or not await self._run(lambda: self._delete(name, owner)):
            raise self.not_found(name)

    def not_found(self, name: str) -> ResponseNotFound:
        """The error for a response that is not there, or no longer."""
        return ResponseNotFound(f"Response with id {quoted(name)} not found: {self.terms}")

    @property
    def terms(self) -> str:
        """How long responses are kept."""
        return (
            f"responses are kept for {self.life_s / 3600:g} hours after their last use, in "
            f"{format_bytes(self.most_bytes)} for all, of which what was not used for longest leaves first"
        )

    async def aclose(self) -> None:
        """Idempotent."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def families(self) -> Iterator[Metric]:
        """What Prometheus reads."""
        prefix = "hybrid_cache_response_store_"
        yield GaugeMetricFamily(prefix + "responses", "Responses that are kept.", value=self._num_responses)
        yield GaugeMetricFamily(prefix + "bytes", "What they take.", value=self.num_bytes)
        yield GaugeMetricFamily(prefix + "limit_bytes", "Most that they may take.", value=self.most_bytes)
        left = CounterMetricFamily(prefix + "left", "Responses that are not kept any more, or never.", labels=["kind"])
        for kind in ("deleted", "expired", "evicted", "too_large"):
            left.add_metric([kind], self._left[kind])
        yield left

    async def _run(self, work: Callable[[], T]) -> T:
        """Raises RequestFailed where the database fails."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._whole_or_not_at_all, work)
        except sqlite3.Error as error:
            raise RequestFailed(f"the store of responses failed: {error}") from error

    def _whole_or_not_at_all(self, work: Callable[[], T]) -> T:
        try:
            self._expire()
            with self._database:
                return work()
        except Exception:
            with suppress(sqlite3.Error):
                self._count()
            raise

    def _count(self) -> None:
        """What is there, from the database."""
        rows = self._rows("SELECT tenant, COUNT(*), SUM(bytes) FROM responses GROUP BY tenant")
        self._held = Counter({tenant: held for tenant, _, held in rows})
        self._num_responses = sum(number for _, number, _ in rows)

    def _rows(self, statement: str, *values: object) -> list[Any]:
        return self._database.execute(statement, values).fetchall()

    def _put(self, stored: Stored, owner: str, tenant: str) -> bool:
        size, now = stored.num_bytes, self._now()
        if size > self.most_of_one:
            self._left["too_large"] += 1
            return False
        if stored.previous is not None:
            self._touch(stored.previous, owner, now)
        self._make_room(size)
        self._database.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (stored.name, owner, tenant, stored.previous, now, size, stored.head, stored.input, stored.output),
        )
        self._held[tenant] += size
        self._num_responses += 1
        return True

    def _find(self, name: str, owner: str) -> Stored | None:
        self._touch(name, owner, self._now())
        columns = "name, previous, head, input, output"
        rows = self._rows(f"SELECT {columns} FROM responses WHERE name = ? AND owner = ?", name, owner)
        return Stored(*rows[0]) if rows else None

    def _chain(self, name: str, owner: str, room: int) -> list[Stored] | None:
        chain = "FROM chain JOIN responses USING (name) WHERE owner = ?2 ORDER BY place DESC"
        [(size,)] = self._rows(f"{_CHAIN} SELECT SUM(LENGTH(input) + LENGTH(output)) {chain}", name, owner, MOST_CHAIN)
        if (size or 0) > room:
            raise RequestError(
                f"the responses up to {name!r} hold {size} bytes of items, at most {room} can be continued",
                param="previous_response_id",
            )
        rows = self._rows(f"{_CHAIN} SELECT name, previous, x'', input, output {chain}", name, owner, MOST_CHAIN)
        self._touch(name, owner, self._now())
        found = [Stored(*row) for row in rows]
        return found if found and found[0].previous is None else None

    def _touch(self, name: str, owner: str, now: float) -> None:
        self._database.execute(
            f"{_CHAIN} UPDATE responses SET used = ?4 WHERE owner = ?2 AND name IN (SELECT name FROM chain)",
            (name, owner, MOST_CHAIN, now),
        )

    def _delete(self, name: str, owner: str) -> bool:
        return self._drop("deleted", "name = ? AND owner = ?", name, owner) > 0

    def _expire(self) -> None:
        """One at a time: what a transaction may take back is in memory until its end."""
        oldest, due = "SELECT name FROM responses WHERE used < ? LIMIT 1", self._now() - self.life_s
        dropped = 1
        while dropped:
            with self._database:
                dropped = self._drop("expired", f"name IN ({oldest})", due)

    def _make_room(self, size: int) -> None:
        """For so many bytes. Of one chain the latest leave first: the others can still be used."""
        while self.num_bytes + size > self.most_bytes:
            tenant = max(self._held, key=self._held.__getitem__)
            oldest = "SELECT name FROM responses WHERE tenant = ? ORDER BY used, rowid DESC LIMIT 1"
            self._drop("evicted", f"name IN ({oldest})", tenant)

    def _drop(self, why: str, which: str, *values: object) -> int:
        rows = self._rows(f"DELETE FROM responses WHERE {which} RETURNING tenant, bytes", *values)
        for tenant, size in rows:
            self._held[tenant] -= size
            if not self._held[tenant]:
                del self._held[tenant]
        self._num_responses -= len(rows)
        self._left[why] += len(rows)
        return len(rows)


@contextmanager
def _refused_as_config_error(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        why = "another process uses it" if "locked" in str(error) else getattr(error, "strerror", None) or error
        raise ConfigError(f"responses cannot be kept in {path}: {why}") from error


def _opened(path: Path | None) -> sqlite3.Connection:
    """A database with our tables, which nobody else uses. Raises ConfigError."""
    with _refused_as_config_error(path):
        if path is not None:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what clients say is for their eyes only
        database = sqlite3.connect(path or ":memory:", timeout=0.5, check_same_thread=False)
    try:
        with _refused_as_config_error(path):
            _prepare(database)
            if path is not None:
                database.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> None:
    def value(statement: str) -> object:
        return database.execute(statement).fetchone()[0]

    database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    database.execute(f"PRAGMA cache_size = -{FILE_CACHE_BYTES >> 10}")
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    if value("SELECT COUNT(*) FROM sqlite_master") and value("PRAGMA application_id") != APPLICATION:
        raise sqlite3.DatabaseError("it is a database of something else")
    if (fault := value("PRAGMA quick_check(1)")) != "ok":
        raise sqlite3.DatabaseError(f"it is damaged: {fault}")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.executescript(_TABLES)
