"""Signals at random moments, while clients are being answered: python -m tests.soak.signals --cases 5

stop        SIGSTOP for up to three seconds and SIGCONT: everybody is answered as if nothing had happened
terminate   SIGTERM: running answers end as they should, the process does with 0, within the drain time and 5 s
twice       a second SIGTERM: it ends at once, with 0
no reader   SIGTERM when nobody reads its error stream any more (`serve 2>&1 | tee log` and Ctrl-C)
kill        SIGKILL, then another server on the same port
"""

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from random import Random

from tests.soak.common import Options, Report, parse, told
from tests.soak.overload import kind_of
from tests.soak.prompts import generation
from tests.soak.server import DEFAULTS, PROGRAM, ROOT, Server, get, serve
from tests.soak.wire import Reply, exchange, post

DRAIN_S, MARGIN_S = 20.0, 5.0
CLIENTS = 8
STORY = {"prompt": "Once upon a time", "max_tokens": 600, "stream": True, "ignore_eos": True}


async def _load(server: Server, rng: Random, seconds: float, counts: Counter[str]) -> None:
    """Clients who ask one after the other until the time is over or nobody answers."""

    async def client() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and server.alive:
            path, body = generation(rng, rng.choice((5, 50, 400)), 8)
            reply = await exchange(server.port, post(path, body, key=rng.choice(server.keys)), timeout_s=60)
            counts[kind_of(reply, left=False)] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def stop(report: Report, options: Options) -> None:
    rng, counts = Random(options.seed), Counter[str]()
    with serve(options.serve_args) as server:
        for _ in range(options.cases):
            load = asyncio.ensure_future(_load(server, rng, 2.0, counts))
            await asyncio.sleep(rng.uniform(0.05, 1.5))
            server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(0.1, 3))
            server.process.send_signal(signal.SIGCONT)
            await load
        report.figure("stop: answers", dict(counts))
        report.holds(
            "stop: only 200, 429 and 503", counts["200"] > 0 and counts.keys() <= {"200", "429", "503"}, dict(counts)
        )
        report.holds("stop: the server lives", server.alive)


async def terminate(report: Report, options: Options) -> None:
    rng, answers, codes, longest = Random(options.seed), Counter[str](), Counter[int](), 0.0
    for _ in range(options.cases):
        with serve(("--drain-timeout", str(DRAIN_S), *options.serve_args)) as server:
            stories = [asyncio.ensure_future(_story(server)) for _ in range(CLIENTS)]
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            codes[await _ended(server.process)] += 1
            longest = max(longest, time.monotonic() - begin)
            answers.update([kind_of(await story, left=False) for story in stories])
    report.figure("terminate: answers", dict(answers))
    report.holds("terminate: exit codes", set(codes) == {0}, dict(codes), "0")
    report.at_most("terminate: s until it ended", longest, DRAIN_S + MARGIN_S)
    report.holds("terminate: answers end as they should", answers.keys() <= {"200", "503"}, dict(answers), "200 or 503")


async def twice(report: Report, options: Options) -> None:
    with serve(("--drain-timeout", "600", *options.serve_args)) as server:
        story = asyncio.ensure_future(
            exchange(server.port, post("/v1/completions", {**STORY, "max_tokens": 20_000}, key=server.key))
        )
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        waited = server.alive
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = await _ended(server.process)
        report.holds("twice: it waits after the first, exit code", waited and code == 0, (waited, code), "(True, 0)")
        report.at_most("twice: s until it ended", time.monotonic() - begin, MARGIN_S)
        await story


async def no_reader(report: Report, options: Options) -> None:
    command = [*PROGRAM, *DEFAULTS, "--drain-timeout", str(DRAIN_S), *options.serve_args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith(b"curl "))
            port = int(line.split(b"/")[2].partition(b":")[2])
            while get(port, "/ready")[0] != 200:
                await asyncio.sleep(0.05)
            process.stderr.close()
            story = asyncio.ensure_future(exchange(port, post("/v1/completions", STORY)))
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            code, kind = await _ended(process), kind_of(await story, left=False)
        finally:
            process.kill()
    report.holds("no reader: exit code and answer", (code, kind) == (0, "200"), (code, kind), "(0, '200')")


async def kill(report: Report, options: Options) -> None:
    with serve(options.serve_args) as server:
        port, story = server.port, asyncio.ensure_future(_story(server))
        await asyncio.sleep(0.5)
        server.process.kill()
        await story
    with serve(("--port", str(port), *options.serve_args)) as again:
        reply = await exchange(again.port, post("/v1/completions", {"prompt": "Once", "max_tokens": 1}, key=again.key))
    report.holds("kill: another one on the same port", (again.port, reply.status) == (port, 200), reply.status, "200")


async def _story(server: Server) -> Reply:
    return await exchange(server.port, post("/v1/completions", STORY, key=server.key), timeout_s=120)


async def _ended(process: "subprocess.Popen[bytes]") -> int:
    """The exit code; -1 if it had to be killed."""
    try:
        return await asyncio.to_thread(process.wait, DRAIN_S + 4 * MARGIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1


def main() -> int:
    options = parse(__doc__, Options(cases=5), "cases", "seed")
    report = Report("signals")
    for kind in (stop, terminate, twice, no_reader, kill):
        asyncio.run(kind(report, options))
    return told(report)


if __name__ == "__main__":
    sys.exit(main())
