"""What the cache's own bookkeeping costs a request, by the size of the tree: no tensors, integers only.

One request of 2,000 tokens, half of them in the tree, is matched, acquired, committed with up to two checkpoints, and
released. The budget is full, so every request also evicts as much as it adds: the ordinary state of a server.
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

from hybrid_cache.arena import Geometry, Kind
from hybrid_cache.cache import HybridCache
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.policy import make_policy
from hybrid_cache.request import TokenArray
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tree import CheckpointKind

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
    """One size of the tree; times in microseconds for one request."""

    nodes: int
    median_us: float
    p99_us: float
    match_us: float
    acquire_us: float
    commit_us: float
    release_us: float
    evictions: int


def bookkeeping(
    nodes: Annotated[list[int] | None, typer.Option(help="Sizes of the tree, in pages.")] = None,
    requests: Annotated[int, typer.Option(help="Requests timed for each size.")] = 500,
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = "flops-per-byte",
    seed: Annotated[int, typer.Option(help="Seed of the tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Times match + acquire + commit + release of a 2,000-token request in trees of several sizes."""
    timings = [measure(size, requests, policy, seed) for size in nodes or [1_000, 10_000, 100_000]]
    table = Table(
        "nodes", "median µs", "p99 µs", "match", "acquire", "commit", "release", "evictions", title="bookkeeping"
    )
    for t in timings:
        parts = (t.median_us, t.p99_us, t.match_us, t.acquire_us, t.commit_us, t.release_us)
        table.add_row(f"{t.nodes:,}", *(f"{part:.0f}" for part in parts), f"{t.evictions:,}")
    Console().print(table)
    if json_file is not None:
        settings = {"requests": requests, "policy": policy, "seed": seed, "tokens": NUM_TOKENS}
        json_file.write_text(json.dumps({**settings, "timings": [asdict(t) for t in timings]}, indent=2) + "\n")


def measure(num_nodes: int, num_requests: int, policy: str, seed: int) -> Timing:
    """Fills a cache whose budget holds about `num_nodes` pages with their checkpoints, then times requests."""
    rng = np.random.default_rng(seed)
    cache = full_cache(num_nodes, policy, rng)
    evicted = cache.stats().num_evictions
    old = [random_tokens(rng) for _ in range(8)]
    for tokens in old:
        serve(cache, tokens)
    times = []
    for i in range(num_requests):
        known = old[i % len(old)][: NUM_TOKENS // 2]
        times.append(serve(cache, np.concatenate([known, random_tokens(rng)[: NUM_TOKENS - len(known)]])))
    stats = cache.stats()
    match, acquire, commit, release = (median(column) * 1e6 for column in zip(*times, strict=True))
    totals = [sum(t) * 1e6 for t in times]
    p99 = quantiles(totals, n=100)[98]
    evictions = stats.num_evictions - evicted
    return Timing(stats.nodes, median(totals), p99, match, acquire, commit, release, evictions)


def full_cache(num_nodes: int, policy: str, rng: np.random.Generator) -> HybridCache:
    """A cache without tensors that is full of prompts nobody asked for twice."""
    geometry = Geometry.of(SPEC, 1 << 40)
    pages = NUM_TOKENS // TILE
    num_prompts = math.ceil(num_nodes / pages)
    per_prompt = pages * geometry.stride_bytes(Kind.PAGE) + 2 * geometry.stride_bytes(Kind.SLOT)
    cache = HybridCache(SPEC, COST, (num_prompts + 4) * per_prompt, make_policy(policy), with_tensors=False)
    for _ in range(2 * num_prompts):  # the second half replaces the first
        serve(cache, random_tokens(rng))
    return cache


def random_tokens(rng: np.random.Generator) -> TokenArray:
    return rng.integers(0, 50_000, NUM_TOKENS, dtype=np.int32)


def serve(cache: HybridCache, tokens: TokenArray) -> tuple[float, float, float, float]:
    """One request -> seconds of match, acquire, reserve and commit, release."""
    times = [time.perf_counter()]
    match = cache.match("", tokens)
    times.append(time.perf_counter())
    lease = cache.acquire(match, tokens)
    assert lease is not None
    times.append(time.perf_counter())
    half = NUM_TOKENS // 2 // TILE * TILE
    for position in (half, NUM_TOKENS // TILE * TILE):
        cache.reserve_checkpoint(lease, position, CheckpointKind.MESSAGE_END)
    cache.commit(lease, NUM_TOKENS // TILE * TILE)
    times.append(time.perf_counter())
    cache.release(lease)
    times.append(time.perf_counter())
    a, b, c, d, e = times
    return b - a, c - b, d - c, e - d


if __name__ == "__main__":
    typer.run(bookkeeping)
