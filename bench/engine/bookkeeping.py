"""`hybrid-cache bench bookkeeping`: what the cache's own work costs a request, by the size of the tree.

No tensors, integers only. A request of 2,000 tokens is matched, acquired, planned (the policy learns from it and says
where it would like checkpoints), committed with those it gets and its end, and released. Two kinds of request, each in
two budgets:

    branch   half of the prompt is in the tree, the rest is new
    repeat   the whole prompt is in the tree: a hit on its end
    full     the budget is full, so what comes in evicts as much: the ordinary state of a server
    roomy    nothing needs to go

Part of that is naming: a prefix that is new to the tree gets a name, which is the same in every process. What this
takes is timed by itself as well, for a prompt of which the tree knows nothing.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.keys import keys_of
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.registry import canonical_name, make_policy
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tokens import Boundary, TokenArray

NUM_TOKENS = 2000
# A hybrid of about a billion parameters: a state takes as much as 50 pages.
SPEC = CacheSpec(
    layers=(
        *(StateSpec(conv_shape=(3, 4352), state_shape=(64, 64, 128), conv_dtype=torch.bfloat16) for _ in range(36)),
        *(AttentionSpec(num_kv_heads=4, head_dim=64, dtype=torch.bfloat16) for _ in range(4)),
    ),
    hidden_size=2048,
    hidden_dtype=torch.bfloat16,
)
COST = PrefillCost(per_token=2e9, per_token_per_position=3e4)


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind of request in a tree of one size; times in microseconds for one request."""

    nodes: int
    budget: str
    request: str
    median_us: float
    p95_us: float
    match_us: float
    acquire_us: float
    plan_us: float
    commit_us: float
    release_us: float
    hit_tokens: int  # of one request
    evictions: int  # of all requests


@dataclass(frozen=True, slots=True)
class Naming:
    """What the names of a new prompt's prefixes take, its end included; medians in microseconds."""

    us_per_page: float
    us_per_1000_tokens: float


def bookkeeping(
    nodes: Annotated[list[int] | None, typer.Option(min=100, help="Sizes of the tree, in pages.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests timed in each case.")] = 500,
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = Learned.name,
    seed: Annotated[int, typer.Option(help="Seed of the tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Time the cache's own work for a 2,000-token request in trees of several sizes."""
    sizes = nodes or [1_000, 10_000, 100_000]
    try:
        timings = [t for size in sizes for full in (True, False) for t in measure(size, full, requests, policy, seed)]
    except HybridCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    naming = measure_naming(requests, seed)
    Console().print(table(timings))
    typer.echo(f"naming: {naming.us_per_page:.2f} us for a page, {naming.us_per_1000_tokens:.1f} us for 1,000 tokens")
    if json_file is not None:
        settings = {"requests": requests, "policy": canonical_name(policy), "seed": seed, "tokens": NUM_TOKENS}
        results = {"timings": [asdict(t) for t in timings], "naming": asdict(naming)}
        json_file.write_text(json.dumps({**settings, **results}, indent=2) + "\n")


def table(timings: list[Timing]) -> Table:
    columns = (
        "nodes",
        "budget",
        "request",
        "median",
        "p95",
        "match",
        "acquire",
        "plan",
        "commit",
        "release",
        "evictions",
    )
    report = Table(*columns, title="microseconds for one request")
    for column in report.columns[:3]:
        column.no_wrap = True
    for t in timings:
        parts = (t.median_us, t.p95_us, t.match_us, t.acquire_us, t.plan_us, t.commit_us, t.release_us)
        report.add_row(f"{t.nodes:,}", t.budget, t.request, *(f"{part:.0f}" for part in parts), f"{t.evictions:,}")
    return report


def measure(num_nodes: int, full: bool, num_requests: int, policy: str, seed: int) -> list[Timing]:
    """Times both kinds of request in a tree of about `num_nodes` pages."""
    rng = np.random.default_rng(seed)
    cache = grown_cache(num_nodes, full, num_requests + 32, policy, rng)
    old = [random_tokens(rng) for _ in range(8)]
    timings = []
    for request in ("branch", "repeat"):
        for tokens in old * 2:
            serve(cache, tokens)
        before, times = cache.stats(), []
        for i in range(num_requests):
            tokens = old[i % len(old)]
            if request == "branch":
                tokens = np.concatenate([tokens[: NUM_TOKENS // 2], random_tokens(rng)[NUM_TOKENS // 2 :]])
            times.append(serve(cache, tokens))
        after = cache.stats()
        totals = [sum(parts) * 1e6 for parts in times]
        match, acquire, plan, commit, release = (median(column) * 1e6 for column in zip(*times, strict=True))
        timings.append(
            Timing(
                nodes=after.nodes,
                budget="full" if full else "roomy",
                request=request,
                median_us=median(totals),
                p95_us=quantiles(totals, n=20)[-1],
                match_us=match,
                acquire_us=acquire,
                plan_us=plan,
                commit_us=commit,
                release_us=release,
                hit_tokens=(after.hit_tokens - before.hit_tokens) // num_requests,
                evictions=after.num_evictions - before.num_evictions,
            )
        )
    return timings


def measure_naming(num_prompts: int, seed: int) -> Naming:
    rng, times = np.random.default_rng(seed), []
    for _ in range(num_prompts):
        keys = keys_of("", random_tokens(rng))
        start = time.perf_counter()
        assert keys.end_name  # which takes the names of all pages
        times.append((time.perf_counter() - start) * 1e6)
    return Naming(median(times) / (NUM_TOKENS // TILE), median(times) / NUM_TOKENS * 1000)


def grown_cache(num_nodes: int, full: bool, room: int, policy: str, rng: np.random.Generator) -> Books:
    """A cache without tensors that holds prompts nobody asked for twice; unless full, with room for more of them."""
    geometry = Geometry.of(SPEC, 1 << 40)
    pages = NUM_TOKENS // TILE
    num_prompts = math.ceil(num_nodes / pages)
    per_prompt = (pages + 1) * geometry.stride_bytes(Kind.PAGE) + 2 * geometry.stride_bytes(Kind.SLOT)
    budget = (num_prompts + 8) * per_prompt if full else 2 * (num_prompts + room) * per_prompt
    cache = Books(SPEC, COST, budget, make_policy(policy))
    for _ in range(2 * num_prompts if full else num_prompts):  # the second half replaces the first
        serve(cache, random_tokens(rng))
    return cache


def random_tokens(rng: np.random.Generator) -> TokenArray:
    return rng.integers(0, 50_000, NUM_TOKENS, dtype=np.int32)


def serve(cache: Books, tokens: TokenArray) -> tuple[float, float, float, float, float]:
    """One request -> seconds of match (its keys included), acquire, plan, all the commits, release."""
    times = [time.perf_counter()]
    keys = keys_of("", tokens)
    match = cache.match("", keys)
    times.append(time.perf_counter())
    lease = cache.acquire(match, keys)
    assert lease is not None
    times.append(time.perf_counter())
    wishes = cache.propose(lease, [Boundary(NUM_TOKENS // 2, role="system"), Boundary(NUM_TOKENS, role="user")])
    times.append(time.perf_counter())
    for wish in wishes:
        cache.reserve_checkpoint(lease, wish.position, wish.kind)
    cache.publish(lease, NUM_TOKENS // TILE * TILE)
    cache.publish_end(lease, 0)
    times.append(time.perf_counter())
    cache.release(lease, num_output_tokens=100)
    times.append(time.perf_counter())
    a, b, c, d, e, f = times
    return b - a, c - b, d - c, e - d, f - e
