"""Work that nobody waits for, and bodies that are slow to refuse: python -m tests.soak.abandoned

A hundred clients send a prompt of half a megabyte and leave after a second; then an ordinary prompt of 5,000 characters
must be answered about as fast as before. After that, one by one, bodies of megabytes that are wrong in every item.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from random import Random
from statistics import median

from tests.soak.common import HEALTH_S, Options, Scene, parse, returned, run
from tests.soak.prompts import text_of
from tests.soak.server import cpu_seconds, num_files, resident_mib
from tests.soak.wire import Reply, exchange, post

ABANDONED_CHARACTERS, LEAVE_S = 496_000, 1.0
ORDINARY_CHARACTERS, REPEATS = 5_000, 5
MAX_WAIT_S = 3.0  # of the ordinary prompt, right after everybody has left
MAX_GROWTH_MIB = 256.0
MAX_CPU_S, MAX_BODY_MIB = 2.0, 300.0  # of one wrong body of at most 10 MB
SIZES = (2**20, 60_000)  # items of wrong bodies: as many as fit, and about as many as a request may have
DEFAULTS = Options(cases=100)


async def abandoned(scene: Scene) -> None:
    files = num_files(scene.server.pid)
    await leave(scene)
    for many in SIZES:
        for name, path, body in wrong_bodies(many):
            await refuse(scene, name, path, body)
    await returned(scene, files)


async def leave(scene: Scene) -> None:
    """Clients that leave do not keep the next one waiting."""
    server, report, rng = scene.server, scene.report, Random(scene.options.seed)
    alone = [await _ordinary(scene, rng) for _ in range(REPEATS)]
    memory, begin = resident_mib(server.pid), time.monotonic()
    await asyncio.gather(*(_abandon(scene, Random(f"{rng.random()}")) for _ in range(scene.options.cases)))
    left = time.monotonic()
    waited = await _ordinary(scene, rng)
    health = scene.watch.health(begin)
    peak = max((s.resident_mib for s in scene.watch.samples(begin)), default=0.0)
    report.figure("ordinary prompt alone, s", median(alone))
    report.figure("all have left after, s", left - begin)
    report.figure("abandoned: health", str(health))
    report.at_most("ordinary prompt after the abandoned ones, s", waited, max(MAX_WAIT_S, 3 * median(alone)))
    report.at_most("abandoned: growth of resident memory, MiB", peak - memory, MAX_GROWTH_MIB)
    report.at_most("abandoned: longest /health, s", health.longest, HEALTH_S)


async def _ordinary(scene: Scene, rng: Random) -> float:
    """Seconds until a new prompt of ordinary length is answered, however often it is refused for want of room."""
    begin = time.monotonic()
    body = {"prompt": text_of(rng, ORDINARY_CHARACTERS)[:ORDINARY_CHARACTERS], "max_tokens": 1}
    while (
        reply := await exchange(scene.server.port, post("/v1/completions", body, key=scene.server.key))
    ).status != 200:
        assert reply.status in (429, 503), reply.body
        await asyncio.sleep(0.1)
    return time.monotonic() - begin


async def _abandon(scene: Scene, rng: Random) -> Reply:
    text = text_of(rng, ABANDONED_CHARACTERS // 5)[:ABANDONED_CHARACTERS]
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    raw = post("/v1/chat/completions", body, key=scene.server.key)
    return await exchange(scene.server.port, raw, leave_after_s=LEAVE_S)


def wrong_bodies(many: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, path, body: each is wrong, or at least large, in about so many items."""

    def listed(item: bytes, count: int) -> bytes:
        return b"[" + b",".join([item] * count) + b"]"

    def said(messages: bytes, more: bytes = b"") -> bytes:
        return b'{"messages":' + messages + more + b"}"

    chat, text, user = "/v1/chat/completions", "/v1/completions", b'{"role":"user","content":"x"}'
    yield f"{many} wrong tokens", "/detokenize", b'{"tokens":' + listed(b'""', many) + b"}"
    yield f"{many} right tokens", "/detokenize", b'{"tokens":' + listed(b"9", many) + b"}"
    for item in (b"0", b"{}"):
        message = b'{"role":"assistant","tool_calls":' + listed(item, 128) + b"}"
        yield f"{many // 256} messages of 128 calls {item.decode()}", chat, said(listed(message, many // 256))
    parts = b'{"role":"user","content":' + listed(b'{"type":"text"}', 4096) + b"}"
    yield f"{many // 8192} messages of 4096 wrong parts", chat, said(listed(parts, many // 8192))
    yield (
        f"{many // 512} wrong tools",
        chat,
        said(listed(user, 1), b',"tools":' + listed(b'{"type":"function"}', many // 512)),
    )
    yield f"{4 * many} token ids", text, b'{"prompt":' + listed(b"9", 4 * many) + b"}"
    yield f"{many} messages", chat, said(listed(b"{}", many))
    yield f"{many} stops", text, b'{"prompt":"x","stop":' + listed(b"{}", many) + b"}"
    yield f"{many} biases", text, b'{"prompt":"x","logit_bias":{' + _biases(many // 2) + b"}}"
    yield (
        f"{many} unknown keys",
        "/tokenize",
        b'{"prompt":"x",' + b",".join(b'"k%d":0' % i for i in range(many // 2)) + b"}",
    )


def _biases(count: int) -> bytes:
    return b",".join(b'"%d":"x"' % i for i in range(count))


async def refuse(scene: Scene, name: str, path: str, body: bytes) -> None:
    """Sends one body, and says what it cost."""
    server, report = scene.server, scene.report
    begin, memory, cpu = time.monotonic(), resident_mib(server.pid), cpu_seconds(server.pid)
    reply = await exchange(server.port, post(path, body, key=server.key), timeout_s=300)
    await asyncio.sleep(0.6)  # for a sample of its memory
    health, spent = scene.watch.health(begin), cpu_seconds(server.pid) - cpu
    peak = max((s.resident_mib for s in scene.watch.samples(begin)), default=memory)
    size = f"{len(body) / 2**20:.1f} MiB"
    report.figure(f"{name}: {size}", f"{reply.status}, {spent:.1f} CPU s, +{peak - memory:.0f} MiB, health {health}")
    report.holds(f"{name}: 200 or 4xx", reply.status == 200 or 400 <= reply.status < 500, reply.status)
    report.at_most(f"{name}: longest /health, s", health.longest, HEALTH_S)
    report.at_most(f"{name}: CPU s", spent, MAX_CPU_S)
    report.at_most(f"{name}: MiB", peak - memory, MAX_BODY_MIB)


if __name__ == "__main__":
    sys.exit(run(abandoned, parse(__doc__, DEFAULTS, "cases", "seed"), "abandoned"))
