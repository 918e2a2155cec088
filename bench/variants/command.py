"""`hybrid-cache bench variants`: models that share a base, what sharing loses, what it saves, and what it serves."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from hybrid_cache.bench.variants import pipeline
from hybrid_cache.bench.variants.quality import BUDGETS, Outcome, best, outcomes
from hybrid_cache.bench.variants.speed import Timing, timings
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models import loading
from hybrid_cache.models.tools.pairs import Pair
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.transfer import Transfer, projected, upper

PAIRS = ("embedded:embedded+embedded-choreo", "embedded+embedded-choreo:embedded")
AGENTS = (3, 8)
LAYERS = 20
FEW_WAYS = ("exact caches, each its own", "project states", "take all")


def variants(
    pair: Annotated[
        list[str] | None, typer.Option(help="SENDER:RECEIVER, each `DIR`, `embedded`, and + an adapter.")
    ] = None,
    examples: Annotated[int, typer.Option(min=4, help="Dialogues a pair; 1,200 tell one point apart.")] = 60,
    tokens: Annotated[int, typer.Option(min=64, help="Of the prefix that is timed.")] = 2048,
    new: Annotated[int, typer.Option(min=4, help="Tokens after it.")] = 24,
    seed: Annotated[int, typer.Option(help="Of dialogues, prompts and arrivals.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the models.")] = 1,
    quality: Annotated[bool, typer.Option(help="Measure what answers lose.")] = True,
    speed: Annotated[bool, typer.Option(help="Time the first token on a 152 M hybrid.")] = True,
    pipelines: Annotated[bool, typer.Option(help="Simulate agents that read one context.")] = True,
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
                found["quality"] = [_quality(name, ops, examples, seed, progress, console) for name in pair or PAIRS]
            if speed:
                found["speed"] = _speed(ops, tokens, new, seed, progress, console)
            if pipelines:
                found["pipelines"] = [_pipelines(agents, seed, progress, console) for agents in AGENTS]
    except HybridCacheError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json is not None:
        as_json.write_text(json.dumps(found, indent=2, default=str) + "\n")


def _quality(name: str, ops: Ops, num: int, seed: int, progress: Progress, console: Console) -> dict[str, object]:
    sender, _, receiver = name.partition(":")
    one, other = (loading.load_named(each, ops=ops).model for each in (sender, receiver))
    pair = Pair(one, other, [*dialogues(loading.embedded_path(), num, seed)])
    task, found = progress.add_task(f"{sender} to {receiver}", total=len(pair.examples)), list[Outcome]()
    for latest in outcomes(pair, seed):
        found = latest
        progress.advance(task)
    controls = [*pair.measure_without_states(range(len(pair.examples)))][-1][0]
    table = Table(title=f"{sender} to {receiver}, {len(pair.examples)} dialogues")
    kinds = [*found[0].measured.by_kind]
    for column in ("", "faster", "nats a token", "agreement", *kinds, "kept, bytes a token"):
        table.add_column(column, justify="left" if not column else "right")
    shown = [
        each for each in found if not each.name.startswith(("project ", "recompute ")) or each.name == "project all"
    ]
    shown += [each for each in found if each.name in ("project states", "project attention")]
    for budget in BUDGETS:
        for groups, label in ((False, "best set"), (True, "best group")):
            if chosen := best(found, budget, groups=groups):
                shown.append(Outcome(f"{label} from {1 / budget:.1f}x on: {chosen.name}", chosen.plan, chosen.measured))
    for each in shown:
        _row(table, each, kinds)
    by_kind = [f"{controls.by_kind[kind]:.0%}" for kind in kinds]
    table.add_row("control: states zeroed", "", f"{controls.kl:.4f}", f"{controls.agreement:.1%}", *by_kind, "")
    console.print(table)
    rows = [
        {"name": e.name, "transfer": str(e.plan.transfer), **asdict(e.measured), "flops": e.plan.flops} for e in found
    ]
    return {"sender": sender, "receiver": receiver, "contenders": rows, "states zeroed": asdict(controls)}


def _row(table: Table, each: Outcome, kinds: Sequence[str]) -> None:
    plan, measured = each.plan, each.measured
    faster = f"{1 / plan.flops:.1f}x" if plan.flops else "all"
    rights = [f"{measured.by_kind[kind]:.0%}" for kind in kinds]
    table.add_row(each.name, faster, f"{plan.loss:.4f}", f"{plan.agreement:.1%}", *rights, f"{plan.input_bytes:,}")


def _speed(ops: Ops, tokens: int, new: int, seed: int, progress: Progress, console: Console) -> list[object]:
    task, found = progress.add_task("first tokens of a 152 M hybrid", total=8), list[Timing]()
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
    states = [index for index in range(LAYERS) if index not in (5, 11, 17)]
    ways: tuple[tuple[str, Transfer | None, int | None], ...] = (
        ("exact caches, each its own", None, None),
        ("exact bands, other weights in the top half", None, LAYERS // 2),
        ("project all", projected(LAYERS, range(LAYERS)), None),
        ("project states", projected(LAYERS, states), None),
        ("project one layer", projected(LAYERS, [6]), None),
        ("take all", upper(LAYERS, LAYERS), None),
    )
    if agents > AGENTS[0]:  # the longest part: fewer of them
        ways = tuple(way for way in ways if way[0] in FEW_WAYS)
    load = pipeline.Load(agents, seed=seed)
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
