"""`hybrid-cache train-lora`: training with a progress bar, then a table of what it changed."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_cache.api.cli.variant_profile import bars
from hybrid_cache.models import folders
from hybrid_cache.models.training import composed, lora, reading, repaired
from hybrid_cache.models.training.dialogues import KINDS

FIRST_SEED = 601
RECENT = 0.98  # how much of the shown loss is older
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def run(
    model: str | None,
    out: Path,
    settings: lora.Settings,
    *,
    resume: bool,
    every: int,
    num_seeds: int,
    each: int,
    threads: int,
) -> None:
    """Trains, evaluates and prints. Raises HybridCacheError."""
    if threads:
        torch.set_num_threads(threads)
    folder = folders.resolve(model)
    _train(folder, out, settings, resume, every)
    seeds = range(FIRST_SEED, FIRST_SEED + num_seeds)
    scores = {}
    if num_seeds and settings.reads is not None:
        lines = _compare(model or "embedded", out, settings, seeds, each)
        scores = {"compared": [asdict(line) for line in lines]}
    elif num_seeds:
        with Console(stderr=True).status("evaluating before and after"):
            before, after = lora.evaluate(folder, out, settings, seeds, each)
        scores = {"before": [asdict(score) for score in before], "after": [asdict(score) for score in after]}
        _print(before, after)
    lora.report(out, settings, scores)


def _train(folder: Path, out: Path, settings: lora.Settings, resume: bool, every: int) -> None:
    lessons = partial(reading.shared_entries, folder) if settings.reads is not None else lora.stored_messages
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task("loss", total=settings.steps)
        shown: list[float] = []

        def on_step(step: int, loss: float) -> None:
            shown[:] = [loss if not shown else RECENT * shown[0] + (1 - RECENT) * loss]
            progress.update(task, completed=step, description=f"loss {shown[0]:.4f}")

        lora.train(folder, out, settings, lessons=lessons, resume=resume, every=every, on_step=on_step)


def _print(before: Sequence[composed.Score], after: Sequence[composed.Score]) -> None:
    """A line for each way of reuse, to the standard output."""
    old, new = composed.means(before), composed.means(after)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title="percent right, before > after")
    for name in ("order", "encoded", *KINDS):
        table.add_column(name, no_wrap=True, justify="right" if name in KINDS else "left")
    for anew, reuse in dict.fromkeys((s.anew, s.reuse) for s in after):
        cells = (f"{old[anew, reuse, kind]:.1f} > {new[anew, reuse, kind]:.1f}" for kind in KINDS)
        table.add_row("new" if anew else "as told", reuse.name, *cells)
    _show(table, 120)


def _compare(
    model: str, out: Path, settings: lora.Settings, seeds: Sequence[int], each: int
) -> tuple[repaired.Line, ...]:
    """Measures what the adapter does to reading the sender, prints it and writes the profile that `serve` reads."""
    trio = repaired.Trio.load(model, out, settings)
    transfer = reading.transfer_for(settings, len(trio.sender.model.layers))
    examples = repaired.examples_of(seeds, each)
    with bars() as report:
        found = trio.compare(transfer, examples, report)
    path = trio.save_profile(found.plan, f"{len(examples)} dialogues, seeds {seeds[0]} to {seeds[-1]}")
    _print_lines(found.lines)
    Console(stderr=True).print(f"written to {path}", soft_wrap=True, highlight=False)
    return found.lines


def _print_lines(lines: Sequence[repaired.Line]) -> None:
    """A line for each comparison, to the standard output."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("model", "reads", "against, alone", "nats a token", "agreement", *(f"{kind} right" for kind in KINDS)):
        table.add_column(name, justify="left" if name in ("model", "reads", "against, alone") else "right")
    for line in lines:
        measured = line.measured
        right = (f"{measured.by_kind[kind]:.1%}" for kind in KINDS)
        table.add_row(line.model, line.reads, line.alone, f"{measured.kl:.5f}", f"{measured.agreement:.2%}", *right)
    _show(table, 150)


def _show(table: Table, width: int) -> None:
    """width: where the output is no terminal, in characters"""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = width
    console.print(table)
