"""Minutes at ten times the load that a server can take: python -m tests.soak.overload --seconds 300

320 clients of two keys ask as fast as they are answered, for prompts of 5 to 4,000 words, one to four answers, streamed
and whole; three in ten hang up within three seconds. One request in twenty is the same greedy one, whose answer must
stay what it was before the load.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from random import Random

from tests.soak.common import HEALTH_S, Options, Scene, parse, returned, run
from tests.soak.prompts import generation
from tests.soak.server import num_files
from tests.soak.watch import growth_after_warm_up
from tests.soak.wire import Reply, events, exchange, post

MAX_GROWTH = 1.10  # of resident memory from the third sixth of the time to the last
SHORTEST, LONGEST = 5, 4000  # words of a prompt
ABORTED = 0.3
KNOWN = {"prompt": "Once upon a time there was a cat who", "max_tokens": 8, "temperature": 0}
DEFAULTS = Options(seconds=300.0, clients=320)


async def overload(scene: Scene) -> None:
    options, report, server = scene.options, scene.report, scene.server
    files, counts = num_files(server.pid), Counter[str]()
    answer = await _known(scene, server.key)
    begin = time.monotonic()
    until = begin + options.seconds
    await asyncio.gather(*(_client(scene, i, until, counts, answer) for i in range(options.clients)))
    end = time.monotonic()
    samples = scene.watch.samples(begin, end)
    report.figure("answers", dict(sorted(counts.items())))
    report.figure("resident MiB, first and most", [samples[0].resident_mib, max(s.resident_mib for s in samples)])
    report.figure("health", str(scene.watch.health(begin, end)))
    promise_answers(scene, counts)
    promise_budget(scene, begin, end)
    report.at_most("growth of resident memory after warm-up", growth_after_warm_up(samples), MAX_GROWTH)
    report.at_most("p99 of /health, s", scene.watch.health(begin, end).p99, HEALTH_S)
    await returned(scene, files)
    after = await _known(scene, server.key)
    report.holds("the same greedy answer afterwards", after == answer, repr(after), repr(answer))


def promise_answers(scene: Scene, counts: Counter[str]) -> None:
    """Only 200, 429 and 503, and those right."""
    wrong = {kind: count for kind, count in counts.items() if kind not in ("200", "429", "503", "left")}
    scene.report.holds("only 200, 429 and 503", not wrong, wrong or dict(counts), "no other")
    scene.report.at_least("answers of 200", counts["200"], 1)


def promise_budget(scene: Scene, begin: float, end: float) -> None:
    """What `/metrics` says is taken never exceeds the budget."""
    shares = []
    for sample in scene.watch.samples(begin, end):
        parts = [value for name, value in sample.metrics.items() if name.startswith("cache_bytes.")]
        if parts:
            taken = sum(parts) - sample.metrics["cache_bytes.free"]
            shares.append(max(taken, sum(parts)) / sample.metrics["cache_budget_bytes"])
            shares += [2.0] if min(parts) < 0 else []
    scene.report.at_least("samples of /metrics", len(shares), 1)
    scene.report.at_most("most of the budget taken", max(shares, default=2.0), 1.0)


async def _client(scene: Scene, index: int, until: float, counts: Counter[str], answer: str) -> None:
    rng = Random(f"{scene.options.seed}/{index}")
    key = scene.server.keys[index % len(scene.server.keys)]
    while time.monotonic() < until and scene.server.alive:
        if rng.random() < 0.05:
            path, body = "/v1/completions", dict(KNOWN)
        else:
            words = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
            path, body = generation(rng, words, rng.choice((1, 8, 64)))
        leave = rng.uniform(0.01, 3) if rng.random() < ABORTED else None
        reply = await exchange(scene.server.port, post(path, body, key=key), leave_after_s=leave)
        kind = kind_of(reply, left=leave is not None)
        if kind == "200" and body == KNOWN and reply.json()["choices"][0]["text"] != answer:  # type: ignore[index]
            kind = "200, another answer"
        counts[kind] += 1
        if kind in ("429", "503"):
            await asyncio.sleep(rng.uniform(0, 0.5))


def kind_of(reply: Reply, *, left: bool) -> str:
    """An answer in a word or two: its status, or what is wrong with it."""
    if not reply.status:
        return "left" if left else "no answer"
    if reply.status in (429, 503):
        return str(reply.status) if "retry-after" in reply.headers else f"{reply.status} without Retry-After"
    if reply.status == 200 and "event-stream" in reply.headers.get("content-type", ""):
        found = events(reply.body)
        if not found or (found[-1] != "[DONE]" and "error" not in json.loads(found[-1])):
            return "200, a stream cut off"
        return "200" if found[-1] == "[DONE]" else f"200, then {json.loads(found[-1])['error']['code']}"
    return str(reply.status)


async def _known(scene: Scene, key: str) -> str:
    """The answer to the known request; asked until the server has room."""
    while True:
        reply = await exchange(scene.server.port, post("/v1/completions", KNOWN, key=key), timeout_s=120)
        if reply.status == 200:
            return str(reply.json()["choices"][0]["text"])  # type: ignore[index]
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    sys.exit(run(overload, parse(__doc__, DEFAULTS, "seconds", "clients", "seed"), "overload"))
