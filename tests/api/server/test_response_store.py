"""Stored responses: bounded in bytes and time, apart by owner, in memory and in a file."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hybrid_cache.api.server.errors import ResponseNotFound
from hybrid_cache.api.server.response_store import LEAST_BYTES, ResponseStore, Stored, memory_bytes, parse_life
from hybrid_cache.api.server.tenants import current_tenant
from hybrid_cache.errors import ConfigError, RequestError, RequestFailed
from tests.api.servers import in_process, new_app, new_engine

MIB = 1 << 20


def stored(number: int, previous: int | None = None, *, size: int = 100) -> Stored:
    return Stored(
        name_of(number), None if previous is None else name_of(previous), b'{"id":1}', b"[1]", b"[%s]" % (b"2" * size)
    )


def name_of(number: int) -> str:
    return f"resp_{number:032x}"


@contextmanager
def as_tenant(name: str) -> Iterator[None]:
    token = current_tenant.set(name)
    try:
        yield
    finally:
        current_tenant.reset(token)


async def kept(store: ResponseStore, numbers: Iterator[int] | range) -> list[int]:
    """Those of some that are there; a look is no use here."""

    def there(number: int) -> bool:
        return bool(store._rows("SELECT 1 FROM responses WHERE name = ?", name_of(number)))

    return [number for number in numbers if await store._run(lambda number=number: there(number))]  # type: ignore[misc]


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_put_in_comes_out(tmp_path: Path, in_file: bool) -> None:
    async def run() -> None:
        store = ResponseStore(tmp_path / "responses" if in_file else None)
        assert await store.put(stored(1), None)
        assert await store.put(stored(2, 1), "salt")
        assert await store.put(stored(3, 1), None)
        assert (await store.find(name_of(1), None)).body == b'{"id":1,"output":[' + b"2" * 100 + b"]}"
        assert [each.name for each in await store.chain(name_of(3), None, MIB)] == [name_of(1), name_of(3)]
        for name, salt in ((name_of(4), None), (name_of(1), "salt"), ("", None), ("resp_\ud800", None)):
            with pytest.raises(ResponseNotFound):
                await store.find(name, salt)
            with pytest.raises(ResponseNotFound):
                await store.delete(name, salt)
        with pytest.raises(ResponseNotFound):  # it continues what is another's
            await store.chain(name_of(2), "salt", MIB)
        with as_tenant("other"), pytest.raises(ResponseNotFound):
            await store.find(name_of(1), None)
        with pytest.raises(RequestError, match=r"hold 210 bytes of items, at most 209"):
            await store.chain(name_of(3), None, 209)
        await store.delete(name_of(1), None)
        with pytest.raises(ResponseNotFound):
            await store.chain(name_of(3), None, MIB)
        await store.aclose()

    asyncio.run(run())


def test_bytes_are_bounded_by_what_is_really_taken(tmp_path: Path) -> None:
    async def run() -> None:
        for path in (None, tmp_path / "responses"):
            store = ResponseStore(path, 2 * MIB)
            for number, size in enumerate([10, 2000, 3000, 5000, 8200, 30000, 200_000] * 12):
                assert await store.put(stored(number, size=size), None)
                assert 0 < store.num_bytes <= 2 * MIB
                [(pages,)], [(free,)] = [store._rows(f"PRAGMA {name}") for name in ("page_count", "freelist_count")]
                assert (pages - free) * 4096 <= store.num_bytes + 12 * 4096  # roots of tables and indexes
            assert not await store.put(stored(999, size=MIB // 4), None)
            assert await kept(store, range(20)) == []
            assert await kept(store, range(83, 84)) == [83]
            store._count()
            counted, number = store.num_bytes, store._num_responses
            await store.put(stored(1000), None)
            assert (store.num_bytes > counted, store._num_responses) == (True, number + 1)
            await store.aclose()

    asyncio.run(run())


def test_what_was_not_used_for_longest_leaves_first_and_a_use_is_one_of_the_whole_chain() -> None:
    async def run() -> None:
        clock = iter(range(1, 1000))
        store = ResponseStore(None, LEAST_BYTES, now=lambda: next(clock))
        size = 100_000
        for number in range(4):
            await store.put(stored(number, size=size), None)
        await store.put(stored(4, 3, size=size), None)
        await store.put(stored(5, 4, size=size), None)
        await store.find(name_of(1), None)
        await store.chain(name_of(5), None, MIB)
        for number in range(6, 11):
            await store.put(stored(number, size=size), None)
        assert await kept(store, range(11)) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
        for number in range(11, 14):
            await store.put(stored(number, size=size), None)
        assert await kept(store, range(14)) == [3, 4, 6, 7, 8, 9, 10, 11, 12, 13]  # 5 ends its chain
        await store.aclose()

    asyncio.run(run())


def test_a_tenant_with_little_loses_nothing_to_one_with_much() -> None:
    async def run() -> None:
        store = ResponseStore(None, LEAST_BYTES)
        with as_tenant("small"):
            await store.put(stored(0, size=50_000), None)
        with as_tenant("large"):
            for number in range(1, 40):
                await store.put(stored(number, size=100_000), None)
        with as_tenant("small"):
            assert (await store.find(name_of(0), None)).name == name_of(0)
        await store.aclose()

    asyncio.run(run())


def test_a_response_lives_for_a_time_after_its_last_use() -> None:
    async def run() -> None:
        seconds = 0.0
        store = ResponseStore(None, life_s=10, now=lambda: seconds)
        await store.put(stored(1), None)
        await store.put(stored(2, 1), None)
        await store.put(stored(3), None)
        seconds = 9
        await store.chain(name_of(2), None, MIB)
        seconds = 18
        assert len(await store.chain(name_of(2), None, MIB)) == 2
        with pytest.raises(ResponseNotFound):
            await store.find(name_of(3), None)
        seconds = 28.5
        with pytest.raises(ResponseNotFound, match=r"0\.0027"):
            await store.find(name_of(1), None)
        assert store.num_bytes == 0
        await store.aclose()

    asyncio.run(run())


def test_a_look_that_is_refused_changes_no_counts() -> None:
    async def run() -> None:
        seconds = 0.0
        store = ResponseStore(None, life_s=10, now=lambda: seconds)
        await store.put(stored(1), None)
        seconds = 8
        await store.put(stored(2), None)
        seconds = 11  # the first has expired
        with pytest.raises(RequestError, match="at most 9 can be continued"):
            await store.chain(name_of(2), None, 9)
        held = store.num_bytes, store._num_responses
        await store._run(store._count)
        assert (store.num_bytes, store._num_responses) == held
        await store.aclose()

    asyncio.run(run())


def test_a_file_outlives_its_process_and_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "responses"

    async def write() -> None:
        store = ResponseStore(path)
        for number in range(8):
            await store.put(stored(number, size=200_000), None)
        await store.aclose()

    async def read() -> None:
        store = ResponseStore(path, LEAST_BYTES)
        assert 0 < store.num_bytes <= LEAST_BYTES
        assert await kept(store, range(8)) == [3, 4, 5, 6, 7]
        assert (await store.find(name_of(7), None)).name == name_of(7)
        await store.aclose()

    asyncio.run(write())
    assert path.stat().st_mode & 0o077 == 0
    asyncio.run(read())


def damage(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE t (x)")
    database.executemany("INSERT INTO t VALUES (?)", [("y" * 3000,)] * 50)
    database.commit()
    database.close()


def harm(path: Path) -> None:
    """A file of ours, some bytes of which are not."""
    store = ResponseStore(path)
    asyncio.run(store.put(stored(1, size=50_000), None))
    asyncio.run(store.aclose())
    data = bytearray(path.read_bytes())
    data[4096 : 4096 * 6] = os.urandom(4096 * 5)
    path.write_bytes(data)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no database": (lambda path: path.write_bytes(b"hello" * 1000), "not a database"),
    "of something else": (damage, "something else"),
    "damaged": (harm, "damaged|malformed"),
    "a folder": (lambda path: path.mkdir(), "directory|unable to open"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    path, (spoil, words) = tmp_path / "responses", BAD[name]
    spoil(path)
    with pytest.raises(ConfigError, match=f"cannot be kept in {path}: .*({words})"):
        ResponseStore(path)


def test_a_file_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses"
    hold = (
        "import sys, pathlib; from hybrid_cache.api.server.response_store import ResponseStore; "
        "store = ResponseStore(pathlib.Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="another process uses it"):
            ResponseStore(path)
        other.communicate(b"")


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        store = ResponseStore(tmp_path / "responses")

        async def talk(first: int) -> None:
            for number in range(first, first + 20):
                await store.put(stored(number, number - 1 if number > first else None), None)
                chain = await store.chain(name_of(number), None, MIB)
                assert [each.name for each in chain] == [name_of(i) for i in range(first, number + 1)]

        await asyncio.gather(*(talk(1000 * i) for i in range(10)))
        held, number = store.num_bytes, store._num_responses
        await store._run(store._count)
        assert (store.num_bytes, store._num_responses) == (held, number) == (held, 200)
        await store.aclose()

    asyncio.run(run())


def test_a_response_that_cannot_be_written_is_answered_all_the_same(sum_text: Any, tmp_path: Path) -> None:
    async def run() -> None:
        app = new_app(new_engine(), sum_text, response_store=tmp_path / "responses", response_store_bytes=MIB)
        async with in_process(app) as client:
            large = {"input": "x", "instructions": "", "metadata": {}, "max_output_tokens": 1}
            reply = (await client.post("/v1/responses", json={**large, "user": "u" * MIB})).json()
            assert (reply["status"], reply["store"]) == ("incomplete", False)
            assert (await client.get(f"/v1/responses/{reply['id']}")).status_code == 404
            reply = (await client.post("/v1/responses", json=large)).json()
            assert reply["store"] is True
            assert (await client.get(f"/v1/responses/{reply['id']}")).json() == reply

    asyncio.run(run())


def test_a_conversation_goes_on_after_a_restart(sum_text: Any, tmp_path: Path) -> None:
    async def say(text: str, previous: str | None) -> dict[str, Any]:
        app = new_app(new_engine(), sum_text, response_store=tmp_path / "responses")
        async with in_process(app) as client:
            asked = {"input": text, "previous_response_id": previous, "max_output_tokens": 1, "temperature": 0}
            reply: dict[str, Any] = (await client.post("/v1/responses", json=asked)).json()
            if previous is not None:
                items = (await client.get(f"/v1/responses/{reply['id']}/input_items?order=asc")).json()["data"]
                assert [item["role"] for item in items] == ["user", "assistant", "user"]
                assert (await client.delete(f"/v1/responses/{previous}")).json() == {
                    "id": previous,
                    "object": "response",
                    "deleted": True,
                }
            return reply

    async def run() -> None:
        first = await say("one", None)
        second = await say("two", first["id"])
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]

    asyncio.run(run())


def test_a_database_that_fails_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        store = ResponseStore(tmp_path / "responses", LEAST_BYTES)
        for number in range(11):
            assert await store.put(stored(number, size=100_000), None)
        held = store.num_bytes, store._num_responses
        assert not await store.put(stored(10, size=100_000), None)  # the oldest was to make room, but the name is taken
        assert (store.num_bytes, store._num_responses) == held
        assert await kept(store, range(11)) == list(range(1, 11))
        await store._run(lambda: store._rows("DROP TABLE responses"))
        assert not await store.put(stored(2), None)
        with pytest.raises(RequestFailed, match="no such table"):
            await store.find(name_of(1), None)
        await store.aclose()

    asyncio.run(run())


def test_memory_and_durations(tmp_path: Path) -> None:
    assert memory_bytes(None, 8 * MIB) == 10 * MIB
    assert memory_bytes(tmp_path / "x", 1 << 40) == 2 * MIB
    assert [parse_life(text) for text in ("90s", "30m", "24h", " 7d ")] == [90, 1800, 86400, 604800]
    for text in ("", "0h", "1.5h", "h", "24", "1w", "\u0661h", "99999999d"):
        with pytest.raises(ConfigError, match="duration"):
            parse_life(text)
    with pytest.raises(ConfigError, match="1048575"):
        ResponseStore(None, MIB - 1)
