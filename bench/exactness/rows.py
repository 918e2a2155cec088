"""Logits row by row: those of busy engines wait in a ledger until a plain engine computes the same ones.

Requests may be answered in an order that is known only afterwards, so the busy engine goes first.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import count
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid_cache.bench.exactness.origins import Behind, Origins
from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import ForwardBatch, HybridModel, go_on
from hybrid_cache.device.worker import Hidden, Part, Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.engine.scheduler import Step
from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.tokens import TokenArray
from hybrid_cache.work import Work

# A digest of the model and all tokens up to the row's own, and where the prompt ended for a row of decode; -1 for one
# of prefill.
Key = tuple[bytes, int]
Bits = npt.NDArray[np.int32]


class Origin(NamedTuple):
    """Where a row comes from."""

    request: str
    position: int
    path: str  # prefill, decode, canonical pass
    prefill: Prefill

    def __str__(self) -> str:
        return f"token {self.position} in {self.path}"


class Watcher(Protocol):
    """Sees the steps of an engine, and every row that has to be exact."""

    def step(self, step: Step) -> None: ...

    def row(self, key: Key, bits: Bits, origin: Origin) -> None: ...


def watched_engine(
    model: HybridModel,
    config: EngineConfig,
    watcher: Watcher,
    clock: Callable[[], float] = time.monotonic,
    variants: Mapping[str, HybridModel] = MappingProxyType({}),
) -> Engine:
    """An engine that shows a watcher the logits of each token which an exact sequence computes."""

    class Recorder(Worker):
        step: Step | None = None  # of the next pass
        under_way: list[tuple[Step, set[str]]]  # passes, one between the layers of another, and models that were seen

        def run(self, work: Work, pause: Callable[[], None] = go_on) -> Hidden:
            step, self.step = self.step, None
            if step is None:
                return super().run(work, pause)
            seen = set[str]()
            self.under_way.append((step, seen))
            try:
                hidden = super().run(work, pause)
            finally:
                self.under_way.pop()
            for fingerprint in {rows.model for rows in work.decodes} - seen:  # whose launches were replayed
                part = Step((), tuple(s for s in step.decodes if s.prefill.model == fingerprint))
                places = [i for i, rows in enumerate(work.decodes) if rows.model == fingerprint]
                found = list(decode_rows(part, 0))
                self._show([fingerprint] * len(found), found, hidden.decodes[[places[i] for *_, i in found]])
            return hidden

        def forward(self, part: Part, batch: ForwardBatch) -> Tensor:
            step, seen = self.under_way[-1]
            models = models_of(part.work, batch.layout)
            seen |= set(models.values())
            found = list(exact_rows(part_of(step, part), batch.layout))
            rows = torch.tensor([row for *_, row in found], dtype=torch.int64, device=batch.output_rows.device)
            hidden = super().forward(part, replace(batch, output_rows=torch.cat([rows, batch.output_rows])))
            self._show([models[row] for *_, row in found], found, hidden[: len(found)])
            return hidden[len(found) :]

        def _show(self, models: list[str], rows: list[tuple[Key, Origin, int]], hidden: Tensor) -> None:
            if rows:
                bits = self.all_logits(list(hidden), models).cpu().numpy().view(np.int32)
                for (key, origin, _), row in zip(rows, bits, strict=True):
                    watcher.row(key, row, origin)

    engine = Engine(model, config, worker=Recorder, clock=clock, variants=variants)
    assert isinstance(engine.worker, Recorder)
    engine.worker.under_way = []

    def watch(step: Step) -> None:
        watcher.step(step)
        assert isinstance(engine.worker, Recorder)
        engine.worker.step = step

    engine.watch = watch
    return engine


def part_of(step: Step, part: Part) -> Step:
    """What one model computes of a step."""
    leaps = tuple(sequence for sequence in step.decodes if sequence.stride > 1)
    singles = tuple(sequence for sequence in step.decodes if sequence.stride == 1)
    num_chunks = len(step.chunks)
    chunks = tuple(step.chunks[i] for i in part.chunks if i < num_chunks)
    several = tuple(leaps[i - num_chunks] for i in part.chunks if i >= num_chunks)
    return Step(chunks, (*several, *(singles[i] for i in part.decodes)))


def models_of(work: Work, layout: RowLayout) -> dict[int, str]:
    """The fingerprint of the model of each row of a batch."""
    first_rows = (*layout.chunk_row.tolist(), *range(layout.decode_row, layout.decode_row + len(work.decodes)))
    return {
        row: rows.model
        for rows, first in zip((*work.chunks, *work.decodes), first_rows, strict=True)
        for row in range(first, first + len(rows.tokens))
    }


def is_exact(prefill: Prefill) -> bool:
    """Neither an arranged prompt nor a message for the store."""
    return prefill.arrangement is None and prefill.program is None


def exact_rows(step: Step, layout: RowLayout) -> Iterator[tuple[Key, Origin, int]]:
    """Every token of a step whose row has to be exact, and its place in the batch."""
    first_rows = layout.chunk_row.tolist()
    for chunk, row in zip(step.chunks, first_rows, strict=False):
        if is_exact(chunk.prefill) and chunk.rows.transfer is None:  # of which only entries come out
            name, path = name_of(chunk)
            models = origin_of(chunk.prefill, chunk.rows.model)
            digests = prefix_digests(models, chunk.prefill.tokens, chunk.start, chunk.end)
            for place, digest in enumerate(digests, start=chunk.start):
                yield (digest, -1), Origin(name, place, path, chunk.prefill), row + place - chunk.start
    yield from decode_rows(step, layout.decode_row, first_rows[len(step.chunks) :])


def decode_rows(step: Step, first: int, leaps: Iterable[int] = ()) -> Iterator[tuple[Key, Origin, int]]:
    """The same for tokens that are decoded, whose rows begin with `first`; leaps: first rows of several at once"""
    single, several = count(first), iter(leaps)
    for sequence in step.decodes:
        start, stride = sequence.fed, sequence.stride
        row = next(single) if stride == 1 else next(several)
        if is_exact(sequence.prefill):
            tokens = np.concatenate([sequence.all_tokens(), np.asarray(sequence.forced, np.int32)])
            models = origin_of(sequence.prefill, sequence.prefill.model)
            for i, digest in enumerate(prefix_digests(models, tokens, start, start + stride)):
                origin = Origin(sequence.request.id, start + i, "decode", sequence.prefill)
                yield (digest, _way(sequence)), origin, row + i


def _way(sequence: Sequence) -> int:
    """Where decoding began, and where several tokens were fed at once: others who do not do so have other bits."""
    begin = len(sequence.prefill.tokens)
    leaps = tuple((i, n) for i, n in sequence.leaps.items() if begin + i <= sequence.fed)
    return hash((begin, leaps)) if leaps else begin


def name_of(chunk: Chunk) -> tuple[str, str]:
    """Whose tokens a chunk computes, and in which way."""
    return (chunk.sequence.request.id, "prefill") if chunk.sequence else ("a finished turn", "canonical pass")


def origin_of(prefill: Prefill, model: str) -> str:
    """Says which models have computed the tokens of a sequence, up to those that `model` computes."""
    mark = prefill.mark
    return model if mark is None or model != prefill.model else f"{model} from {mark.position}"


def prefix_digests(models: str, tokens: TokenArray, start: int, end: int) -> Iterator[bytes]:
    """Of the models that computed them and all tokens up to each of [start, end), that one included."""
    known = blake2b(models.encode() + np.ascontiguousarray(tokens[:start], np.int32).tobytes(), digest_size=16)
    for token in np.ascontiguousarray(tokens[start:end], np.int32):
        known.update(token.tobytes())
        yield known.copy().digest()


@dataclass(slots=True)
class BusyRow:
    """Equal logits that a busy engine computed for equal tokens."""

    bits: Bits
    origin: Origin  # of the first
    count: int = 0
    behind: Counter[Behind] = field(default_factory=Counter)


class Ledger:
    """Rows of busy engines, until a plain one computes the same ones; the report has what came of it."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._waiting: dict[Key, list[BusyRow]] = {}

    def busy(self, key: Key, bits: Bits, origin: Origin, behind: Iterable[Behind] = ()) -> None:
        rows = self._waiting.setdefault(key, [])
        row = next((row for row in rows if np.array_equal(row.bits, bits)), None)
        if row is None:
            row = BusyRow(bits, origin)
            rows.append(row)
        row.count += 1
        row.behind.update(behind)

    def plain(self, key: Key, bits: Bits) -> None:
        for row in self._waiting.pop(key, ()):
            self._report.rows += row.count
            for behind, num in row.behind.items():
                self._report.behind[behind].rows += num
            if not np.array_equal(row.bits, bits):
                self._differs(row, bits)

    def waits(self, key: Key) -> bool:
        return key in self._waiting

    def end_round(self) -> None:
        """What is left now has no plain row to be compared with."""
        for row in (row for rows in self._waiting.values() for row in rows):
            self._report.unknown_rows += row.count
            self._report.note(row.origin.request, f"{row.origin}: tokens that the plain run did not come to")
        self._waiting.clear()

    def _differs(self, row: BusyRow, expected: Bits) -> None:
        report, num_bits = self._report, int(np.bitwise_count(row.bits ^ expected).sum())
        report.differing_rows += row.count
        report.differing_bits += num_bits * row.count
        for behind, num in row.behind.items():
            report.behind[behind].differing_rows += num
            report.behind[behind].differing_bits += num_bits * num
        most = np.abs(row.bits.view(np.float32) - expected.view(np.float32)).max()
        report.note(row.origin.request, f"{row.origin}: {num_bits} bits of its logits differ, by up to {most:.2g}")


class PlainWatcher:
    """Takes the rows of a plain engine to the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def step(self, step: Step) -> None:
        """Nothing about it is of interest."""

    def row(self, key: Key, bits: Bits, origin: Origin) -> None:
        self._ledger.plain(key, bits)


class BusyWatcher:
    """Takes the rows of a busy engine to the ledger, and remembers what it was really working on."""

    def __init__(self, ledger: Ledger, report: Report) -> None:
        self._ledger = ledger
        self._mixed = report.mixed
        self.origins = Origins()
        self._pass: tuple[Prefill, int] | None = None  # the last canonical pass, and how far it has come
        self.prompts: dict[str, TokenArray] = {}  # by request, those that were computed or decoded exactly
        self.turns: dict[Key, tuple[str, TokenArray]] = {}  # what canonical passes of a model have come to, by the
        # key of its last row

    def step(self, step: Step) -> None:
        current = next((c for c in step.chunks if c.sequence is None and is_exact(c.prefill)), None)
        if self._pass is not None and (current is None or current.prefill is not self._pass[0]):
            self._mixed["canonical passes broken off"] += self._pass[1] < len(self._pass[0].tokens)
        self._pass = None if current is None else (current.prefill, current.end)
        if current is not None:
            self._mixed["canonical passes, tiles"] += 1
            [*_, last] = prefix_digests(current.prefill.model, current.prefill.tokens, current.start, current.end)
            self.turns[last, -1] = current.prefill.model, current.prefill.tokens[: current.end]
        for chunk in step.chunks:
            if not is_exact(chunk.prefill):
                self._mixed["rows of approximate sequences"] += chunk.end - chunk.start
                continue
            self.origins.chunk(chunk)
            if chunk.sequence is not None:
                self.prompts.setdefault(chunk.sequence.request.id, chunk.prefill.tokens)
        for sequence in step.decodes:
            if is_exact(sequence.prefill):
                self.origins.begins(sequence.prefill)
                self.prompts.setdefault(sequence.request.id, sequence.prefill.tokens)
                self._mixed["forced tokens, replayed" if sequence.replaying else "forced tokens"] += sequence.stride - 1
            else:
                self._mixed["rows of approximate sequences"] += 1

    def row(self, key: Key, bits: Bits, origin: Origin) -> None:
        self._ledger.busy(key, bits, origin, self.origins.behind(origin.prefill, origin.position))

    def end_round(self) -> None:
        """Nothing runs."""
        self.origins.end_round()
