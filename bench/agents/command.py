"""`hybrid-cache bench agents`: whose turn it should be, and what should be kept, while agents wait for their tools.

The engine, scheduler, cache and orders of the server run on a simulated clock: a worker that computes nothing lets as
much time pass as the work of a step takes on a machine. Sessions begin at random (Poisson), drawn with replacement from
a trace; each asks, is answered, calls a tool, and asks again when the tool is done.

    end to end     from the arrival of a session to its last token, tools included
    server         end to end without what tools and people took
    recomputed     share of prompt tokens that an earlier turn of the session had, and that were computed again
    resident       share of turns after a pause for which the state of the prompt before was still there

With `--live URL` the sessions are played against a real server, by `bench/agents/live/player.py`; a row of order `live`
says what came of them, and rows of simulated orders beside it what a simulation makes of the same sessions.

Orders whose name ends in `-oracle` are told how long each tool takes; the published ones also how long the answer is.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hybrid_cache.bench.agents.files import FORMATS, load_workload
from hybrid_cache.bench.agents.live.run import LiveServer, run_live
from hybrid_cache.bench.agents.machine import MACHINES, machine_named
from hybrid_cache.bench.agents.paused import measure
from hybrid_cache.bench.agents.report import AgentRow, groups, plot_png, row_of, rows_json, table, title_of
from hybrid_cache.bench.agents.simulation import Setting, Simulation
from hybrid_cache.bench.agents.workload import AgentSession, Half, Workload, arrivals
from hybrid_cache.bench.common.files import check_plot, target, write_whole
from hybrid_cache.bench.common.http_client import server_url
from hybrid_cache.bench.common.terminal import listed, progress_bar
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.registry import canonical_name, policy_names
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.scheduling.registry import ORDERS, order_name
from hybrid_cache.sizes import parse_bytes

DEFAULT_ORDERS = "vllm,fcfs,infercept,lamps,progress-ttl,learned"
FILE_WIDTH = 150  # where nobody can widen a window
OTHERS = 1_000_003  # added to the seed of sessions that are not compared
DEFAULT_MODEL, DEFAULT_MEMORY = "hybrid-7b", "6GB"


@dataclass(frozen=True, slots=True)
class Run:
    """Who comes when."""

    workload: Workload
    rate: float
    seconds: float
    seed: int
    half: Half | None

    @property
    def name(self) -> str:
        return self.workload.name if self.half is None else f"{self.workload.name} ({self.half})"

    def arrivals(self) -> list[tuple[float, AgentSession]]:
        """Raises ConfigError if there are none."""
        come = arrivals(self.workload, self.rate, self.seconds, self.seed, half=self.half)
        if not come:
            raise ConfigError(f"rate {self.rate} for {self.seconds} s: no session comes with seed {self.seed}")
        return come


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be."""

    setting: Setting
    run: Run

    def row(self) -> AgentRow:
        found = Simulation(self.setting, self.run.arrivals()).run()
        return row_of(self.setting.served, found, self.run.name, self.run.rate, self.run.seconds)


def agents(
    trace: Annotated[Path | None, typer.Option(help="A file with sessions of agents, gz and xz too.")] = None,
    format: Annotated[str, typer.Option(help=f"Of the file: {', '.join(FORMATS)}; the last needs none.")] = "synthetic",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Machines, with commas: {', '.join(MACHINES)}; {DEFAULT_MODEL} if left out. "
            "With --live: the folder of its model, or embedded."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help=f"Bytes for contexts, with commas, such as 6GB,12GB; {DEFAULT_MEMORY} if left out."),
    ] = None,
    host_memory: Annotated[str, typer.Option(help="Bytes of a second tier, with commas; 0 for none.")] = "0",
    rate: Annotated[float, typer.Option(help="Sessions that begin a second.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="For how long they come; all are run to their end.")] = 300.0,
    policy: Annotated[
        str | None,
        typer.Option(help=f"Orders, with commas: {', '.join(ORDERS)}; {DEFAULT_ORDERS} if left out, learned if live."),
    ] = None,
    cache_policy: Annotated[str, typer.Option(help=f"What leaves the cache: {', '.join(policy_names())}.")] = (
        Learned.name
    ),
    no_cache_baseline: Annotated[
        bool, typer.Option("--no-cache-baseline", help="Add `vllm` without a prefix cache.")
    ] = False,
    half: Annotated[
        str | None, typer.Option(help="Draw from one half of the sessions only: tuning or held-out.")
    ] = None,
    max_calls: Annotated[int | None, typer.Option(min=1, help="Cut sessions after so many calls.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Cut sessions at so long a context.")] = None,
    max_pause: Annotated[float | None, typer.Option(min=0.0, help="Shorten pauses to so many seconds.")] = None,
    seed: Annotated[str, typer.Option(help="Of arrivals and of what is made up; several with commas.")] = "0",
    paused: Annotated[
        str | None,
        typer.Option(help="Instead, time the engine's own work in a step with so many paused tasks, with commas."),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            help="Instead, play the sessions against the server at this address, with tools that really sleep. "
            "With --model and --memory its rates are measured afterwards, and the same sessions are simulated too, "
            "in the orders of --policy, of which the first is the server's."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key of the server.", exists=True, dir_okay=False)
    ] = None,
    hints: Annotated[bool, typer.Option("--hints", help="Tell the server how long each tool takes.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw server times to this PNG file.")] = None,
) -> None:
    """Simulate agents that wait for tools: orders of service side by side."""
    try:
        json_file = None if json_file is None else target(json_file)
        if plot is not None:
            check_plot(plot)
            plot = target(plot)
        if paused is not None:
            return _time_steps([_whole(text) for text in listed("paused", paused)], json_file)
        seeds = [_whole(text) for text in listed("seed", seed)]
        limits = {"max_calls": max_calls, "max_tokens": max_tokens, "max_pause_s": max_pause}
        workload = load_workload(trace, format, seed=seeds[0], **limits)  # type: ignore[arg-type]
        orders = [order_name(order) for order in listed("policy", policy or ("learned" if live else DEFAULT_ORDERS))]
        hosts = [0 if text == "0" else parse_bytes(text) for text in listed("host memory", host_memory)]
        if live is not None:
            sizes = [0] if memory is None else [parse_bytes(size) for size in listed("memory", memory)]
            if len(sizes) + len(hosts) + len(seeds) != 3:
                raise ConfigError(
                    "--live: expected one --memory, one --host-memory and one --seed, those of the server"
                )
            if model is not None and memory is None:
                raise ConfigError("--live with --model simulates too: expected the server's --memory beside it")
            server = LiveServer(server_url(live), _key(api_key_file), model, sizes[0], hosts[0], hints)
            rows = _live(server, Run(workload, rate, seconds, seeds[0], half), orders)  # type: ignore[arg-type]
        else:
            settings = [
                Setting(machine_named(m), parse_bytes(size), order, canonical_name(cache_policy), cached, s, host)
                for m in listed("model", DEFAULT_MODEL if model is None else model)
                for size in listed("memory", DEFAULT_MEMORY if memory is None else memory)
                for host in hosts
                for s in seeds
                for order, cached in [
                    *([("vllm", False)] if no_cache_baseline else []),
                    *((order, True) for order in orders),
                ]
            ]
            cells = [
                Cell(setting, Run(workload, rate, seconds, setting.seed, half))  # type: ignore[arg-type]
                for setting in settings
            ]
            rows = _measured(cells, jobs)
        if json_file is not None:
            write_whole(json_file, rows_json(rows, {"note": workload.note}).encode())
        if plot is not None:
            write_whole(plot, plot_png(rows))
    except HybridCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(f"{workload.name}: {workload.note}", soft_wrap=True)
    for group in groups(rows):
        console.print(table(group, title_of(group[0]) + f", seed {group[0].seed}"))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r}: expected a whole number, not negative")
    return int(text)


def _key(file: Path | None) -> str | None:
    return None if file is None else file.read_text().strip()


def _live(server: LiveServer, run: Run, orders: Sequence[str]) -> list[AgentRow]:
    come, row = run.arrivals(), (run.name, run.rate, run.seconds)
    others = replace(run, seed=run.seed + OTHERS).arrivals() if server.folder is not None else []
    with progress_bar() as progress:
        bar = progress.add_task("sessions", total=len(come) + len(others))
        found = run_live(server, come, others, run.seed, orders[0], lambda: progress.advance(bar))
        rows = [row_of(found.served, found.played.outcome, *row)]
        if found.machine is not None:
            progress.update(bar, description="the same, simulated")
            for served, outcome in map(found.simulated, orders):
                rows.append(row_of(served, outcome, *row))
    return rows


def _time_steps(paused: Sequence[int], json_file: Path | None) -> None:
    times = measure(paused)
    report = Table("paused tasks", "room for", "median", "p99", "with a newcomer", title="milliseconds of a step")
    for each in times:
        values = each.median_ms, each.p99_ms, each.with_newcomer_ms
        report.add_row(f"{each.paused:,}", each.room, *(f"{value:.2f}" for value in values))
    if json_file is not None:
        write_whole(json_file, (json.dumps([asdict(each) for each in times], indent=2) + "\n").encode())
    Console().print(report)


def _measured(cells: Sequence[Cell], jobs: int) -> list[AgentRow]:
    rows: dict[int, AgentRow] = {}
    with progress_bar() as progress:
        bar = progress.add_task("simulations", total=len(cells))
        if jobs == 1:
            for number, cell in enumerate(cells):
                progress.update(bar, description=f"{cell.setting.order}, {cell.setting.machine.name}")
                rows[number] = cell.row()
                progress.advance(bar)
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                running = {pool.submit(cell.row): number for number, cell in enumerate(cells)}
                for future in as_completed(running):
                    rows[running[future]] = future.result()
                    progress.advance(bar)
    return [rows[number] for number in range(len(cells))]
