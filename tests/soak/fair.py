"""What one user's prompts cost another: python -m tests.soak.fair --cases 5 [--model granite-150m]

    behind       a prompt of 50 tokens by itself, and while one of 30,000 is computed, at random moments
    flood        one tenant's prompt of 50 tokens every 0.3 s, by itself and while another sends 60 of 2,000 at once
    throughput   seconds for a mixture of prompts of two tenants, against first come, first served (one tenant, steps
                 without a bound), `--cases` pairs in turn

All three on the engine in this process with one thread, and with the embedded model over HTTP too. Times are those to
the first token, from the moment a request was due.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from statistics import median

import numpy as np
import torch

from hybrid_cache import Engine, EngineConfig, Prompt, Request, SamplingParams
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.bench.choreography.models import GRANITE_150M, open_subject
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.request import TokenOutput
from tests.soak.common import Options, Report, parse, told
from tests.soak.server import Server, serve
from tests.soak.wire import exchange, post

SHORT, FLOOD_TOKENS, EVERY_S = 50, 2_000, 0.3
STEP_MS, BUDGET_BYTES = 100.0, 1 << 30
MAX_BEHIND, MAX_FLOOD, MIN_THROUGHPUT = 3.0, 1.5, 0.98  # times what it is alone, p99 alone, first come first served
SERVE = ("--budget", "1GiB", "--threads", "1")
A, B = "tenant a", "tenant b"


@dataclass(frozen=True, slots=True)
class Counts:
    """Prompts of each kind; alone: short ones by themselves."""

    alone: int = 30
    flood: int = 60
    mixture: tuple[int, ...] = (FLOOD_TOKENS,) * 12 + (SHORT,) * 24


FULL = Counts()


@dataclass(slots=True)
class Times:
    """Seconds of each request, and of each mixture."""

    alone: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    flooded: list[float] = field(default_factory=list)
    fair: list[float] = field(default_factory=list)
    in_turn: list[float] = field(default_factory=list)


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1) + 0.5)]


def promise(report: Report, where: str, times: Times) -> None:
    for name in ("alone", "behind", "calm", "flooded", "fair", "in_turn"):
        seconds = getattr(times, name)
        report.figure(
            f"{where}: {name}, n, median and p99 in ms", [len(seconds), 1e3 * median(seconds), 1e3 * p99(seconds)]
        )
    report.at_most(
        f"{where}: behind a long prompt, times alone", median(times.behind) / median(times.alone), MAX_BEHIND
    )
    report.at_most(f"{where}: p99 under a flood, times p99 alone", p99(times.flooded) / p99(times.calm), MAX_FLOOD)
    ratios = [old / new for old, new in zip(times.in_turn, times.fair, strict=True)]
    report.figure(f"{where}: throughput of each pair", [round(ratio, 3) for ratio in ratios])
    report.at_least(f"{where}: throughput, times first come first served", median(ratios), MIN_THROUGHPUT)


class InProcess:
    """Requests to an engine on this thread. Those that are due while it computes come between two layers."""

    def __init__(self, model: HybridModel, seed: int, *, bounded: bool = True) -> None:
        bound = STEP_MS if bounded else None
        self.engine = Engine(model, EngineConfig(budget_bytes=BUDGET_BYTES, max_step_ms=bound, verify=False))
        self.engine.between_layers = self._between_layers
        self._vocab, self._rng = model.vocab_size, np.random.default_rng(seed)
        self._count = 0
        self._coming: list[tuple[float, str]] = []  # when a short prompt is due, and whose it is; the next one last
        self._due: dict[str, float] = {}  # of short prompts that wait for their token
        self._times: list[float] = []
        for _ in range(3):  # the rates that bound a step are measured
            self.submit(500, A)
            self.engine.run_until_idle()

    def submit(self, num_tokens: int, tenant: str) -> str:
        self._count += 1
        name = str(self._count)
        tokens = self._rng.integers(3, self._vocab, num_tokens).astype(np.int32)
        sampling = SamplingParams(temperature=0, max_tokens=1, min_tokens=1)
        self.engine.submit(Request(name, Prompt(tokens), sampling, tenant=tenant))
        return name

    def short(self, tenant: str, seconds: float) -> None:
        """A short prompt is due in so many seconds from now, and before all others that are to come."""
        self._coming.append((time.perf_counter() + seconds, tenant))

    def run(self, until: Callable[[], bool]) -> list[float]:
        """Until something is so -> the times of short prompts that were answered since the last call."""
        while not until():
            self._arrive()
            if self.engine.has_work:
                self._hear(self.engine.step())
            else:
                time.sleep(max(self._coming[-1][0] - time.perf_counter(), 0))
        times, self._times = self._times, []
        return times

    @property
    def all_answered(self) -> bool:
        return not (self._coming or self._due)

    def _arrive(self) -> bool:
        count = self._count
        while self._coming and self._coming[-1][0] <= time.perf_counter():
            due, tenant = self._coming.pop()
            self._due[self.submit(SHORT, tenant)] = due
        return self._count > count

    def _between_layers(self) -> None:
        if self._arrive():
            self._hear(self.engine.step_between())

    def _hear(self, outputs: Outputs) -> None:
        now = time.perf_counter()
        answered = {name for name, output in outputs if isinstance(output, TokenOutput)}
        self._times += [now - self._due.pop(name) for name in answered & self._due.keys()]


def measure_in_process(model: HybridModel, options: Options, counts: Counts = FULL) -> Times:
    times, rng, engine = Times(), Random(options.seed), InProcess(model, options.seed)
    sizes = tuple(min(size, options.tokens) for size in counts.mixture)
    for _ in range(counts.alone):
        engine.short(A, 0)
        times.alone += engine.run(lambda: engine.all_answered)
    engine.submit(options.tokens, A)
    while engine.engine.has_work:
        engine.short(A, rng.uniform(0.05, 0.2))
        times.behind += engine.run(lambda: engine.all_answered)
    if times.behind[1:]:
        times.behind.pop()  # the long one may have ended before
    times.calm += _every(engine, counts.alone)
    for _ in range(options.cases):
        for _ in range(counts.flood):
            engine.submit(min(FLOOD_TOKENS, options.tokens), A)
        while engine.engine.has_work:
            times.flooded += _every(engine, 1)
    for pair in range(options.cases):
        contenders = [(times.fair, True), (times.in_turn, False)]
        for found, bounded in contenders if pair % 2 else contenders[::-1]:
            found.append(_mixture(InProcess(model, pair, bounded=bounded), sizes, (A, B) if bounded else (A, A)))
    return times


def _every(engine: InProcess, count: int) -> list[float]:
    """B's short prompts, one each EVERY_S."""
    for number in range(count, 0, -1):
        engine.short(B, number * EVERY_S)
    return engine.run(lambda: engine.all_answered)


def _mixture(engine: InProcess, sizes: tuple[int, ...], tenants: tuple[str, str]) -> float:
    for number, size in enumerate(sizes):
        engine.submit(size, tenants[number % 2])
    begin = time.perf_counter()
    engine.engine.run_until_idle()
    return time.perf_counter() - begin


class OverHttp:
    """Requests to a server, of two keys."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self._rng = Random(seed)

    async def ask(self, num_tokens: int, key: str) -> float:
        """Seconds until a new prompt is answered; asked again while the server has no room for it."""
        begin = time.perf_counter()
        prompt = [self._rng.randrange(10, 400) for _ in range(num_tokens)]
        raw = post("/v1/completions", {"prompt": prompt, "max_tokens": 1}, key=key)
        while (reply := await exchange(self.server.port, raw)).status != 200:
            assert reply.status in (429, 503), reply
            await asyncio.sleep(0.05)
        return time.perf_counter() - begin

    async def every(self, seconds: float, busy: Callable[[], bool], count: int = 0) -> list[float]:
        """B's short prompts while something else goes on, and so many at least."""
        asked: list[asyncio.Task[float]] = []
        while busy() or len(asked) < count:
            asked.append(asyncio.ensure_future(self.ask(SHORT, self.server.keys[1])))
            await asyncio.sleep(seconds)
        return list(await asyncio.gather(*asked))

    async def one_by_one(self, key: str, busy: Callable[[], bool]) -> list[float]:
        """Short prompts at random moments while something else goes on; never two of them at once."""
        times = [await self.ask(SHORT, key)]
        while busy():
            times.append(await self.ask(SHORT, key))
            await asyncio.sleep(self._rng.uniform(0.1, 0.3))
        return times

    async def flood(self, sizes: tuple[int, ...], keys: tuple[str, str]) -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(self.ask(size, keys[i % 2]) for i, size in enumerate(sizes)))
        return time.perf_counter() - begin


async def measure_over_http(fair: Server, in_turn: Server, options: Options, counts: Counts = FULL) -> Times:
    """in_turn: a server whose steps have no bound"""
    times, client = Times(), OverHttp(fair, options.seed)
    key, sizes = fair.keys[0], tuple(min(size, options.tokens) for size in counts.mixture)
    for _ in range(5):
        await client.ask(500, key)
    times.alone = [await client.ask(SHORT, key) for _ in range(counts.alone)]
    times.behind = await _beside(client.ask(options.tokens, key), lambda busy: client.one_by_one(key, busy))
    times.calm = await client.every(EVERY_S, lambda: False, counts.alone)
    for _ in range(options.cases):
        flood = client.flood((min(FLOOD_TOKENS, options.tokens),) * counts.flood, (key, key))
        times.flooded += await _beside(flood, lambda busy: client.every(EVERY_S, busy, 1))
    for pair in range(options.cases):
        contenders = [(times.fair, fair, fair.keys), (times.in_turn, in_turn, (key, key))]
        for found, server, keys in contenders if pair % 2 else contenders[::-1]:
            found.append(await OverHttp(server, pair).flood(sizes, (keys[0], keys[1])))
    return times


async def _beside(work: Awaitable[float], other: Callable[[Callable[[], bool]], Awaitable[list[float]]]) -> list[float]:
    """What `other` measures while some work goes on."""
    running = asyncio.ensure_future(work)
    await asyncio.sleep(0.2)
    found = await other(lambda: not running.done())
    await running
    return found


def main() -> int:
    defaults = Options(cases=5)
    options = parse(__doc__, defaults, "cases", "seed", "tokens", "model")
    report = Report("fair")
    measure(report, options)
    return told(report)


def measure(report: Report, options: Options) -> None:
    torch.set_num_threads(1)
    name = GRANITE_150M if options.model == GRANITE_150M else None
    with torch.inference_mode():
        model = open_subject(LoadOptions(model=name, threads=1)).model
        promise(report, f"{options.model}, in process", measure_in_process(model, options))
    if name is None:
        with ExitStack() as stack:
            fair = stack.enter_context(serve((*SERVE, *options.serve_args)))
            in_turn = stack.enter_context(serve((*SERVE, "--max-step-ms", "0", *options.serve_args)))
            promise(report, "embedded, http", asyncio.run(measure_over_http(fair, in_turn, options)))


if __name__ == "__main__":
    sys.exit(main())
