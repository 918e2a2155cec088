"""Cache on against cache off over HTTP: two real servers, and a seeded mix of everything that the API takes.

    mix ── bursts of requests ──► server with a cache ── reply ──► the same, put plainly ──► server without ──► equal?
     ▲                                    │
     └── answers, ids of messages ◄───────┘

An answer that is not labelled as approximate must be equal in every choice: text, tool calls, finish, tokens, and all
log-probabilities as floats. Of a choreography whose reply says `exact`, the plain request has the same messages, in the
order that the reply used, with texts in place of references. What one server refuses, the other has to refuse.

The server with a cache compares what it has published with digests, and ends if something has changed. The run has
phases, each with a fresh server and budget, down to one that holds two sequences while a dozen come in.
What happens there (evictions, preemptions) is read from the server, and the report says what never happened.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.progress import Progress

from hybrid_cache.bench.exactness.http.check import Tally, drive_servers
from hybrid_cache.bench.exactness.http.mix import PHASES, Mix, Phase
from hybrid_cache.bench.exactness.http.report import Counts, HttpReport
from hybrid_cache.bench.exactness.http.servers import PROGRAM, server
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import folders, loading

SHOWN = 5  # differing requests in the report, in full


@dataclass(frozen=True, slots=True)
class Options:
    """How the servers are started."""

    model: str | None = None  # the embedded one
    dtype: str = "auto"
    backend: str = "auto"
    policy: str = Learned.name
    threads: int = 1

    def command(self, *more: str) -> list[str]:
        program = [sys.executable, "-c", PROGRAM, "serve", "--port", "0"]
        named = [] if self.model is None else [self.model]
        chosen = ["--dtype", self.dtype, "--backend", self.backend, "--threads", str(self.threads)]
        return [*program, *named, *chosen, "--drain-timeout", "0", *more]


def compare_http(
    model: str | None,
    num_requests: int,
    seed: int,
    *,
    dtype: str = "auto",
    backend: str = "auto",
    budget: str | None = None,
    policy: str = Learned.name,
    threads: int = 1,
    progress: Progress | None = None,
    phases: Sequence[Phase] = PHASES,
) -> HttpReport:
    """Starts the servers, sends and compares; all of them have ended when it returns or raises.

    budget: of the phase that is not short of memory. Raises ConfigError, ModelError or ServerFailed.
    """
    if num_requests < len(phases):
        raise ConfigError(f"{num_requests} requests, at least {len(phases)} are needed, one for each phase")
    started = time.monotonic()
    options = Options(model, dtype, backend, policy, threads)
    budgets = [_budget(options, phase, budget or "512MiB") for phase in phases]
    tallies: list[Tally] = []
    with ExitStack() as stack:
        plain = stack.enter_context(server(options.command("--no-prefix-cache")))
        for phase, size, number in zip(phases, budgets, _shares(phases, num_requests), strict=True):
            tally = Tally(Counts(phase.name, size), sum(t.counts.requests for t in tallies))
            with server(options.command("--verify", "--budget", size, "--policy", policy)) as cached:
                advance = _advance(progress, f"over HTTP, {phase.name}", number)
                asyncio.run(
                    drive_servers(cached.url(), plain.url(), Mix(f"{seed} {phase.name}", phase), number, tally, advance)
                )
            tallies.append(tally)
    return _report(model, dtype, seed, tallies, time.monotonic() - started)


def compare_servers(
    cached_url: str, plain_url: str, num_requests: int, seed: int, *, progress: Progress | None = None
) -> HttpReport:
    """The same with two servers that run already, in one phase. Raises ServerFailed."""
    started, tally = time.monotonic(), Tally(Counts("given", ""))
    advance = _advance(progress, "over HTTP", num_requests)
    asyncio.run(drive_servers(cached_url, plain_url, Mix(f"{seed} given", PHASES[0]), num_requests, tally, advance))
    return _report(cached_url, "", seed, [tally], time.monotonic() - started)


def _advance(progress: Progress | None, name: str, total: int) -> Callable[[], None]:
    if progress is None:
        return lambda: None
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)


def _shares(phases: Sequence[Phase], num_requests: int) -> list[int]:
    """Requests of each phase, at least one."""
    most = [max(1, int(phase.share / sum(p.share for p in phases) * num_requests)) for phase in phases[1:]]
    return [num_requests - sum(most), *most]


def _budget(options: Options, phase: Phase, asked: str) -> str:
    if not phase.sequences:
        return asked
    path = folders.resolve(options.model)
    spec = loading.describe(loading.load_config(path), dtype=options.dtype).cache_spec
    geometry = Geometry.of(spec, 1 << 50)
    pages = phase.tokens // TILE + 2
    one = pages * geometry.stride_bytes(Kind.PAGE) + geometry.stride_bytes(Kind.SLOT)
    return str(phase.sequences * one)


def _report(model: str | None, dtype: str, seed: int, tallies: Sequence["Tally"], seconds: float) -> HttpReport:
    found = sorted((d for t in tallies for d in t.differences), key=lambda d: d.request)
    first = next((t for t in tallies if t.differences), None)
    replayed = () if first is None else tuple(first.sent[: found[0].request - first.first + 1])
    name = "embedded" if model is None else model
    counts = tuple(replace(t.counts, mixed=dict(t.mixed)) for t in tallies)
    total = sum(counts, Counts("all", ""))
    return HttpReport(name, dtype, seed, seconds, total, counts, tuple(found[:SHOWN]), replayed)
