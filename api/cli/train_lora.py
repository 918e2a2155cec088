"""`hybrid-cache train-lora`: training with a progress bar, then a table of what it changed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_cache.models import loading
from hybrid_cache.models.training import composed, lora
from hybrid_cache.models.training.dialogues import KINDS

FIRST_SEED = 601
RECENT = 0.98  # how much of the shown loss is older


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
    folder = loading.embedded_path() if model is None else loading.resolve(model)
    _train(folder, out, settings, resume, every)
    scores = {}
    if num_seeds:
        seeds = range(FIRST_SEED, FIRST_SEED + num_seeds)
        with Console(stderr=True).status("evaluating before and after"):
            before, after = lora.evaluate(folder, out, settings, seeds, each)
        scores = {"before": before, "after": after}
        _print(before, after)
    lora.report(out, settings, scores)


def _train(folder: Path, out: Path, settings: lora.Settings, resume: bool, every: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loss", total=settings.steps)
        shown: list[float] = []

        def on_step(step: int, loss: float) -> None:
            shown[:] = [loss if not shown else RECENT * shown[0] + (1 - RECENT) * loss]
            progress.update(task, completed=step, description=f"loss {shown[0]:.4f}")

        lora.train(folder, out, settings, resume=resume, every=every, on_step=on_step)


def _print(before: Sequence[composed.Score], after: Sequence[composed.Score]) -> None:
    """A line for each way of reuse, to the standard output."""
    old, new = composed.means(before), composed.means(after)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title="percent right, before > after")
    for name in ("order", "encoded", *KINDS):
        table.add_column(name, no_wrap=True, justify="right" if name in KINDS else "left")
    for anew, reuse in dict.fromkeys((s.anew, s.reuse) for s in after):
        cells = (f"{old[anew, reuse, kind]:.1f} > {new[anew, reuse, kind]:.1f}" for kind in KINDS)
        table.add_row("new" if anew else "as told", reuse.name, *cells)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
