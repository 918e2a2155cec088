"""How a soak is started, what it promises, and how it says whether that was kept."""

import argparse
import asyncio
import json
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.soak.server import KEYS, Server, metrics, num_files, serve
from tests.soak.watch import Watch, watching

HEALTH_S = 1.0  # p99 of /health under load, and its longest answer under a single attack
RETURN_S = 60.0  # after which nothing may be held any more


@dataclass(frozen=True, slots=True)
class Options:
    """seconds: how long the load lasts   clients: how many at once   cases: how many tries   replay: only these
    tokens: of a long prompt   model: embedded or granite-150m

    A script reads some of them, and offers no others.
    """

    seconds: float = 60.0
    clients: int = 16
    cases: int = 1000
    seed: int = 0
    replay: tuple[int, ...] = ()
    tokens: int = 30_000
    model: str = "embedded"
    serve_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Promise:
    name: str
    value: str
    bound: str
    kept: bool


@dataclass(slots=True)
class Report:
    """What was measured, and which promises were kept."""

    name: str
    figures: dict[str, object] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def figure(self, name: str, value: object) -> None:
        self.figures[name] = round(value, 4) if isinstance(value, float) else value

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.promises.append(Promise(name, f"{value:.4g}", f"at most {bound:.4g}", value <= bound))

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.promises.append(Promise(name, f"{value:.4g}", f"at least {bound:.4g}", value >= bound))

    def holds(self, name: str, kept: bool, value: object = "", bound: str = "true") -> None:
        self.promises.append(Promise(name, str(value) if value != "" else str(kept), bound, kept))

    @property
    def kept(self) -> bool:
        return bool(self.promises) and all(promise.kept for promise in self.promises)

    def json(self) -> str:
        promises = [{"name": p.name, "value": p.value, "bound": p.bound, "kept": p.kept} for p in self.promises]
        return json.dumps({"soak": self.name, "kept": self.kept, "figures": self.figures, "promises": promises})

    def show(self) -> None:
        """A table for people, then one line of JSON."""
        print(f"\n{self.name}")
        for name, value in self.figures.items():
            print(f"  {name:<58} {value}")
        for promise in self.promises:
            mark = "ok    " if promise.kept else "BROKEN"
            print(f"  {mark} {promise.name:<51} {promise.value} ({promise.bound})")
        print(self.json(), flush=True)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a soak works with."""

    server: Server
    watch: Watch
    options: Options
    report: Report


Soak = Callable[[Scene], Awaitable[None]]


def run(soak: Soak, options: Options, name: str, *, keys: Sequence[str] = KEYS, max_files: int = 0) -> int:
    """Runs a soak against a server of its own -> exit code, 1 if a promise was broken."""
    report = Report(name)
    report.figure("options", str(options))
    with serve(options.serve_args, keys=keys, max_files=max_files) as server:
        play(soak, server, options, report)
    return told(report)


def told(report: Report) -> int:
    """Shows a report -> exit code."""
    report.show()
    return 0 if report.kept else 1


def play(soak: Soak, server: Server, options: Options, report: Report) -> None:
    """A soak on a server that runs, watched, with what every soak promises."""
    with watching(server) as watch:
        asyncio.run(_awaited(soak, Scene(server, watch, options, report)))
    report.holds("the server lives", server.alive)


async def _awaited(soak: Soak, scene: Scene) -> None:
    await soak(scene)


def parse(text: str | None, defaults: Options, *uses: str) -> Options:
    """What the command line asks for. uses: the names of the options that a script reads"""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in uses:
        value = getattr(defaults, name)
        if isinstance(value, tuple):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=value)
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--serve-args", type=shlex.split, default=defaults.serve_args, help="more options of `serve`")
    given = vars(parser.parse_args())
    asked: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return replace(defaults, **asked)


async def returned(scene: Scene, files_before: int) -> None:
    """Promises that, soon after everybody has gone, nothing is held any more."""
    wanted = ("requests_running", "requests_waiting", "cache_bytes.working")
    begin = time.monotonic()
    while True:
        counts = await asyncio.to_thread(metrics, scene.server.port, key=scene.server.key)
        held = {name: counts[name] for name in wanted if counts.get(name, 1.0)} if counts else {"metrics": "none"}
        files = num_files(scene.server.pid)
        if (not held and files <= files_before + 2) or time.monotonic() - begin > RETURN_S:
            break
        await asyncio.sleep(0.2)
    scene.report.figure("seconds until all was returned", time.monotonic() - begin)
    scene.report.holds("nothing runs, waits or works", not held, held or "0 of each")
    scene.report.at_most("open files above those before", files - files_before, 2)
