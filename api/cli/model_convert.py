"""`hybrid-cache model convert`: `models/tools/convert.py` with a progress bar and a table of what it did."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_cache.models.tools import convert
from hybrid_cache.sizes import format_bytes

WIDTH = 120  # characters, where no terminal says how many it has


@dataclass(slots=True)
class Kind:
    """Weights of one name in all layers, and of all experts."""

    stored: str
    number: int = 0
    num_bytes: int = 0
    new_bytes: int = 0
    error: float = 0.0  # the largest of them


def run(source: Path, out: Path, *, dtype: str | None, quantize: str | None, shard_bytes: int) -> None:
    """Makes the folder `out`. Raises HybridCacheError, and then there is no `out`."""
    conversion = convert.prepare(source, dtype=dtype, quantize=quantize)
    kinds: dict[str, Kind] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"writing {out.name}", total=conversion.num_bytes)

        def done(change: convert.Change, error: float) -> None:
            _count(kinds, change, error)
            progress.advance(task, change.num_bytes)

        num_shards = convert.write(conversion, out, shard_bytes=shard_bytes, done=done)
    _print(conversion, kinds, out, num_shards)


def _count(kinds: dict[str, Kind], change: convert.Change, error: float) -> None:
    name = re.sub(r"\.\d+(?=\.|$)", ".*", change.name)
    kind = kinds.setdefault(name, Kind(_stored_as(change)))
    kind.number += 1
    kind.num_bytes += change.num_bytes
    kind.new_bytes += change.new_bytes
    kind.error = max(kind.error, error)


def _stored_as(change: convert.Change) -> str:
    return f"int{change.stored.bits}" if change.stored else _name(change.parts[0].dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(conversion: convert.Conversion, kinds: dict[str, Kind], out: Path, num_shards: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("weights", overflow="fold")
    table.add_column("stored as", no_wrap=True)
    for title in ("number", "before", "after", "largest error"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, kind in kinds.items():
        sizes = (format_bytes(kind.num_bytes), format_bytes(kind.new_bytes))
        table.add_row(name, kind.stored, str(kind.number), *sizes, f"{kind.error:.2%}" if kind.error else "-")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
    files = "1 file" if num_shards == 1 else f"{num_shards} files"
    before, after = format_bytes(conversion.num_bytes), format_bytes(conversion.new_bytes)
    console.print(f"{out}: {before} are now {after} in {files}; errors are norms of changes by norms of weights")
    if conversion.left_out:
        names = ", ".join(conversion.left_out[:3]) + (" ..." if len(conversion.left_out) > 3 else "")
        console.print(
            f"left out, because the text model does not use them: {len(conversion.left_out)} weights, {names}"
        )
