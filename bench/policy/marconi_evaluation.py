"""`hybrid-cache bench published`: do the orders and shapes of Marconi's evaluation come out of our replay?

Pan et al. 2024 (arXiv 2411.19379) compare a state for every block of 32 tokens (vLLM+), states at branch points and
ends under LRU (SGLang+) and Marconi, on agent trajectories with collapsing observations. Theirs are recorded and not
public; here they are made up by the same rules, so what can be compared is order and shape:

    contention   by cache size: the gain over SGLang+ is largest between too small and large enough
    layers       by share of attention layers: the gain grows with that of state-space layers
    state        by size of a state: the larger, the worse for one in every block
    arrivals     by sessions a second

The model's costs and bytes are those of the paper's formulas. It has 100 sessions in 60 to 140 GB; the made-up ones are
30 and need less, so that a fifth of its sizes makes them as tight. Their instructions are short: long ones that all
sessions share are kept by any policy, and hide the rest. Pages here are of 64 tokens, so blocks of 32 are stood in for
by pages whose states take twice the bytes.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hybrid_cache.bench.common.files import target, write_whole
from hybrid_cache.bench.common.terminal import listed
from hybrid_cache.bench.policy.cells import Cell, Setting, Speed, replayed
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.bench.traces.workloads import Agent, Uniform
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.marconi import ALPHAS, Marconi
from hybrid_cache.cache.policies.registry import ALIASES, make_policy
from hybrid_cache.cache.policies.vllm_block import VLLMBlock
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.tools.presets import nvidia_hybrid_as_published

GB = 10**9
SESSIONS = 30  # for which the cache sizes are
INSTRUCTIONS = 150  # tokens that all sessions begin with
VLLM, SGLANG, MARCONI, STATIC = "vllm-block", "sglang-radix", "marconi", "marconi-static"
POLICIES = VLLM, SGLANG, MARCONI, STATIC, Learned.name


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a sweep, and what the paper says of it: token hit rates in percent."""

    sweep: str
    at: str
    published: Mapping[str, float] = field(default_factory=dict, hash=False)
    capacity_gb: int = 18  # for SESSIONS
    rate: float = 5.0  # sessions a second
    tool_s: float = 10.0
    num_mamba: int = 24
    num_attention: int = 4
    d_state: int = 128


def hit_rates(marconi: float, sglang: float, vllm: float | None = None) -> dict[str, float]:
    return {MARCONI: marconi, SGLANG: sglang} | ({} if vllm is None else {VLLM: vllm})


POINTS = (
    Point("contention", "3 GB", capacity_gb=3),
    Point("contention", "6 GB", capacity_gb=6),
    Point("contention", "12 GB", hit_rates(9.59, 7.72), 12),
    Point("contention", "15 GB", hit_rates(22.74, 15.01), 15),
    Point("contention", "18 GB", hit_rates(43.03, 25.57), 18),
    Point("contention", "21 GB", hit_rates(47.92, 36.90), 21),
    Point("contention", "24 GB", hit_rates(48.21, 43.89), 24),
    Point("contention", "36 GB", capacity_gb=36),
    Point("layers", "32 Mamba, 4 attention", hit_rates(18.06, 11.31, 5.0), num_mamba=32, num_attention=4),
    Point("layers", "30 Mamba, 5 attention", hit_rates(12.3, 8.51, 5.0), num_mamba=30, num_attention=5),
    Point("layers", "28 Mamba, 7 attention", hit_rates(8.35, 6.62, 5.0), num_mamba=28, num_attention=7),
    Point("layers", "24 Mamba, 12 attention", hit_rates(5.69, 5.38, 5.0), num_mamba=24, num_attention=12),
    Point("layers", "no Mamba, 36 attention", hit_rates(5.05, 5.04, 5.0), num_mamba=0, num_attention=36),
    Point("state", "128 a channel", hit_rates(31.55, 16.39, 0.89), d_state=128),
    Point("state", "64 a channel", hit_rates(29.88, 17.39, 1.5), d_state=64),
    Point("state", "32 a channel", hit_rates(30.19, 18.00, 3.14), d_state=32),
    Point("state", "16 a channel", hit_rates(29.36, 18.37, 5.17), d_state=16),
    Point("arrivals", "0.5 sessions/s", hit_rates(48.70, 35.18), rate=0.5, tool_s=7.5),
    Point("arrivals", "1 session/s", hit_rates(44.92, 29.27), rate=1.0, tool_s=7.5),
    Point("arrivals", "2 sessions/s", hit_rates(43.02, 26.36), rate=2.0, tool_s=7.5),
)
SWEEPS = tuple(dict.fromkeys(point.sweep for point in POINTS))


def published(
    sweep: Annotated[str | None, typer.Option(help=f"With commas, of {', '.join(SWEEPS)}; all if left out.")] = None,
    policy: Annotated[str, typer.Option(help=f"With commas, of {', '.join(POLICIES)}.")] = ",".join(POLICIES),
    sessions: Annotated[int, typer.Option(min=1, help="Of each trace; cache sizes grow with them.")] = SESSIONS,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up trajectories.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the hit rates to this file.")] = None,
) -> None:
    """Repeat Marconi's evaluation on made-up trajectories: hit rates beside the published ones."""
    try:
        json_file = json_file and target(json_file)
        sweeps = known("sweep", listed("sweep", sweep), SWEEPS) if sweep else SWEEPS
        policies = known("policy", [ALIASES.get(name, name) for name in listed("policy", policy)], POLICIES)
        points = [point for point in POINTS if point.sweep in sweeps]
        cells = [(point, name, sessions, seed) for point in points for name in policies]
        rates = dict(zip([(point, name) for point, name, _, _ in cells], watched(cells, jobs), strict=True))
        for name in sweeps:
            Console().print(report(name, [p for p in points if p.sweep == name], policies, rates))
        if json_file is not None:
            rows = [
                {"sweep": p.sweep, "at": p.at, "policy": n, "token_hit_rate": rate, "published": p.published.get(n)}
                for (p, n), rate in rates.items()
            ]
            write_whole(json_file, (json.dumps({"sessions": sessions, "seed": seed, "rows": rows}) + "\n").encode())
    except HybridCacheError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def known(what: str, names: Sequence[str], all_names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in all_names:
            raise ConfigError(f"unknown {what} {name!r}, must be one of {', '.join(all_names)}")
    return tuple(names)


def watched(cells: Sequence[tuple[Point, str, int, int]], jobs: int) -> list[float]:
    """The hit rates of all cells, with a progress bar on the error stream."""
    console = Console(stderr=True)
    if jobs == 1:
        return [hit_rate(*cell) for cell in track(cells, "replay", console=console, transient=True)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rates = pool.map(hit_rate, *zip(*cells, strict=True))
        return list(track(rates, "replay", len(cells), console=console, transient=True))


def hit_rate(point: Point, policy: str, sessions: int, seed: int) -> float:
    """The share of prompt tokens that a policy spares at a point."""
    trace = trajectories(sessions, point.rate, point.tool_s, seed)
    blocks_a_page = 2 if policy == VLLM else 1
    model = nvidia_hybrid_as_published(point.num_mamba, point.num_attention, blocks_a_page * point.d_state)
    setting = Setting.of(trace, model, Speed(0.0, 1.0), seed=seed)
    cell = Cell(setting, policy, point.capacity_gb * GB * sessions // SESSIONS)
    if policy == STATIC:
        return max(replayed(cell, Marconi(alpha)).token_hit_rate for alpha in ALPHAS)
    return replayed(cell, made(cell)).token_hit_rate


def made(cell: Cell) -> Policy:
    if cell.policy == VLLM:
        return VLLMBlock(TILE)
    return make_policy(cell.policy, cell.setting.spec, cell.setting.cost, cell.capacity_bytes)


@lru_cache(maxsize=1)
def trajectories(sessions: int, rate: float, tool_s: float, seed: int) -> Trace:
    short = Uniform(INSTRUCTIONS, INSTRUCTIONS)
    return Agent(sessions=sessions, rate=rate, tool_s=tool_s, systems=1, system=short).trace(seed=seed)


def report(
    sweep: str, points: Sequence[Point], policies: Sequence[str], rates: Mapping[tuple[Point, str], float]
) -> Table:
    """Percent of prompt tokens; what is published in brackets."""
    table = Table(title=f"{sweep}: tokens spared, % (published)")
    table.add_column("")
    for name in policies:
        table.add_column(name, justify="right")
    ratio = MARCONI in policies and VLLM in policies
    if ratio:
        table.add_column(f"{MARCONI} / {VLLM}", justify="right")
    for point in points:
        line = [point.at]
        for name in policies:
            told = f" ({point.published[name]:.1f})" if name in point.published else ""
            line.append(f"{100 * rates[point, name]:.1f}{told}")
        if ratio:
            line.append(f"{rates[point, MARCONI] / max(rates[point, VLLM], 1e-6):.1f}")
        table.add_row(*line)
    return table
