"""`hybrid-cache bench decode`: a whole model's prefill and decode, compared with what the machine could do.

Requests share a prompt of some length and go on from it with questions of their own; then all decode together. Steps
of the whole engine are timed, bookkeeping and sampling included. The floor of a step is the time to move once, at the
rate measured in the same run, what it has to move:

    weights              each once a step
    states               of each sequence in and out, which nothing can share
    KV                   the shared prefix once, the rest of each sequence once

So a longer prefix costs what its own KV costs, once for all: `apart` is the same with attention that reads it for each
sequence. Random weights are as fast as trained ones.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hybrid_cache.bench.common.ceilings import Ceilings, measure_ceilings
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.models.loading import describe, embedded_path, load, load_config
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

QUESTION = 33  # tokens of each request's own
WARM_STEPS = 4
NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Decoded:
    """One number of sequences behind one prefix; milliseconds a step, and the parts of its floor."""

    streams: int
    prefix: int
    ms: float
    apart_ms: float | None  # None for a single stream
    tokens_per_s: float
    weights_ms: float
    states_ms: float
    kv_ms: float

    @property
    def share(self) -> float:
        """Of the floor in the time taken."""
        return (self.weights_ms + self.states_ms + self.kv_ms) / self.ms


def decode(
    model: Annotated[Path | None, typer.Argument(help="A model folder; the embedded model without one.")] = None,
    streams: Annotated[str, typer.Option(help="Sequences that decode together, with commas.")] = "1,4,16,32",
    prefixes: Annotated[str, typer.Option(help="Tokens of the prompt that they share, with commas.")] = "64,1024,8192",
    steps: Annotated[int, typer.Option(min=1, help="Steps timed of each; the median counts.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Time whole steps of a model in decode, and its prefill, next to the memory's and the processor's rates."""
    counts = [(n, p) for p in _numbers(prefixes, "--prefixes") for n in _numbers(streams, "--streams")]
    torch.set_num_threads(threads)
    folder = model or embedded_path()
    net = load(folder, ops=NativeOps())
    longest = max(p for _, p in counts) + QUESTION + WARM_STEPS + 2 * steps + 2
    if longest > net.max_length:
        raise typer.BadParameter(f"{longest} tokens are more than the model's context, {net.max_length}")
    console = Console(highlight=False)
    with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("decode", total=len(counts) + 1)
        ceilings = measure_ceilings(net.cache_spec.hidden_dtype, torch.device("cpu"))
        prefill = _prefill(net, seed)
        progress.advance(task)
        results = []
        for n, p in counts:
            results.append(_decode(net, folder, n, p, steps, seed, ceilings))
            progress.advance(task)
    share = net.prefill_cost.flops(0, 1024) / prefill / ceilings.gigaflops_per_s / 1e9
    console.print(_table(results, ceilings))
    console.print(f"prefill of 1,024 tokens: {1024 / prefill:,.0f} tokens/s, {share:.0%} of the rate of products")
    if as_json is not None:
        facts = {"threads": threads, "seed": seed, "steps": steps, "ceilings": asdict(ceilings)}
        rows = [{**asdict(result), "share": result.share} for result in results]
        whole = {**facts, "prefill_tokens_per_s": 1024 / prefill, "prefill_share": share, "decode": rows}
        as_json.write_text(json.dumps(whole, indent=2) + "\n")


def _prefill(net: HybridModel, seed: int) -> float:
    """Seconds for a single prompt of 1,024 tokens, the second time."""
    seconds = 0.0
    for turn in range(2):
        engine = _engine(net, 1, 1024, prefix_cache=False)
        engine.submit(_request("0", _tokens(net, 1024, seed + turn), 0))
        begin = time.perf_counter()
        engine.run_until_idle()
        seconds = time.perf_counter() - begin
    return seconds


def _decode(
    net: HybridModel, folder: Path, streams: int, prefix: int, steps: int, seed: int, ceilings: Ceilings
) -> Decoded:
    ms = _step_ms(net, streams, prefix, steps, seed)
    apart = None
    if streams > 1:
        apart = _step_ms(load(folder, ops=NativeOps(min_shared_rows=NEVER)), streams, prefix, steps, seed)
    spec, size = net.cache_spec, net.cache_spec.hidden_dtype.itemsize
    weights = describe(load_config(folder)).num_parameters * size
    kv = (prefix // TILE * TILE + streams * (QUESTION + WARM_STEPS + steps // 2)) * spec.kv_bytes_per_token
    floor = [weights, 2 * streams * spec.slot_bytes, kv]
    parts = [num_bytes / ceilings.gigabytes_per_s / 1e6 for num_bytes in floor]
    return Decoded(streams, prefix, ms, apart, 1e3 * streams / ms, *parts)


def _step_ms(net: HybridModel, streams: int, prefix: int, steps: int, seed: int) -> float:
    """Of a step in which all sequences decode and nothing else happens."""
    engine = _engine(net, streams, prefix + QUESTION + WARM_STEPS + 2 * steps)
    shared = _tokens(net, prefix, seed)
    engine.submit(_request("prefix", shared, 0))
    engine.run_until_idle()
    for i in range(streams):
        own = _tokens(net, QUESTION, seed + 1 + i)
        engine.submit(_request(str(i), np.concatenate([shared, own]), WARM_STEPS + 2 * steps))
    while engine.stats().generated_tokens < streams * WARM_STEPS or engine.stats().running < streams:
        engine.step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    assert engine.stats().running == streams, "a sequence ended before its time"
    return 1e3 * median(times)


def _engine(net: HybridModel, streams: int, length: int, *, prefix_cache: bool = True) -> Engine:
    spec = net.cache_spec
    pages = (streams + 2) * (length // TILE + 4)
    budget = (3 * streams + 8) * (spec.slot_bytes + (1 << 16)) + 2 * pages * (spec.page_bytes + 64) + (64 << 20)
    return Engine(net, EngineConfig(budget, max_running=streams, prefix_cache=prefix_cache))


def _request(name: str, tokens: np.ndarray, max_tokens: int) -> Request:
    return Request(name, Prompt(tokens), SamplingParams(temperature=0.0, max_tokens=max_tokens))


def _tokens(net: HybridModel, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, net.vocab_size, count).astype(np.int32)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers", param_hint=option) from None
    if min(numbers) < 1:
        raise typer.BadParameter(f"{min(numbers)} is less than 1", param_hint=option)
    return numbers


def _table(results: list[Decoded], ceilings: Ceilings) -> Table:
    rates = f"{ceilings.gigabytes_per_s:,.0f} GB/s, {ceilings.gigaflops_per_s:,.0f} GFLOP/s"
    table = Table(title=f"decode, ms a step; this machine: {rates}")
    for name in ("streams", "prefix", "step", "apart", "tokens/s", "weights", "states", "KV", "floor / step"):
        table.add_column(name, justify="right")
    for r in results:
        apart = "" if r.apart_ms is None else f"{r.apart_ms:.1f}"
        floor = (f"{ms:.1f}" for ms in (r.weights_ms, r.states_ms, r.kv_ms))
        table.add_row(
            str(r.streams), f"{r.prefix:,}", f"{r.ms:.1f}", apart, f"{r.tokens_per_s:,.0f}", *floor, f"{r.share:.0%}"
        )
    return table
