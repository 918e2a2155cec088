"""`hybrid-cache bench grammar`: what a JSON schema on every row of a decode step costs.

Two engines decode on one model, with a schema on every row and without, and take turns step by step, so that what slows
the machine for a while slows both. Masks are computed on a thread of their own beside the pass; with one CPU they take
their time from it. Random weights and temperature 1: the model says whatever the schema leaves.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ParamSpec, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer as Backend
from torch import Tensor

from hybrid_cache.api.text.grammars import Grammar, Grammars, json_source
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.bench.common.random_model import MID_GRANITE, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.models.files import read_text
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.request import Request
from hybrid_cache.sampling import Constraint, Mask, SamplingParams
from hybrid_cache.tokens import Prompt

PROMPT = 100  # tokens
WARM_STEPS = 4
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}  # so that no answer ends

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class Parts:
    """Seconds of a part of the work, all rows together."""

    computing: float = 0.0  # masks, on their thread: CPU time
    waiting: float = 0.0  # for masks
    noting: float = 0.0  # tokens
    applying: float = 0.0  # masks to logits


@dataclass(frozen=True, slots=True)
class Timings:
    """Of decode steps in milliseconds: the medians, and the median over pairs of steps of their ratio."""

    free_ms: float
    constrained_ms: float
    ratio: float
    parts_ms: dict[str, float]  # of a step, in the mean


def grammar(
    rows: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 16,
    vocab: Annotated[int, typer.Option(min=4096, help="Tokens of the vocabulary.")] = 100_352,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed of each.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and answers.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Time decode steps of a 152 M hybrid with a JSON schema on every row, and without."""
    torch.set_num_threads(threads)
    tokenizer = wide_tokenizer(vocab)
    parts = Parts()
    model, _ = random_model({**MID_GRANITE, "vocab_size": vocab}, _TimedOps(parts), torch.bfloat16)
    compiled = Grammars(tokenizer, vocab, [tokenizer.eos_id or 0]).compile(json_source(SCHEMA, "schema"))
    found = measure(model, compiled, parts, rows, steps, seed)
    console = Console(highlight=False)
    console.print(_table(found, rows, vocab))
    if as_json is not None:
        facts = {"rows": rows, "vocab": vocab, "steps": steps, "threads": threads, "seed": seed}
        as_json.write_text(json.dumps({**facts, **asdict(found)}, indent=2) + "\n")


def measure(model: HybridModel, compiled: Grammar, parts: Parts, rows: int, steps: int, seed: int) -> Timings:
    """parts: those of the model's operations"""
    timed = replace(compiled, thread=_TimedThread(compiled.thread, parts))
    makers: tuple[Callable[[], Constraint] | None, ...] = (None, lambda: _TimedConstraint(timed.start(), parts))
    engines = [_decoding(model, rows, steps, seed, make) for make in makers]
    times: tuple[list[float], ...] = ([], [])
    before = replace(parts)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range(steps), description="decode"):
            for engine, seconds in zip(engines, times, strict=True):
                begin = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - begin)
    assert all(engine.stats().running == rows for engine in engines), "a sequence ended before its time"
    spent = {name: 1e3 * (seconds - asdict(before)[name]) / steps for name, seconds in asdict(parts).items()}
    free, constrained = times
    ratio = median(b / a for a, b in zip(free, constrained, strict=True))
    return Timings(1e3 * median(free), 1e3 * median(constrained), ratio, spent)


def _decoding(
    model: HybridModel, rows: int, steps: int, seed: int, make_constraint: Callable[[], Constraint] | None
) -> Engine:
    """An engine in which all rows have begun to answer."""
    spec, length = model.cache_spec, PROMPT + WARM_STEPS + steps + 64
    budget = 2 * rows * (spec.slot_bytes + length * spec.kv_bytes_per_token + (1 << 18)) + (64 << 20)
    engine = Engine(model, EngineConfig(budget, max_running=rows, prefix_cache=False))
    rng = np.random.default_rng(seed)
    for i in range(rows):
        tokens = rng.integers(100, model.vocab_size, PROMPT).astype(np.int32)
        sampling = SamplingParams(temperature=1.0, seed=seed + i, max_tokens=WARM_STEPS + 2 * steps + rows)
        engine.submit(Request(str(i), Prompt(tokens), sampling, make_constraint=make_constraint))
    while engine.stats().generated_tokens < rows * WARM_STEPS or engine.stats().running < rows:
        engine.step()
    return engine


def wide_tokenizer(size: int) -> Tokenizer:
    """The embedded model's tokenizer, with more merges, of random pairs, until its vocabulary has a size."""
    whole = json.loads(read_text(embedded_path() / "tokenizer.json", 1 << 26))
    vocab, merges, rng = whole["model"]["vocab"], whole["model"]["merges"], random.Random(0)
    firsts = [token for token in vocab if len(token) > 1 and not token.startswith("<|")]
    seconds = [token for token in firsts if not token.startswith("\u0120")]
    while len(vocab) < size:
        pair = rng.choice(firsts), rng.choice(seconds)
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    return Tokenizer(Backend.from_str(json.dumps(whole)), {"eos_token": "<|im_end|>"})


class _TimedOps(NativeOps):
    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = parts

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        begin = time.perf_counter()
        super().mask_tokens(logits, rows, words)
        self._parts.applying += time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class _TimedConstraint:
    inner: Constraint
    parts: Parts = field(repr=False)

    def mask(self) -> Mask:
        begin = time.perf_counter()
        found = self.inner.mask()
        self.parts.waiting += time.perf_counter() - begin
        return found

    def note(self, token: int) -> None:
        begin = time.perf_counter()
        self.inner.note(token)
        self.parts.noting += time.perf_counter() - begin

    def ahead(self, most: int) -> Sequence[int]:
        """No tokens are forced, so that both engines are fed as many."""
        begin = time.perf_counter()
        found = self.inner.ahead(0)
        self.parts.noting += time.perf_counter() - begin
        return found

    @property
    def done(self) -> bool:
        return self.inner.done


class _TimedThread(Executor):
    def __init__(self, inner: Executor, parts: Parts) -> None:
        self._inner = inner
        self._parts = parts

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def run() -> T:
            begin = time.thread_time()
            found = fn(*args, **kwargs)
            self._parts.computing += time.thread_time() - begin
            return found

        return self._inner.submit(run)


def _table(found: Timings, rows: int, vocab: int) -> Table:
    table = Table(title=f"decode, {rows} rows, vocabulary of {vocab:,}; ms a step")
    for name in ("free", "with a schema", "ratio", *found.parts_ms):
        table.add_column(name, justify="right")
    parts = (f"{ms:.2f}" for ms in found.parts_ms.values())
    table.add_row(f"{found.free_ms:.1f}", f"{found.constrained_ms:.1f}", f"{found.ratio:.3f}", *parts)
    return table
