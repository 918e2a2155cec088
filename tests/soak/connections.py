"""Connections that cost little to open and much to keep: python -m tests.soak.connections --seconds 75

    few files    a server with `ulimit -n 64`, and 120 connections that say nothing
    half open    200 connections whose head or body never ends; closed by the server within `--seconds`
    large        30 bodies of 9.9 of 10 MB, never finished
    slow         40 clients that read a stream at one byte a second
    streams      500 streams at once

`/health` is asked all the time.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.soak.common import HEALTH_S, Options, Report, Scene, parse, play, returned, told
from tests.soak.overload import kind_of
from tests.soak.server import KEYS, get, metrics, num_files, resident_mib, serve
from tests.soak.wire import exchange, head, post

FEW_FILES = 64
LARGE_BYTES, ROOM = 9_900_000, 1.3  # what a byte of an unfinished body may take
MAX_LOG_BYTES = 100_000  # what the server may write meanwhile
STORY = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
DEFAULTS = Options(seconds=75.0, clients=1)


@dataclass(frozen=True, slots=True)
class Counts:
    """Connections of each kind."""

    idle: int = 120
    half_open: int = 200
    large: int = 30
    slow: int = 40
    streams: int = 500


FULL = Counts()
Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def opened(port: int, count: int) -> AsyncIterator[list[Opened]]:
    """Connections that are open until the end; those that are refused are left out."""
    made: list[Opened] = []
    try:
        for _ in range(count):
            try:
                made.append(await asyncio.open_connection("127.0.0.1", port, limit=1024))
            except OSError:
                continue
        yield made
    finally:
        for _, writer in made:
            writer.transport.abort()


async def few_files(scene: Scene, counts: Counts = FULL) -> None:
    """For a server with FEW_FILES. Connections that say nothing do not keep others from being answered."""
    written = scene.server.log.stat().st_size
    begin = time.monotonic()
    async with opened(scene.server.port, counts.idle) as idle:
        scene.report.figure("few files: connections open", len(idle))
        await asyncio.sleep(min(scene.options.seconds, 20.0))
        _promise_health(scene, "few files", begin)
    again = time.monotonic()
    while not (await asyncio.to_thread(get, scene.server.port, "/health", timeout_s=5))[0]:
        if time.monotonic() - again > 30:
            break
        await asyncio.sleep(0.1)
    scene.report.at_most("few files: s until /health after they closed", time.monotonic() - again, 2.5)
    scene.report.at_most("few files: bytes of log", scene.server.log.stat().st_size - written, MAX_LOG_BYTES)


async def half_open(scene: Scene, counts: Counts = FULL) -> None:
    """A head without an end, a head that stops in a line, a body without its second half, a chunk without an end."""
    key = scene.server.key
    begun = post("/v1/completions", STORY, key=key)
    chunked = head("POST", "/v1/completions", key=key, headers={"Transfer-Encoding": "chunked"}) + b"10\r\n{"
    starts = (b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET /hea", begun[:-20], chunked)
    begin = time.monotonic()
    async with opened(scene.server.port, counts.half_open) as made:
        for i, (_, writer) in enumerate(made):
            writer.write(starts[i % len(starts)])
        num_open = len(made)
        while num_open and time.monotonic() - begin < scene.options.seconds:
            await asyncio.sleep(0.5)
            num_open = sum(not _is_closed(reader) for reader, _ in made)
        scene.report.figure("half open: s until all were closed", time.monotonic() - begin)
        scene.report.at_most("half open: not closed in time", num_open, 0)
    _promise_health(scene, "half open", begin)


def _is_closed(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None or getattr(reader, "_eof", False)


async def large(scene: Scene, counts: Counts = FULL) -> None:
    """Unfinished bodies take what they weigh, and no more."""
    begin, before = time.monotonic(), resident_mib(scene.server.pid)
    async with opened(scene.server.port, counts.large) as made:
        start = head("POST", "/tokenize", key=scene.server.key, headers={"Content-Length": str(LARGE_BYTES + 1)})
        await asyncio.gather(*(_send(writer, start + b" " * LARGE_BYTES) for _, writer in made))
        await asyncio.sleep(min(scene.options.seconds, 3.0))
        taken = resident_mib(scene.server.pid) - before
    await asyncio.sleep(1)
    scene.report.figure("large: MiB kept after they left", resident_mib(scene.server.pid) - before)
    scene.report.at_most(
        f"large: MiB taken by {counts.large} x 9.9 MB", taken, ROOM * counts.large * LARGE_BYTES / 2**20
    )
    _promise_health(scene, "large", begin)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    try:
        await asyncio.wait_for(writer.drain(), 20)
    except (OSError, TimeoutError):
        return


async def slow(scene: Scene, counts: Counts = FULL) -> None:
    """Readers that dawdle keep no place in the engine."""
    begin, before = time.monotonic(), resident_mib(scene.server.pid)
    async with opened(scene.server.port, counts.slow) as made:
        for _, writer in made:
            writer.write(post("/v1/completions", STORY, key=scene.server.key))
        running = 1.0
        while running and time.monotonic() - begin < max(scene.options.seconds, 20.0):
            await asyncio.gather(*(_read_one(reader) for reader, _ in made))
            await asyncio.sleep(1)
            found = await asyncio.to_thread(metrics, scene.server.port)
            running = found.get("requests_running", 1.0) + found.get("requests_waiting", 0.0)
        scene.report.figure("slow: s until the engine was free", time.monotonic() - begin)
        scene.report.at_most("slow: sequences still in the engine", running, 0)
        scene.report.at_most("slow: MiB taken", resident_mib(scene.server.pid) - before, 64)
    _promise_health(scene, "slow", begin)


async def _read_one(reader: asyncio.StreamReader) -> None:
    try:
        await asyncio.wait_for(reader.read(1), 0.5)
    except (OSError, TimeoutError):
        return


async def streams(scene: Scene, counts: Counts = FULL) -> None:
    """Each is answered to its end, or refused."""
    begin, keys = time.monotonic(), scene.server.keys
    body = {**STORY, "max_tokens": 20}
    asked = (exchange(scene.server.port, post("/v1/completions", body, key=keys[i % 2])) for i in range(counts.streams))
    answers = Counter(kind_of(reply, left=False) for reply in await asyncio.gather(*asked))
    scene.report.figure("streams: answers", dict(answers))
    wrong = {kind: count for kind, count in answers.items() if kind not in ("200", "429", "503")}
    scene.report.holds("streams: only 200, 429 and 503", not wrong and answers["200"] > 0, wrong or dict(answers))
    _promise_health(scene, "streams", begin)


def _promise_health(scene: Scene, what: str, begin: float) -> None:
    health = scene.watch.health(begin)
    scene.report.figure(f"{what}: health", str(health))
    scene.report.at_most(f"{what}: longest /health, s", health.longest, HEALTH_S)
    scene.report.at_most(f"{what}: /health unanswered", health.unanswered, 0)


async def others(scene: Scene, counts: Counts = FULL) -> None:
    """All but the one that needs a server of its own."""
    files = num_files(scene.server.pid)
    for kind in (half_open, large, slow, streams):
        await kind(scene, counts)
    await returned(scene, files)


def main() -> int:
    options = parse(__doc__, DEFAULTS, "seconds")
    report = Report("connections")
    with serve(options.serve_args, keys=KEYS, max_files=FEW_FILES) as server:
        play(few_files, server, options, report)
    with serve(options.serve_args, keys=KEYS) as server:
        play(others, server, options, report)
    return told(report)


if __name__ == "__main__":
    sys.exit(main())
