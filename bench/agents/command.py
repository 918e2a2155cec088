"""`hybrid-cache bench agents`: whose turn it should be, and what should be kept, while agents wait for their tools.

The engine, scheduler, cache and orders of the server run on a simulated clock: a worker that computes nothing lets as
much time pass as the work of a step takes on a machine. Sessions begin at random (Poisson), drawn with replacement from
a trace; each asks, is answered, calls a tool, and asks again when the tool is done.

    end to end     from the arrival of a session to its last token, tools included
    server         end to end without what tools and people took
    recomputed     share of prompt tokens that an earlier turn of the session had, and that were computed again
    resident       share of turns after a pause for which the state of the prompt before was still there

Orders whose name ends in `-oracle` are told how long each tool takes; the published ones also how long the answer is.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hybrid_cache.bench.agents.files import FORMATS, load_workload
from hybrid_cache.bench.agents.machine import MACHINES, machine_named
from hybrid_cache.bench.agents.paused import measure
from hybrid_cache.bench.agents.report import AgentRow, groups, plot_png, row_of, rows_json, table, title_of
from hybrid_cache.bench.agents.simulation import Setting, Simulation
from hybrid_cache.bench.agents.workload import Half, Workload, arrivals
from hybrid_cache.bench.common.files import check_plot, target, write_whole
from hybrid_cache.bench.common.terminal import listed, progress_bar
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.registry import canonical_name, policy_names
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.scheduling.registry import ORDERS, order_name
from hybrid_cache.sizes import parse_bytes

DEFAULT_ORDERS = "vllm,fcfs,infercept,lamps,progress-ttl,learned"
FILE_WIDTH = 150  # where nobody can widen a window
DEFAULT_MODEL, DEFAULT_MEMORY = "hybrid-7b", "6GB"


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be."""

    workload: Workload
    setting: Setting
    rate: float
    seconds: float
    half: Half | None

    def row(self) -> AgentRow:
        come = arrivals(self.workload, self.rate, self.seconds, self.setting.seed, half=self.half)
        if not come:
            raise ConfigError(f"rate {self.rate} for {self.seconds} s: no session comes with seed {self.setting.seed}")
        found = Simulation(self.setting, come).run()
        name = self.workload.name if self.half is None else f"{self.workload.name} ({self.half})"
        return row_of(self.setting, found, name, self.rate, self.seconds)


def agents(
    trace: Annotated[Path | None, typer.Option(help="A file with sessions of agents, gz and xz too.")] = None,
    format: Annotated[str, typer.Option(help=f"Of the file: {', '.join(FORMATS)}; the last needs none.")] = "synthetic",
    model: Annotated[str, typer.Option(help=f"Machines, with commas: {', '.join(MACHINES)}.")] = DEFAULT_MODEL,
    memory: Annotated[str, typer.Option(help="Bytes for contexts, with commas, such as 6GB,12GB.")] = DEFAULT_MEMORY,
    host_memory: Annotated[str, typer.Option(help="Bytes of a second tier, with commas; 0 for none.")] = "0",
    rate: Annotated[float, typer.Option(help="Sessions that begin a second.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="For how long they come; all are run to their end.")] = 300.0,
    policy: Annotated[str, typer.Option(help=f"Orders, with commas: {', '.join(ORDERS)}.")] = DEFAULT_ORDERS,
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
        settings = [
            Setting(
                machine_named(m), parse_bytes(size), order_name(order), canonical_name(cache_policy), cached, s, host
            )
            for m in listed("model", model)
            for size in listed("memory", memory)
            for host in (0 if text == "0" else parse_bytes(text) for text in listed("host memory", host_memory))
            for s in seeds
            for order, cached in [
                *([("vllm", False)] if no_cache_baseline else []),
                *((order, True) for order in listed("policy", policy)),
            ]
        ]
        cells = [Cell(workload, setting, rate, seconds, half) for setting in settings]  # type: ignore[arg-type]
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
