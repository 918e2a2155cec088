"""`hybrid-cache bench exactness`: the promise that cache on and cache off give the same bits, counted.

A busy engine gets, at random, everything that a server does: requests that share, branch, repeat and grow, exact ones
and approximate ones over the same messages, references to earlier answers, all ways to choose tokens, all cache modes,
tenants, requests aborted at any point, finished turns computed again and interrupted, budgets so small that things are
evicted and sequences preempted, several policies. All that the cache publishes is digested, and compared at every use.

A plain engine then answers the same requests one by one, without any batching or reuse. Every row of logits that the
busy engine computed for a request that is not labelled approximate must have the same bits as the plain run's row for
the same tokens, and every answer the same tokens, log-probabilities and finish reason.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from hybrid_cache.bench.exactness.http.compare import compare_http
from hybrid_cache.bench.exactness.http.report import HttpReport, table
from hybrid_cache.bench.exactness.models import Subject, by_name, folders, named, sharing, shipped, small, wide
from hybrid_cache.bench.exactness.report import Report, mixture, results, shared, verdicts
from hybrid_cache.bench.exactness.run import compare
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select


def exactness(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folders, or names in the report; the embedded model and small random ones by default."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Logits rows to compare for each model and dtype.")] = 20_000,
    dtype: Annotated[
        str, typer.Option(help="Comma-separated: float32, bfloat16; int8 or int4 for such weights.")
    ] = "float32,bfloat16",
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of the model; 0 keeps torch's choice.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    widths: Annotated[
        bool, typer.Option("--widths", help="Add real widths, with prompts of up to 16K tokens.")
    ] = False,
    bands: Annotated[
        bool, typer.Option("--bands", help="Add models of equal lower layers, which read the same conversations.")
    ] = False,
    http: Annotated[int, typer.Option(help="Also send this many requests to two servers, for each model folder.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the reports to this file.")] = None,
) -> None:
    """Counts the bits in which cache on and cache off differ. Exit code 1 if there are any, or too little was tried."""
    if threads:
        torch.set_num_threads(threads)
    console, options = Console(), "" if backend == "auto" else f" --backend {backend}"
    try:
        subjects = [named(name) for name in models or ()] or [*shipped(), *small()]
        subjects += [*(wide() if widths else ()), *(sharing() if bands else ())]
        with Progress(console=Console(stderr=True)) as progress:
            reports = [_compare(s, name, backend, rows, seed, progress) for s in subjects for name in dtype.split(",")]
            over_http = _over_http(folders(models or []), http, seed, dtype, backend, progress) if http else []
    except HybridCacheError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(results(reports), shared(reports), mixture(reports))
    for report in over_http:
        console.print(table(report))
    for line in verdicts(reports, options):
        console.print(line, markup=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps([report.as_json() for report in reports], indent=2))
    held = all(r.exact and not r.untried for r in reports) and all(r.exact for r in over_http)
    raise typer.Exit(0 if held else 1)


def _compare(subject: Subject, dtype: str, backend: str, rows: int, seed: int, progress: Progress) -> Report:
    ops = select(backend)
    model, *variants = subject.load(dtype, ops)
    report = Report(subject.name, dtype, seed)
    return compare(model, report, rows, progress, phase=subject.phase, variants=by_name(variants))


def _over_http(
    models: Sequence[str], num_requests: int, seed: int, dtype: str, backend: str, progress: Progress
) -> list[HttpReport]:
    """The same over HTTP, for each model folder; for the embedded model where none is named."""
    wanted: list[str | None] = [*models] or [None]
    return [
        compare_http(model, num_requests, seed, dtype=name, backend=backend, budget=None, progress=progress)
        for model in wanted
        for name in dtype.split(",")
    ]
