"""`hybrid-cache bench activated`: the time to the first token of an activated adapter behind what its base has read.

A base answers a prompt. Then an adapter is invoked behind it, again and again with other words, and each call computes
its invocation and these; the same prompts without a cache compute everything. Both are timed in one process, in
processor time, on random weights. A third row is the base itself, going on from the grid with as many new tokens.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from hybrid_cache.bench.common.random_model import MID_GRANITE, activated_by, random_adapter, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.request import CacheMode, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, TokenArray

INVOCATION = (5, 6)
ADAPTER = "adapter"
WORDS = 10  # tokens from here on invoke nothing


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of processor time to the first token: the median of the calls, and one without a cache."""

    before: int  # tokens that the base has read
    new: int  # tokens of a call, its invocation among them
    adapter_ms: float
    base_ms: float  # the base with other words instead of the invocation
    whole_ms: float  # the adapter's prompt without a cache

    @property
    def ratio(self) -> float:
        return self.whole_ms / self.adapter_ms


def activated(
    before: Annotated[list[int] | None, typer.Option(min=64, help="Tokens that the base has read.")] = None,
    new: Annotated[list[int] | None, typer.Option(min=3, help="Tokens of a call, with its invocation.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter, on every projection.")] = 16,
    calls: Annotated[int, typer.Option(min=1, help="Calls timed of each kind.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Time the first token of an activated adapter behind a prompt of its base, on a 152 M hybrid."""
    torch.set_num_threads(threads)
    try:
        ops = select(backend)
    except HybridCacheError as error:
        raise typer.BadParameter(str(error)) from error
    base, _ = random_model(MID_GRANITE, ops, torch.bfloat16, adaptable=True)
    beside = activated_by(base, random_adapter(base, rank, seed=1), INVOCATION)
    budget_bytes = 64 * (base.cache_spec.slot_bytes + max(before or [8192]) * base.cache_spec.kv_bytes_per_token // 8)
    engine = Engine(base, EngineConfig(budget_bytes), variants={ADAPTER: beside})
    found = [*measure(engine, before or [2048, 8192], new or [16, 32], calls)]
    table = Table(title=f"first token of an activated adapter of rank {rank}, ms of processor time")
    for column in ("read by the base", "new", "adapter", "base itself", "without a cache", "faster"):
        table.add_column(column, justify="right")
    for t in found:
        times = (f"{ms:,.1f}" for ms in (t.adapter_ms, t.base_ms, t.whole_ms))
        table.add_row(f"{t.before:,}", str(t.new), *times, f"{t.ratio:.0f}x")
    Console(highlight=False).print(table)
    if as_json is not None:
        facts = {"rank": rank, "calls": calls, "threads": threads, "backend": ops.name}
        as_json.write_text(json.dumps({**facts, "timings": [asdict(t) for t in found]}, indent=2) + "\n")


def measure(engine: Engine, before: list[int], new: list[int], calls: int) -> Iterator[Timing]:
    rng = np.random.default_rng(0)

    def words(count: int) -> TokenArray:
        return rng.integers(WORDS, engine.model.vocab_size, count).astype(np.int32)

    for num_read in before:
        read = words(num_read)
        first_token(engine, read)
        for count in new:
            adapter, base = list[float](), list[float]()
            for _ in range(calls):
                call = np.concatenate([read, np.array(INVOCATION, np.int32), words(count - len(INVOCATION))])
                adapter.append(first_token(engine, call, ADAPTER))
                base.append(first_token(engine, np.concatenate([read, words(count)])))
            whole = first_token(engine, call, ADAPTER, CacheMode.OFF)
            yield Timing(num_read, count, 1e3 * median(adapter), 1e3 * median(base), 1e3 * whole)


def first_token(engine: Engine, tokens: TokenArray, model: str = "", mode: CacheMode = CacheMode.IMPLICIT) -> float:
    """Seconds of processor time until a prompt has its first token, which is its last."""
    sampling = SamplingParams(temperature=0, max_tokens=1)
    engine.submit(Request("call", Prompt(tokens), sampling, cache_mode=mode, commits=False, model=model))
    begin = time.process_time()
    while not any(isinstance(output, TokenOutput) for _, output in engine.step()):
        pass
    seconds = time.process_time() - begin
    engine.settle()
    return seconds
