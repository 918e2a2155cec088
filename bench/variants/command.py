"""`hybrid-cache bench variants`: models that share a base, what sharing loses, what it saves, and what it serves."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from hybrid_cache.bench.variants import pipeline
from hybrid_cache.bench.variants.plot import draw
from hybrid_cache.bench.variants.quality import (
    BUDGETS,
    CONTROLS,
    PAIRS,
    Outcome,
    Quality,
    best,
    layers_of,
    load_pair,
    outcomes,
)
from hybrid_cache.bench.variants.speed import NUM_TIMINGS, Timing, timings
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.tools.pairs import Measured

T = TypeVar("T")
ACTIVATED = "embedded+embedded-polite"
AGENTS = (3, 8)
SHOWN = ("take all", "exact band", "random set", "project all", "project states", "project attention")


def variants(
    pair: Annotated[
        list[str] | None, typer.Option(help="SENDER:RECEIVER, each `DIR`, `embedded`, and + an adapter.")
    ] = None,
    examples: Annotated[int, typer.Option(min=4, help="Dialogues a pair; 1,200 tell one point apart.")] = 16,
    tokens: Annotated[int, typer.Option(min=64, help="Of the prefix that is timed.")] = 2048,
    new: Annotated[int, typer.Option(min=4, help="Tokens after it.")] = 24,
    seed: Annotated[int, typer.Option(help="Of dialogues, prompts and arrivals.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the models.")] = 1,
    quality: Annotated[bool, typer.Option(help="Measure what answers lose.")] = True,
    speed: Annotated[bool, typer.Option(help="Time the first token on a 152 M hybrid.")] = True,
    pipelines: Annotated[bool, typer.Option(help="Simulate agents that read one context.")] = True,
    plot: Annotated[Path | None, typer.Option(help="A picture (.png) of critical layers of all pairs.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Models that share a base: what it loses, saves and serves when one reads what another has cached."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"seed": seed, "threads": threads}
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        ops = select(backend)
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            if quality:
                names = pair or (*PAIRS, f"embedded:{ACTIVATED}")
                found_of = (_quality(name, ops, examples, seed, progress, console) for name in names)
                measured = [each for each in found_of if each is not None]
                found["quality"] = [each.values() for each in measured]
                if plot is not None and measured:
                    draw([each.layers for each in measured], plot)
            if speed:
                found["speed"] = _speed(ops, tokens, new, seed, progress, console)
            if pipelines:
                found["pipelines"] = [_pipelines(agents, seed, progress, console) for agents in AGENTS]
    except HybridCacheError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json is not None:
        as_json.write_text(json.dumps(found, indent=2, default=str) + "\n")


def _quality(name: str, ops: Ops, num: int, seed: int, progress: Progress, console: Console) -> Quality | None:
    title, pair = name.replace(":", " to ", 1), load_pair(name, ops, num, seed)
    if pair is None:
        console.print(f"{title}: exact before the invocation, nothing is lost")
        return None
    examples = range(len(pair.examples))
    task = progress.add_task(title, total=3 * len(examples))
    found = _last(outcomes(pair, seed), progress, task)
    controls = _last(pair.measure_alone(examples), progress, task)
    alone = _last(pair.measure_layers(examples), progress, task)
    console.print(_table(f"{title}, {len(examples)} dialogues", found, controls))
    return Quality(layers_of(name, pair, alone), found, controls)


def _last(steps: Iterable[list[T]], progress: Progress, task: TaskID) -> list[T]:
    latest: list[T] = []
    for each in steps:
        latest = each
        progress.advance(task)
    return latest


def _table(title: str, found: Sequence[Outcome], controls: Sequence[Measured]) -> Table:
    own, *others = controls
    kinds = [*own.by_kind]
    table = Table(title=title)
    for column in ("", "faster", "nats a token", "agreement", *kinds, "kept, bytes a token", "sender pays"):
        table.add_column(column, justify="left" if not column else "right")
    _row(table, "recompute all, or its own exact cache", own, "1.0x")
    for each in chosen(found):
        faster = f"{1 / each.plan.flops:.1f}x" if each.plan.flops else "all"
        pays = f"{each.sender_pays:.0%}" if each.sender_pays else ""
        _row(table, each.name, each.measured, faster, f"{each.plan.input_bytes:,}", pays)
    for label, measured in zip(CONTROLS, others, strict=True):
        _row(table, f"control: {label}", measured, "")
    return table


def chosen(found: Sequence[Outcome]) -> Iterator[Outcome]:
    """What is worth a row, and for some costs the best set of layers and the best contiguous group."""
    for each in found:
        if each.name.startswith(SHOWN):
            yield each
        if each.name == "project all":
            yield each.written_twice()
    for budget in BUDGETS:
        for groups, label in ((False, "best set"), (True, "DroidSpeak's best group")):
            if some := best(found, budget, groups=groups):
                yield replace(some, name=f"{label} from {1 / budget:.1f}x on: {some.name}")


def _row(table: Table, name: str, measured: Measured, faster: str, *more: str) -> None:
    rights = [f"{right:.0%}" for right in measured.by_kind.values()]
    table.add_row(name, faster, f"{measured.kl:.4f}", f"{measured.agreement:.1%}", *rights, *more)


def _speed(ops: Ops, tokens: int, new: int, seed: int, progress: Progress, console: Console) -> list[object]:
    task, found = progress.add_task("first tokens of a 152 M hybrid", total=NUM_TIMINGS), list[Timing]()
    table = Table(
        title=f"first token, {tokens:,} tokens read by the base and {new} new, 152 M hybrid, processor seconds"
    )
    for column in ("", "computed", "shared", "faster", "layers"):
        table.add_column(column, justify="right" if column in ("computed", "shared", "faster") else "left")
    for each in timings(ops, tokens, new, seed):
        found.append(each)
        progress.advance(task)
        table.add_row(each.name, f"{each.whole_s:.3f}", f"{each.shared_s:.3f}", f"{each.ratio:.1f}x", each.layers)
    console.print(table)
    return [asdict(each) for each in found]


def _pipelines(agents: int, seed: int, progress: Progress, console: Console) -> dict[str, object]:
    load = pipeline.Load(agents, seed=seed)
    ways = pipeline.ways(few=agents > AGENTS[0], seed=seed)  # more agents take longer
    task = progress.add_task(f"{agents} agents on one context", total=len(ways))
    found = dict(pipeline.compare(load, ways, lambda: progress.advance(task)))
    limit = f"{pipeline.IN_TIME:.0%} of them within {load.slo:g} times what one takes alone"
    table = Table(title=f"{agents} agents on {load.num_context:,} tokens: pipelines a minute, {limit} (simulated)")
    for column in ("", "a minute", "more"):
        table.add_column(column, justify="left" if not column else "right")
    least = next(iter(found.values()))
    for name, rate in found.items():
        table.add_row(name, f"{60 * rate:.2f}", f"{rate / least:.2f}x")
    console.print(table)
    return {"agents": agents, "per second": found}
