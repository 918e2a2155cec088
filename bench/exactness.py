"""`hybrid-cache bench exactness`: the promise that cache on and cache off give the same bits, counted.

Each round makes a set of related requests (stems, branches, edits, exact repeats, longer turns). A plain engine answers
them one by one, alone, without any reuse, and keeps the logits of every row that it computes. A busy engine then
answers the same requests together: random chunk sizes, many neighbours, a budget so small that things are evicted and
sequences preempted, and some requests aborted on the way. Every row that it computes must have the same bits as the
plain run's row for the same tokens, and every answer the same tokens and log-probabilities.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from hybrid_cache.batch import HybridModel
from hybrid_cache.cache import HybridCache
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine import Engine, Outputs
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.layout import TILE, RowLayout
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.request import Boundary, Prompt, Request, SamplingParams, TokenArray, TokenOutput
from hybrid_cache.runner import ModelRunner, StepHidden
from hybrid_cache.scheduler import Step

REQUESTS_PER_ROUND = 24
MAX_PROMPT = 450

# A prefill row depends on its tokens alone; a decode row also on where the prompt ended.
RowKey = tuple[bytes, int]
Bits = npt.NDArray[np.int32]


@dataclass(slots=True)
class Report:
    """What one model and dtype gave."""

    model: str
    dtype: str
    seed: int
    rows: int = 0  # logits rows compared
    differing_rows: int = 0
    differing_bits: int = 0
    unknown_rows: int = 0  # rows of the busy run that the plain run never computed; their tokens had already gone apart
    answers: int = 0  # choices compared token by token, with log-probabilities
    differing_answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    preemptions: int = 0
    aborts: int = 0

    @property
    def exact(self) -> bool:
        return not (self.differing_rows or self.unknown_rows or self.differing_answers)


@dataclass(slots=True)
class Ledger:
    """Logits of the plain run by row, and the comparison of the busy run against them."""

    report: Report
    rows: dict[RowKey, Bits] = field(default_factory=dict)
    comparing: bool = False

    def enter(self, key: RowKey, logits: Tensor) -> None:
        bits = logits.numpy().view(np.int32)
        if not self.comparing:
            self.rows[key] = bits
            return
        expected = self.rows.get(key)
        if expected is None:
            self.report.unknown_rows += 1
            return
        self.report.rows += 1
        if not np.array_equal(bits, expected):
            self.report.differing_rows += 1
            self.report.differing_bits += int(np.bitwise_count(bits ^ expected).sum())


def recording_runner(ledger: Ledger) -> type[ModelRunner]:
    """A `ModelRunner` that also enters the logits of every computed row in the ledger."""

    class RecordingRunner(ModelRunner):
        def __init__(self, model: HybridModel, cache: HybridCache) -> None:
            super().__init__(model, cache)
            self._recorded_model = model
            self._recorded_cache = cache

        def run(self, step: Step) -> StepHidden:
            batch, counts = self.batch(step)
            keys, rows = zip(*row_keys(step, batch.layout), strict=True)
            everything = replace(batch, output_rows=torch.tensor(rows, device=self._recorded_model.device))
            hidden = self._recorded_model.forward(everything, self._recorded_cache.tensors)
            for key, logits in zip(keys, self.logits(hidden), strict=True):
                ledger.enter(key, logits)
            where = {row: i for i, row in enumerate(rows)}
            wanted = hidden[[where[row] for row in batch.output_rows.tolist()]]
            *chunks, decodes = torch.split(wanted, [*counts, len(step.decodes)])
            return StepHidden(tuple(chunks), decodes)

    return RecordingRunner


def row_keys(step: Step, layout: RowLayout) -> Iterator[tuple[RowKey, int]]:
    """Every row of a step that holds a token: its key, and its place in the batch."""
    for chunk, row in zip(step.chunks, layout.chunk_row.tolist(), strict=True):
        for i in range(chunk.start, chunk.end):
            yield (chunk.prefill.tokens[: i + 1].tobytes(), -1), row + i - chunk.start
    for i, sequence in enumerate(step.decodes):
        tokens = sequence.all_tokens()[: sequence.fed + 1]
        yield (tokens.tobytes(), len(sequence.prefill.tokens)), layout.decode_row + i


class Workload:
    """Seeded requests that share, branch, repeat and grow."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._stems = [self._tokens(300) for _ in range(3)]
        self._count = 0

    def _tokens(self, limit: int) -> TokenArray:
        values = [self._rng.randrange(self._vocab_size) for _ in range(self._rng.randrange(1, limit + 1))]
        return np.array(values, np.int32)

    def round(self, num_requests: int) -> list[Request]:
        """The next requests. Their prompts become stems of later ones."""
        requests = [self._request() for _ in range(num_requests)]
        self._stems = self._rng.sample([*self._stems, *(r.prompt.tokens for r in requests)], 8)
        return requests

    def _request(self) -> Request:
        rng = self._rng
        stem = rng.choice(self._stems)
        kind = rng.choice(["repeat", "grow", "grow", "branch", "branch", "fresh"])
        if kind == "repeat":
            tokens = stem
        elif kind == "fresh":
            tokens = self._tokens(200)
        else:
            kept = len(stem) if kind == "grow" else rng.randrange(len(stem) + 1)
            tokens = np.concatenate([stem[:kept], self._tokens(100)])
        tokens = tokens[:MAX_PROMPT]
        self._stems.append(tokens)
        self._count += 1
        ends = sorted(rng.sample(range(1, len(tokens) + 1), min(3, len(tokens))))
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 1.0]), seed=self._count, max_tokens=rng.randrange(1, 70), logprobs=2
        )
        prompt = Prompt(tokens, tuple(Boundary(e) for e in ends))
        return Request(f"r{self._count}", prompt, sampling, n=rng.choice([1, 1, 1, 2]))


def compare(
    model: HybridModel,
    report: Report,
    num_rows: int,
    progress: Progress | None = None,
    requests_per_round: int = REQUESTS_PER_ROUND,
) -> Report:
    """Rounds until at least `num_rows` logits rows have been compared; fills in and returns the report."""
    ledger = Ledger(report)
    runner = recording_runner(ledger)
    plain = Engine(model, EngineConfig(budget_bytes=_room(model, 4), prefix_cache=False), runner=runner)
    rng, workload = random.Random(report.seed), Workload(report.seed, model.vocab_size)
    task = progress.add_task(f"{report.model} {report.dtype}", total=num_rows) if progress else None
    busy = _busy_engine(model, runner, rng)
    for number in range(10**9):
        if report.rows >= num_rows or (number >= 3 and not report.rows):
            break
        if number % 8 == 7:  # a new budget and chunk size now and then
            _close(busy, report)
            busy = _busy_engine(model, runner, rng)
        requests = workload.round(requests_per_round)
        ledger.rows, ledger.comparing = {}, False
        expected = [_answer_alone(plain, request) for request in requests]
        ledger.comparing = True
        got, aborted = _answer_together(busy, requests, rng)
        report.aborts += len(aborted)
        for request, answer in zip(requests, expected, strict=True):
            if request.id not in aborted:
                report.answers += request.n
                report.differing_answers += sum(_answer(got, request.id, i) != answer[i] for i in range(request.n))
        if progress and task is not None:
            progress.update(task, completed=report.rows)
    _close(busy, report)
    return report


def _room(model: HybridModel, sequences: int) -> int:
    """Bytes in which `sequences` of the longest requests run side by side."""
    spec = model.cache_spec
    return sequences * (2 * spec.slot_bytes + (MAX_PROMPT // TILE + 3) * spec.page_bytes + (1 << 16))


def _busy_engine(model: HybridModel, runner: type[ModelRunner], rng: random.Random) -> Engine:
    config = EngineConfig(
        budget_bytes=_room(model, rng.choice([3, 16, 80])),
        max_running=rng.choice([4, 12]),
        max_tiles=rng.choice([1, 2, 3, 7, 16]),
        max_tiles_beside_decode=rng.choice([1, 2, 4]),
    )
    return Engine(model, config, runner=runner)


def _answer_alone(engine: Engine, request: Request) -> list[list[TokenOutput]]:
    """Each choice of a request computed alone; then its full text by the prefill path, as a canonical commit would."""
    engine.submit(request)
    outputs = engine.run_until_idle()
    choices = [_answer(outputs, request.id, i) for i in range(request.n)]
    for i, choice in enumerate(choices):
        generated = np.array([o.token for o in choice], np.int32)
        whole = Prompt(np.concatenate([request.prompt.tokens, generated]))
        engine.submit(Request(f"{request.id}-{i}", whole, SamplingParams(max_tokens=0)))
        engine.run_until_idle()
    return choices


def _answer_together(engine: Engine, requests: list[Request], rng: random.Random) -> tuple[Outputs, set[str]]:
    """All requests at once, with some steps between arrivals and some aborted -> outputs, ids of the aborted."""
    outputs: Outputs = []
    aborted = set()
    for request in requests:
        engine.submit(request)
        for _ in range(rng.choice([0, 0, 1, 3])):
            outputs += engine.step()
        if rng.random() < 0.08:
            engine.abort(request.id)
            aborted.add(request.id)
    outputs += engine.run_until_idle()
    engine.cache.check()
    return outputs, aborted


def _answer(outputs: Outputs, request_id: str, index: int) -> list[TokenOutput]:
    return [o for name, o in outputs if name == request_id and isinstance(o, TokenOutput) and o.index == index]


def _close(engine: Engine, report: Report) -> None:
    """Adds an engine's counters to the report."""
    stats = engine.stats()
    report.prompt_tokens += stats.prompt_tokens
    report.cached_tokens += stats.cached_tokens
    report.evictions += stats.cache.num_evictions
    report.preemptions += stats.num_preemptions


def exactness(
    models: Annotated[
        list[str] | None, typer.Argument(help="Model folders; the embedded model when none is given.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Logits rows to compare for each model and dtype.")] = 20_000,
    dtype: Annotated[str, typer.Option(help="Comma-separated: float32, bfloat16.")] = "float32,bfloat16",
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of the model; 0 keeps torch's choice.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the reports to this file.")] = None,
) -> None:
    """Counts the bits in which cache on and cache off differ. Exit code 1 if there are any."""
    if threads:
        torch.set_num_threads(threads)
    reports = []
    with Progress(console=Console(stderr=True)) as progress:
        for path in models or [str(embedded_path())]:
            for name in dtype.split(","):
                try:
                    model = load(path, dtype=name, ops=select(backend))
                except HybridCacheError as error:
                    raise typer.BadParameter(str(error)) from error
                reports.append(compare(model, Report(Path(path).name, name, seed), rows, progress))
    Console().print(_table(reports))
    if json_file:
        json_file.write_text(json.dumps([asdict(r) for r in reports], indent=2))
    raise typer.Exit(0 if all(r.exact for r in reports) else 1)


def _table(reports: list[Report]) -> Table:
    table = Table(title="cache on against cache off")
    columns = ["model", "dtype", "rows", "differing rows", "differing bits", "unknown rows", "answers"]
    columns += ["differing answers", "tokens reused", "evictions", "preemptions", "aborts"]
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for r in reports:
        counts = (r.rows, r.differing_rows, r.differing_bits, r.unknown_rows, r.answers, r.differing_answers)
        reused = f"{r.cached_tokens / max(r.prompt_tokens, 1):.0%}"
        more = (r.evictions, r.preemptions, r.aborts)
        table.add_row(r.model, r.dtype, *(f"{c:,}" for c in counts), reused, *(f"{c:,}" for c in more))
    return table
