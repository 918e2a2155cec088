"""`python -m hybrid_cache.bench.engine.adapters`: decode steps in which rows of a base and of adapters beside it mix.

An engine brings sequences to where they decode; then one step of theirs is repeated on the same pages and states, with
the next tokens chosen: all rows the model's that has no bank, all the base's of a bank, and some of them adapters'. The
steps are timed in turn, so that what else the machine does meets all alike. Random weights are as fast as trained ones.
"""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hybrid_cache.bench.common.random_model import MID_GRANITE, random_adapter, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel, go_on
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.loading import beside, embedded_path, load, load_trunk
from hybrid_cache.models.registry import ShapedModel
from hybrid_cache.models.shelf import Shelf
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams, TokenChooser
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import Work

PROMPT = 40  # tokens
WARM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Timed:
    """Median milliseconds of processor time for a step, and how much that is of the model without a bank."""

    streams: int
    adapters: int | None  # beside the base; None for a model without a bank
    ms: float
    ratio: float  # median of the ratios of steps that follow each other


def run(
    model: Annotated[str, typer.Argument(help="A folder, `embedded`, or `152m`: random weights.")] = "152m",
    streams: Annotated[str, typer.Option(help="Sequences that decode together, with commas.")] = "4,16,64",
    adapters: Annotated[str, typer.Option(help="How many stand beside the base, with commas.")] = "0,1,3",
    rank: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed of each.")] = 60,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    memory: Annotated[int, typer.Option(help="Load so many adapters and say what they take; 0 for none.")] = 0,
    backend: Annotated[str, typer.Option()] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time decode steps with adapters beside the model against those of the model alone."""
    torch.set_num_threads(threads)
    ops, console = dispatch.select(backend), Console(highlight=False)
    plain, trunk = _models(model, ops, seed)
    counts = [int(n) for n in adapters.split(",")]
    models = [beside(trunk, random_adapter(trunk, rank, seed + 1 + i)) for i in range(max(counts))]
    results = []
    for number in (int(n) for n in streams.split(",")):
        turns = _turns(plain, trunk, models, counts, number, seed)
        rounds = track(range(WARM_STEPS + steps), f"{number} streams", transient=True)
        times = np.array([[_timed(turn) for turn in turns] for _ in rounds])[WARM_STEPS:]
        for column, count in enumerate([None, *counts]):
            ratio = float(np.median(times[:, column] / times[:, 0]))
            results.append(Timed(number, count, median(times[:, column].tolist()), ratio))
    console.print(_table(model, results))
    if memory:
        console.print(_memory(trunk, rank, memory))
    if as_json is not None:
        as_json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def _models(name: str, ops: Ops, seed: int) -> tuple[HybridModel, ShapedModel]:
    """The model without a bank, and with one; their matrices are stored once."""
    shelf = Shelf()
    if name == "152m":
        plain, trunk = (
            random_model(MID_GRANITE, shelf.ops(ops), torch.bfloat16, seed, adaptable=adaptable)[0]
            for adaptable in (False, True)
        )
        return plain, trunk
    folder = embedded_path() if name == "embedded" else Path(name)
    return load(folder, ops=ops, shelf=shelf), load_trunk(folder, ops=ops, shelf=shelf)


def _turns(
    plain: HybridModel,
    trunk: HybridModel,
    adapted: Sequence[HybridModel],
    counts: Sequence[int],
    streams: int,
    seed: int,
) -> list[Callable[[], object]]:
    """One step each: without a bank, then with so many adapters, whose rows are as many as the base's."""
    banked, work = _decoding(trunk, streams, seed)
    for model in adapted:
        banked.add(model)
    turns = [partial(_step, Worker(plain, banked.memory), work, [plain])]
    return [*turns, *(partial(_step, banked, work, [trunk, *adapted[:n]]) for n in counts)]


def _decoding(model: HybridModel, streams: int, seed: int) -> tuple[Worker, Work]:
    """A worker, and a step of it in which all sequences decode."""
    spec, seen = model.cache_spec, list[Work]()

    class Watched(Worker):
        def run(self, work: Work, pause: Callable[[], None] = go_on) -> Hidden:
            seen.append(work)
            return super().run(work, pause)

    budget = 2 * (streams + 2) * (2 * spec.slot_bytes + 4 * (spec.page_bytes + (1 << 16)))
    engine = Engine(model, EngineConfig(budget, max_running=streams, prefix_cache=False), worker=Watched)
    rng = np.random.default_rng(seed)
    for i in range(streams):
        prompt = Prompt(rng.integers(0, model.vocab_size, PROMPT).astype(np.int32))
        engine.submit(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=64)))
    while not seen or len(seen[-1].decodes) < streams:
        engine.step()
    return engine.worker, replace(seen[-1], commands=())


def _step(worker: Worker, work: Work, models: Sequence[HybridModel]) -> None:
    """The rows are these models', in turn."""
    names = [models[i % len(models)].fingerprint for i in range(len(work.decodes))]
    decodes = tuple(rows._replace(model=name) for rows, name in zip(work.decodes, names, strict=True))
    hidden = worker.run(replace(work, decodes=decodes))
    choosers = [TokenChooser(SamplingParams(temperature=0.0), np.zeros(0, np.int32), 0) for _ in names]
    worker.choose(list(hidden.decodes), names, choosers, [None] * len(names))


def _timed(turn: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    begin = time.process_time()
    turn()
    return 1e3 * (time.process_time() - begin)


def _memory(trunk: ShapedModel, rank: int, count: int) -> str:
    """What adapters take by their own account, and what the process grows by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = [beside(trunk, random_adapter(trunk, rank, 1000 + i)) for i in range(count)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    own = sum(model.factors.num_bytes for model in loaded) / (1 << 20)
    return (
        f"{count} adapters: {own:,.0f} MiB of factors, {grown / count:.1f} MiB each in the process ({grown:,.0f} MiB)"
    )


def _table(model: str, results: list[Timed]) -> Table:
    table = Table(title=f"{model}: processor time of a decode step")
    for name in ("streams", "adapters", "ms", "of the model without a bank"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            str(r.streams), "no bank" if r.adapters is None else str(r.adapters), f"{r.ms:.2f}", f"{r.ratio:.3f}"
        )
    return table


if __name__ == "__main__":
    typer.run(run)
