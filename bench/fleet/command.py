"""`hybrid-cache bench policy --replicas` and `--disk`: several caches behind a router, and disks below them."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from hybrid_cache.bench.common.files import append, write_whole
from hybrid_cache.bench.common.terminal import listed, progress_bar
from hybrid_cache.bench.fleet import failures as failing
from hybrid_cache.bench.fleet.cells import FleetCell, all_attempted
from hybrid_cache.bench.fleet.paper_disk import DiskSpeed
from hybrid_cache.bench.fleet.plot import plot_png
from hybrid_cache.bench.fleet.report import conclusions, table
from hybrid_cache.bench.fleet.routers import ROUTERS, router_class
from hybrid_cache.bench.fleet.rows import (
    MEMORY,
    ONE,
    AnyFleetRow,
    FleetRow,
    Unmeasured,
    fleet_json,
    fleet_line,
    with_references,
)
from hybrid_cache.bench.policy.cells import Setting
from hybrid_cache.errors import ConfigError
from hybrid_cache.sizes import parse_bytes

DEFAULT_ROUTERS = ("random", "affinity", "usable-prefix")
DEFAULT_DELAY, DEFAULT_RATE = "100ms", "3GB"
MOST_REPLICAS = 1024
LEAST_DISK = 4 << 20  # holds the index and something
FILE_WIDTH = 120  # at least, where nobody can widen a window
Sizes = Callable[[str, Setting], int]  # bytes of a text such as 5% or 8GiB; raises ConfigError


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """As they were given."""

    replicas: str | None
    router: tuple[str, ...]
    event_delay: str | None
    failures: str | None
    disk: str | None
    shared_disk: str | None
    disk_rate: str | None
    repeat: int | None

    @property
    def given(self) -> bool:
        """Whether this is about fleets or disks. Raises ConfigError for options that say nothing without these."""
        if self.replicas or self.disk or self.shared_disk:
            return True
        if self.router or self.event_delay or self.failures or self.disk_rate or self.repeat:
            raise ConfigError("router, event-delay, failures, disk-rate and repeat are for --replicas or --disk")
        return False


@dataclass(frozen=True, slots=True)
class Chosen:
    """The same, understood."""

    replicas: tuple[int, ...]
    routers: tuple[str, ...]
    event_delay_s: float
    failures: str
    disk: str
    shared: bool
    disk_speed: DiskSpeed
    repeat: int

    @staticmethod
    def of(o: FleetOptions) -> "Chosen":
        """Raises ConfigError."""
        if o.disk and o.shared_disk:
            raise ConfigError("disk is one for each replica and shared-disk one for all, give one of them")
        if o.disk_rate and not (o.disk or o.shared_disk):
            raise ConfigError("disk-rate is for --disk or --shared-disk")
        replicas = tuple(_number(each) for each in listed("replicas", o.replicas or "1"))
        failing.check(o.failures or "", replicas)
        names = listed("router", ",".join(o.router)) if o.router else DEFAULT_ROUTERS
        for name in names:
            router_class(name)
        delay_s = failing.seconds("event-delay", o.event_delay or DEFAULT_DELAY)
        rate = _rate(o.disk_rate or DEFAULT_RATE)
        return Chosen(
            tuple(sorted(replicas)),
            names,
            delay_s,
            o.failures or "",
            o.shared_disk or o.disk or "",
            bool(o.shared_disk),
            DiskSpeed(rate),
            o.repeat or 1,
        )


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= MOST_REPLICAS:
        raise ConfigError(f"replicas {text!r}: wanted numbers from 1 to {MOST_REPLICAS} such as 1,4,16,64")
    return int(text)


def _rate(text: str) -> float:
    try:
        return float(parse_bytes(text.strip().removesuffix("/s")))
    except ConfigError as error:
        raise ConfigError(f"disk-rate {error}, a second") from error


def compare(
    o: FleetOptions,
    settings: Sequence[Setting],
    sizes: Sizes,
    capacities: Sequence[str],
    policies: Sequence[str],
    jobs: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Replays all fleets and shows what came of them. Raises ConfigError."""
    chosen = Chosen.of(o)
    for setting in settings:
        if setting.trace.server is not None:
            raise ConfigError(f"{setting.trace.name} is what one server recorded, replicas and disk are for others")
    cells = [cell for s in settings for cell in cells_of(s, chosen, sizes, capacities, policies)]
    stream = json_file is not None and json_file.suffix == ".jsonl"
    if json_file is not None and stream:
        write_whole(json_file, b"")
    rows = watched(cells, jobs, json_file if stream else None)
    missing = [row for row in rows if isinstance(row, Unmeasured)]
    found = with_references([row for row in rows if isinstance(row, FleetRow)])
    show(found, missing)
    if json_file is not None and not stream:
        write_whole(json_file, fleet_json([*found, *missing]))
    if plot is not None:
        write_whole(plot, plot_png(found))


def cells_of(
    s: Setting, chosen: Chosen, sizes: Sizes, capacities: Sequence[str], policies: Sequence[str]
) -> list[FleetCell]:
    """All of one trace, the references first. Raises ConfigError for what holds nothing."""
    disk_bytes = sizes(chosen.disk, s) if chosen.disk else 0
    if chosen.disk and disk_bytes < LEAST_DISK:
        raise ConfigError(f"disk {chosen.disk} of {s.trace.name} is {disk_bytes} bytes, at least {LEAST_DISK}")
    cells = list[FleetCell]()
    for policy in policies:
        for capacity_bytes in sorted({sizes(text, s) for text in capacities}):
            for number in chosen.replicas:
                names = [*([MEMORY] if disk_bytes else []), ONE, *(chosen.routers if number > 1 else ())]
                for name in names:
                    for failures in dict.fromkeys(("", chosen.failures) if name not in (ONE, MEMORY) else ("",)):
                        disk = disk_bytes, chosen.shared, chosen.disk_speed
                        place = s, policy, name, number, capacity_bytes
                        cells.append(FleetCell(*place, chosen.event_delay_s, failures, *disk, chosen.repeat))
    return cells


def watched(cells: Sequence[FleetCell], jobs: int, stream: Path | None) -> list[AnyFleetRow]:
    """The rows of all cells in order, with progress on the error stream."""
    rows: dict[int, AnyFleetRow] = {}
    began_s = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("replay", total=len(cells))
        for i, row in all_attempted(cells, jobs):
            rows[i] = row
            if stream is not None:
                append(stream, fleet_line(row))
            progress.update(task, description=f"{row.trace}, {row.num_replicas} x {row.router}", advance=1)
            if not progress.console.is_terminal:
                typer.echo(f"{len(rows)} of {len(cells)} fleets, {time.monotonic() - began_s:.0f} s", err=True)
    return [row for _, row in sorted(rows.items())]


def show(rows: Sequence[FleetRow], missing: Sequence[Unmeasured]) -> None:
    """A table for each trace, model, policy and budget, a sentence for each size, and what there is not."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, FILE_WIDTH))
    groups: dict[tuple[str, str, str, int], list[FleetRow]] = {}
    for row in rows:
        groups.setdefault((row.trace, row.model, row.policy, row.capacity_bytes), []).append(row)
    for group in groups.values():
        console.print(table(group))
        for line in conclusions(group):
            console.print(line, highlight=False, soft_wrap=True)
        if group[0].note:
            console.print(group[0].note, style="dim")
    for error in dict.fromkeys(row.error for row in missing):
        console.print(error, highlight=False, soft_wrap=True)


def router_names() -> str:
    return f"{', '.join(ROUTERS)}, or package.module:Class"
