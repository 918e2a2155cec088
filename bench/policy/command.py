"""`hybrid-cache bench policy`: which cache policy saves how much, at which size, and what would be possible at all.

Replays traces through the very objects that the server runs, over its tree and its byte accounting, on a simulated
clock and without tensors. Two more rows say what there is to win:

    bound      no policy saves more in that many bytes, not even one that knows the future
    infinite   everything is kept, whatever it takes

A trace's unique bytes, of which `--capacity 5%` is a share, are the KV bytes of all its distinct pages, answers
included, and one state for each distinct prompt.

The time to the first token is predicted as a constant plus the computed FLOPs at a constant rate. If not given, it
fits what Marconi's authors published of Jamba-1.5-Mini on four A100 (Pan et al. 2024, arXiv 2411.19379): 17.8 ms, and
0.0530 ms for each computed token. A model with half the FLOPs a token takes half as long for each.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hybrid_cache.bench.common.files import append, check_plot, target, write_whole
from hybrid_cache.bench.common.http_client import server_url
from hybrid_cache.bench.common.terminal import listed, progress_bar
from hybrid_cache.bench.fleet.command import DEFAULT_DELAY, DEFAULT_RATE, DEFAULT_ROUTERS, FleetOptions, router_names
from hybrid_cache.bench.fleet.command import compare as compare_fleets
from hybrid_cache.bench.policy.cells import ARTIFACT, Cell, Setting, Speed, all_attempted
from hybrid_cache.bench.policy.from_server import check_alone, fetched, told
from hybrid_cache.bench.policy.live import Asked, compare
from hybrid_cache.bench.policy.plot import plot_png
from hybrid_cache.bench.policy.report import conclusion, percent, reasons, table
from hybrid_cache.bench.policy.rows import (
    BELADY,
    HINDSIGHT,
    LIMITS,
    STATIC,
    AnyRow,
    Missing,
    PolicyRow,
    by_trace,
    row_json,
    rows_json,
    with_gaps,
)
from hybrid_cache.bench.traces.files import FIELDS, load_trace
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.bench.traces.workloads import WORKLOADS, make_workload
from hybrid_cache.cache.policies.foreign import is_foreign
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.registry import ALIASES, canonical_name, policy_names
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.models.tools.presets import PRESETS, model_shape
from hybrid_cache.sizes import format_bytes, parse_bytes

# Without arguments: small enough for a minute on one core, large enough that something has to go.
DEFAULT_SCALES = {"chat": 0.25, "agent": 0.15, "few-shot": 0.25}
DEFAULT_MODEL = "jamba-1.5-mini"
DEFAULT_CAPACITIES = "5%,10%,20%"
RECORDED_CAPACITIES = "0.25x,0.5x,1x,2x,4x"
ORDER = (
    *("none", "lru", "path-lru", "tail-lru", "vllm-block", "vllm-align", "vllm-fine", "sglang-radix", "sglang-unified"),
    *("marconi", STATIC, ARTIFACT, "seglen", "sae-like", "sparse-prefix", "gdsf", "flops-per-byte-two"),
    *("flops-per-byte", Learned.name),
)
# In the order in which they are shown: what came first, and the default last.
KNOWN = tuple(
    sorted(
        dict.fromkeys((*policy_names(), STATIC, ARTIFACT, HINDSIGHT, BELADY)),
        key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER),
    )
)
FORMER_NAMES = {**ALIASES, "ours-hindsight": HINDSIGHT}
ON_REQUEST = (STATIC, ARTIFACT, HINDSIGHT, BELADY)  # not run unless named: three need hindsight, one repeats errors
FILE_WIDTH = 100  # at least, where nobody can widen a window
LINE_EVERY_S = 10.0  # of progress, where nobody sees a bar
REFERENCE_MODEL, REFERENCE_SPEED = "jamba-1.5-mini", "17.8:53.0"


def policy(
    trace: Annotated[
        list[Path] | None, typer.Option(help="File or folder with a trace, gz and xz too; may be given several times.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Of the files, one of these, with their fields; guessed if left out. "
            + ". ".join(f"{name}: {fields}" for name, fields in FIELDS.items())
            + "."
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that a hash id of a mooncake file stands for; found from the data if left out."
        ),
    ] = None,
    sort: Annotated[bool, typer.Option("--sort", help="Put the requests of a file in order of time.")] = False,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Synthetic traffic: {', '.join(WORKLOADS)}; may be given several times. "
            f"Without any trace: {', '.join(DEFAULT_SCALES)}, shortened."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(PRESETS)}, or a config.json; may be given several times. {DEFAULT_MODEL} if left out."
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            help="Cache sizes, with commas: bytes such as 8GiB, or shares such as 5% of the trace's unique bytes, "
            "which are the KV bytes of all distinct pages and one state for each distinct prompt, or of what a server "
            f"recorded multiples of its budget such as 2x. {DEFAULT_CAPACITIES} if left out; {RECORDED_CAPACITIES} of "
            "what a server recorded."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"With commas, of {', '.join(KNOWN)}, or package.module:Class; "
            f"if left out, all but {' and '.join(ON_REQUEST)}."
        ),
    ] = None,
    with_bound: Annotated[
        bool, typer.Option("--bound/--no-bound", help="Add what is possible in those bytes, and without a limit.")
    ] = True,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests in progress at a time; each pins what it uses.")
    ] = 1,
    page_tokens: Annotated[
        int | None, typer.Option(min=TILE, help="Larger pages, to be faster; the trace's own if left out.")
    ] = None,
    sessions: Annotated[int | None, typer.Option(min=1, help="Take this many sessions of a file, at random.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Starts of sessions a second, for a file without such times.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="This many times the usual sessions of synthetic traffic.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many requests of each trace.")] = None,
    ttft: Annotated[
        str | None,
        typer.Option(
            metavar="BASE_MS:MS_PER_1K_TOKENS",
            help="Time to the first token, for nothing and for 1,000 computed tokens. If left out: "
            f"{REFERENCE_SPEED} as published for {REFERENCE_MODEL} on four A100, scaled to the model by FLOPs.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn at random.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the rows to this file; to FILE.jsonl, one a line as they come, without gaps."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw FLOPs saved by capacity to this PNG file.")] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Replay through so many caches behind a router, such as 1,4,16,64, and through one of their size; "
            "--capacity is then that of each. See docs/fleets.md."
        ),
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help=f"With commas, of {router_names()}. {','.join(DEFAULT_ROUTERS)} if left out."),
    ] = None,
    event_delay: Annotated[
        str | None, typer.Option(help=f"Until a router hears what a cache has. {DEFAULT_DELAY} if left out.")
    ] = None,
    failures: Annotated[
        str | None,
        typer.Option(
            help="Mean time between two failures of a replica, such as 10m, or 10m:30s with the time that it is away; "
            "or a list such as 120s@3,10m@0:30s. It comes back with what its disk has."
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="A disk below the memory of each cache: bytes or a share, as --capacity.")
    ] = None,
    shared_disk: Annotated[str | None, typer.Option(help="One disk for all caches.")] = None,
    disk_rate: Annotated[
        str | None, typer.Option(help=f"Bytes a second that are read from a disk. {DEFAULT_RATE} if left out.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Replay each trace so often, as other conversations.")
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send one trace to this server instead, and compare its hits with a replay, request by request; "
            "--model, --policy and --capacity are then those of the server.",
        ),
    ] = None,
    from_server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Replay what this server served of late, as its own policy and all others would have in its budget "
            "and in others: it runs with --record or --record-memory. See docs/record.md.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the API key for --live or --from-server; where a server has operator's keys, with one of "
            "these, else only what that key sent is replayed.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Replay traces through cache policies: what does each save, and what would be possible?

    hit %         prompt tokens that were not computed
    saved %       prefill FLOPs that were not computed
    plan %        beside the bound: saved by a plan that fits, made with knowledge of the future
    TTFT, p95     predicted time to the first token, median and 95th percentile
    KV, states    mean bytes of pages and of states
    admit, evict  states that came and went
    gap %         closed of the way to the bound, in FLOPs: from lru, and from the best of the other policies

    The number after marconi-static is its alpha, the best of 21 in hindsight.
    """
    try:
        json_file, plot = json_file and target(json_file), plot and target(plot)
        if plot is not None:
            check_plot(plot)
        fleets = FleetOptions(
            replicas, tuple(router or ()), event_delay, failures, disk, shared_disk, disk_rate, repeat
        )
        if fleets.given and (live is not None or from_server is not None):
            raise ConfigError("replicas and disk are for traces, leave out --live and --from-server")
        if from_server is not None:
            check_alone(live, trace, workload, format)
            traces = [fetched(server_url(from_server), api_key_file)]
        else:
            traces = []
        traces = traces or load_all(
            trace or [],
            workload or [],
            format=format,
            page_tokens=page_tokens,
            sessions=sessions,
            rate=rate,
            scale=scale,
            limit=limit,
            seed=seed,
            block_tokens=block_tokens,
            sort=sort,
        )
        if live is not None:
            if plot is not None:
                raise ConfigError("--live draws nothing, leave out --plot")
            asked = Asked(server_url(live), api_key_file, tuple(model or ()), policy, capacity, concurrency)
            compare(asked, traces, json_file)
            return
        options = option_text(
            {
                "format": format,
                "block-tokens": block_tokens,
                "sort": sort,
                "page-tokens": page_tokens,
                "sessions": sessions,
                "rate": rate,
                "scale": scale,
                "limit": limit,
                "seed": seed,
            }
        )
        names = chosen_policies(policy, with_bound)
        settings = [
            Setting.of(t, m, speed(ttft, m), concurrency=concurrency, seed=seed, options=options)
            for t in traces
            for m in models_of(t, model)
        ]
        if fleets.given:
            known = chosen_policies(policy or Learned.name, with_bound=False)
            if odd := [name for name in known if name in (*ON_REQUEST, *LIMITS)]:
                raise ConfigError(f"policy {odd[0]!r} knows one cache only, leave out --replicas and --disk")
            texts = listed("capacity", capacity or DEFAULT_CAPACITIES)
            compare_fleets(fleets, settings, held_bytes, texts, known, jobs, json_file, plot)
            return
        cells, missing = planned(settings, capacity and listed("capacity", capacity), names)
        stream = json_file is not None and json_file.suffix == ".jsonl"
        rows = watched(cells, jobs, streamed_to(json_file, missing) if json_file and stream else ignored)
        show([*rows, *missing], settings)
        for setting in settings:
            for line in told(setting, [row for row in rows if isinstance(row, PolicyRow)]):
                typer.echo(line)
        if json_file is not None and not stream:
            write_whole(json_file, rows_json([*rows, *missing]))
        if plot is not None:
            write_whole(plot, plot_png([row for row in rows if isinstance(row, PolicyRow)]))
    except HybridCacheError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def chosen_policies(text: str | None, with_bound: bool) -> tuple[str, ...]:
    """Raises ConfigError for an unknown name, or a policy from elsewhere that cannot be loaded."""
    known = (*KNOWN, *LIMITS)
    given = tuple(name for name in KNOWN if name not in ON_REQUEST) if text is None else listed("policy", text)
    names = tuple(FORMER_NAMES.get(name, name) for name in given)
    for name in names:
        if is_foreign(name) and name not in known:
            canonical_name(name)
        elif name not in known:
            raise ConfigError(f"unknown policy {name!r}, must be one of {', '.join(known)}, or package.module:Class")
    return tuple(dict.fromkeys((*names, *LIMITS) if with_bound else names))


def models_of(trace: Trace, given: Sequence[str] | None) -> list[ModelShape]:
    """Those that were asked for; else that of the server which recorded the trace, or the usual one."""
    if given or trace.server is None:
        return chosen_models(given or [DEFAULT_MODEL])
    return [trace.server.model]


def chosen_models(given: Sequence[str]) -> list[ModelShape]:
    shapes = [model_shape(name) for name in dict.fromkeys(given)]
    names = named_apart([shape.name for shape in shapes], list(dict.fromkeys(given)))
    return [replace(shape, name=name) for shape, name in zip(shapes, names, strict=True)]


def named_apart(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """The names, but what was given wherever a name occurs twice."""
    return [name if names.count(name) == 1 else long for name, long in zip(names, given, strict=True)]


def option_text(options: dict[str, object]) -> str:
    """The options that were given, as on a command line."""
    given = {f"--{name}": value for name, value in options.items() if value is not None and value is not False}
    return " ".join(name if value is True else f"{name} {value}" for name, value in given.items())


def planned(
    settings: Sequence[Setting], wanted: Sequence[str] | None, names: Sequence[str]
) -> tuple[list[Cell], list[Missing]]:
    """The cells, and what is said in place of those that hold nothing. Raises ConfigError if no cell is left."""
    cells: list[Cell] = []
    missing: list[Missing] = []
    for setting in settings:
        usual = DEFAULT_CAPACITIES if setting.trace.server is None else RECORDED_CAPACITIES
        texts = wanted or listed("capacity", usual)
        for num_bytes, text in sorted({capacity_bytes(text, setting): text for text in texts}.items()):
            if (error := too_small(text, num_bytes, setting)) is None:
                cells += [Cell(setting, name, num_bytes) for name in names]
            else:
                share = num_bytes / setting.unique_bytes
                missing.append(Missing(setting.trace.name, setting.model, "", num_bytes, share, error))
    if missing and not cells:
        raise ConfigError(missing[0].error)
    return cells, missing


def capacity_bytes(text: str, setting: Setting) -> int:
    """Bytes, a share of the trace's unique bytes, or a multiple of what its server had. Raises ConfigError."""
    if times := re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,4})?)x", text.strip(), re.ASCII):
        if setting.trace.server is None:
            raise ConfigError(f"capacity {text!r} is for what a server recorded, {setting.trace.name} says no budget")
        return int(setting.trace.server.budget_bytes * float(times[1]))
    if text.endswith("%"):
        share = re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,9})?", text[:-1].strip(), re.ASCII)
        if share is None or float(share[0]) == 0:
            raise ConfigError(f"capacity {text!r} is not a share above 0 %, wanted one such as 5% or 0.5%")
        return int(setting.unique_bytes * float(share[0]) / 100)
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"capacity {error}; or a share such as 5%") from error


def held_bytes(text: str, setting: Setting) -> int:
    """As `capacity_bytes`. Raises ConfigError also for one that holds no page with its state."""
    num_bytes = capacity_bytes(text, setting)
    if (error := too_small(text, num_bytes, setting)) is not None:
        raise ConfigError(error)
    return num_bytes


def too_small(text: str, num_bytes: int, setting: Setting) -> str | None:
    """What is wrong with a capacity that holds no page with its state."""
    least = setting.page_bytes + setting.slot_bytes
    if num_bytes >= least:
        return None
    take = f"one checkpoint and one page of {setting.model} take {least}"
    return f"capacity {text} of {setting.trace.name} is {num_bytes} bytes; {take}"


def speed(text: str | None, model: ModelShape) -> Speed:
    """From `BASE_MS:MS_PER_1K_TOKENS` of this model, or from the published fit of REFERENCE_MODEL.

    Raises ConfigError.
    """
    measured = model if text is not None else model_shape(REFERENCE_MODEL)
    match = re.fullmatch(r"([0-9.]+):([0-9.]+)", (text or REFERENCE_SPEED).strip(), re.ASCII)
    try:
        base_ms, ms_per_1k = map(float, match.groups()) if match else (0.0, 0.0)
    except ValueError:
        ms_per_1k = 0.0
    if ms_per_1k <= 0:
        raise ConfigError(f"ttft {text!r}: wanted BASE_MS:MS_PER_1K_TOKENS such as 17.8:53, the second above 0")
    return Speed(base_ms / 1e3, measured.prefill_cost.per_token * 1e6 / ms_per_1k)


def load_all(
    paths: Sequence[Path],
    workloads: Sequence[str],
    *,
    format: str | None,
    page_tokens: int | None,
    sessions: int | None,
    rate: float | None,
    scale: float | None,
    limit: int | None,
    seed: int,
    block_tokens: int | None = None,
    sort: bool = False,
) -> list[Trace]:
    """The traces of files and then of workloads; the usual ones if there are neither. Raises ConfigError."""
    if not paths and (sort or any(option is not None for option in (format, sessions, rate, block_tokens))):
        raise ConfigError("format, block-tokens, sort, sessions and rate are for files, name one with --trace")
    if paths and not workloads and scale is not None:
        raise ConfigError("scale is for made-up traffic, name some with --workload")
    paths = list(dict.fromkeys(paths))
    traces = [
        load_trace(
            path,
            format,
            page_tokens=page_tokens,
            sessions=sessions,
            seed=seed,
            rate=rate,
            block_tokens=block_tokens,
            sort=sort,
        )
        for path in paths
    ]
    usual = dict.fromkeys(workloads, 1.0) if paths or workloads else DEFAULT_SCALES
    for name, share in usual.items():
        factor = share if scale is None else share * scale
        traces.append(make_workload(name, seed=seed, scale=factor, page_tokens=page_tokens or TILE))
    names = named_apart([trace.name for trace in traces], [*map(str, paths), *usual])
    traces = [replace(t, name=name, requests=t.requests[:limit]) for t, name in zip(traces, names, strict=True)]
    for trace in traces:
        if not trace.num_prompt_tokens:
            raise ConfigError(f"{trace.name}: its prompts have no tokens")
    return traces


def watched(cells: Sequence[Cell], jobs: int, take: Callable[[AnyRow], None]) -> list[AnyRow]:
    """The rows of all cells in order, with progress on the error stream; each is taken as it comes."""
    rows: dict[int, AnyRow] = {}
    with progress_bar() as progress:
        task = progress.add_task("replay", total=len(cells))
        start = told = time.monotonic()
        for i, row in all_attempted(cells, jobs):
            rows[i] = row
            take(row)
            progress.update(task, description=f"{row.trace}, {row.policy}", advance=1)
            now = time.monotonic()
            if not progress.console.is_terminal and now - told >= LINE_EVERY_S:
                told = now
                typer.echo(f"{len(rows)} of {len(cells)} cells, {now - start:.0f} s; {in_brief(row)}", err=True)
    measured = [row for _, row in sorted(rows.items()) if isinstance(row, PolicyRow)]
    gaps = iter(with_gaps(measured))
    return [next(gaps) if isinstance(row, PolicyRow) else row for _, row in sorted(rows.items())]


def in_brief(row: AnyRow) -> str:
    saved = percent(row.flops_saved) if isinstance(row, PolicyRow) else "-"
    return f"{row.trace} on {row.model}, {row.policy}, {100 * row.capacity_share:.3g} %: {saved}"


def ignored(row: AnyRow) -> None:
    pass


def streamed_to(file: Path, first: Sequence[AnyRow]) -> Callable[[AnyRow], None]:
    """Starts a file of lines, and returns what adds one."""
    write_whole(file, b"".join(map(row_json, first)))
    return lambda row: append(file, row_json(row))


def show(rows: Sequence[AnyRow], settings: Sequence[Setting]) -> None:
    """Tables, then a sentence for each trace and model."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, FILE_WIDTH))
    for setting in settings:
        trace = setting.trace
        here = [row for row in rows if (row.trace, row.model) == (trace.name, setting.model)]
        title = f"{trace.name} on {setting.model}: {len(trace.requests):,} requests, "
        here.sort(key=lambda row: row.capacity_bytes)
        console.print(table(here, f"{title}{format_bytes(setting.unique_bytes)} unique"))
        for reason in reasons(here):
            console.print(reason, highlight=False, soft_wrap=True)
        if trace.name not in WORKLOADS and trace.note:
            console.print(trace.note, style="dim")
    for group in by_trace(row for row in rows if isinstance(row, PolicyRow)):
        console.print(conclusion(group), highlight=False)
