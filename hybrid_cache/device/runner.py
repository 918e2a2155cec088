"""Turns a `Step` into index tensors, runs the model, and brings back the hidden rows that somebody reads."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.tree import Rows
from hybrid_cache.device.batch import ForwardBatch, HybridModel
from hybrid_cache.device.cuda_graphs import DecodeGraphs
from hybrid_cache.device.effects import Anatomy, Effect, Recorder
from hybrid_cache.device.memory import HybridCache
from hybrid_cache.engine.scheduler import Chunk, Step
from hybrid_cache.engine.sequence import Sequence
from hybrid_cache.kernels.grid import MIN_ROWS
from hybrid_cache.kernels.layout import RowLayout, place_rows, tile_bounds
from hybrid_cache.kernels.shared_prefix import with_plan


@dataclass(frozen=True, slots=True)
class StepHidden:
    """Hidden rows of a step: for each chunk the rows asked for, for each decode one row (unused while replaying)."""

    chunks: tuple[Tensor, ...]  # [rows, hidden]: all rows of a chunk whose request wants prompt log-probabilities, else
    #                             the last row of a prompt that is complete, else none
    decodes: Tensor  # [D, hidden]


class ModelRunner:
    """Runs steps of one model on the tensors of one cache."""

    def __init__(self, model: HybridModel, cache: HybridCache) -> None:
        self._model = model
        self._cache = cache
        self.anatomy = Anatomy()
        self.graphs = DecodeGraphs(model, cache) if model.device.type == "cuda" else None

    def run(self, step: Step) -> StepHidden:
        """The hidden rows of a step, good until the next call.

        May raise torch.OutOfMemoryError: then states of the step's sequences may or may not have moved on.
        """
        batch, counts = build_batch(step, packed=self._model.packs)
        written = (batch.layout.chunk_slot, batch.layout.capture_slot, batch.layout.decode_slot)
        self._cache.pool.check_unpublished(Kind.SLOT, torch.cat(written).tolist())
        runs = list(recorded_runs(step, batch.layout))
        recorder = Recorder(self.anatomy, runs) if runs else None
        if recorder is not None:
            batch = replace(batch, effects=recorder)
        elif self.graphs is not None and not step.chunks:
            decodes = self.graphs.run(batch)
            if decodes is not None:
                return StepHidden((), decodes)
        hidden = self.forward(batch)
        if recorder is not None:
            recorder.end()
        *chunks, decodes = torch.split(hidden, [*counts, len(step.decodes)])
        return StepHidden(tuple(chunks), decodes)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Runs the model on a step's batch -> the hidden rows that the batch wants."""
        return self._model.forward(self._placed(batch), self._cache.tensors)

    def batch(self, step: Step) -> tuple[ForwardBatch, list[int]]:
        """What the model is given for a step, and how many hidden rows each chunk gets back."""
        batch, counts = build_batch(step, packed=self._model.packs)
        return self._placed(batch), counts

    def _placed(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch where the model is, with a plan of the pages that its decode rows share if that is no CPU."""
        if self._model.device.type == "cpu":
            return batch
        return replace(batch, layout=with_plan(batch.layout)).to(self._model.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> [L, V] float32. Without device memory for all rows at once, in halves."""
        try:
            return self._model.logits(hidden)
        except torch.OutOfMemoryError:
            if len(hidden) <= MIN_ROWS:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self.logits(half) for half in hidden.chunk(2)])


def build_batch(step: Step, *, packed: bool) -> tuple[ForwardBatch, list[int]]:
    """A step's rows and index tensors, and how many hidden rows each chunk gets back."""
    assert packed or not any(c.cuts for c in step.chunks)
    lengths, num_decode = [c.end - c.start for c in step.chunks], len(step.decodes)
    rows, decode_row, num_rows = place_rows(lengths, num_decode, packed=packed)
    bounds = [tile_bounds(c.end - c.start, (cut - c.start for cut in c.cuts)) for c in step.chunks]
    tiles = [len(b) - 1 for b in bounds]
    first_tile = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
    token_ids, positions = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    kv_rows = np.full(num_rows, -1, np.int64)
    output_rows: list[Rows] = []
    for chunk, row, length in zip(step.chunks, rows, lengths, strict=True):
        token_ids[row : row + length] = chunk.prefill.tokens[chunk.start : chunk.end]
        positions[row : row + length] = np.arange(chunk.start, chunk.end) - chunk.prefill.shift
        kv_rows[row : row + length] = _lease(chunk).rows_to_fill(chunk.start, chunk.end)
        output_rows.append(row + _wanted_rows(chunk))
    for row, sequence in enumerate(step.decodes, start=decode_row):
        token_ids[row], positions[row] = sequence.next_token(), sequence.fed - sequence.prefill.shift
        kv_rows[row] = _lease(sequence).own_row(sequence.fed)
    output_rows.append(np.arange(decode_row, decode_row + num_decode))
    layout = RowLayout(
        num_rows=num_rows,
        num_tiles=int(first_tile[-1]),
        num_decode=num_decode,
        decode_row=decode_row,
        chunk_row=_ints(rows),
        chunk_tile=torch.from_numpy(first_tile[:-1].copy()),
        chunk_tiles=_ints(tiles),
        chunk_start=_ints([c.start for c in step.chunks]),
        chunk_len=_ints(lengths),
        chunk_slot=_ints([_lease(c).slot for c in step.chunks]),
        chunk_fresh=_ints([int(c.start == 0 and not c.prefill.alone) for c in step.chunks]),
        tile_start=_ints([start for b in bounds for start in b[:-1]]),
        capture_chunk=_ints([i for i, c in enumerate(step.chunks) for _ in c.captures]),
        capture_tiles=_ints(
            [b.index(p - c.start) for c, b in zip(step.chunks, bounds, strict=True) for p, _ in c.captures]
        ),
        capture_slot=_ints([slot for c in step.chunks for _, slot in c.captures]),
        decode_slot=_ints([_lease(s).slot for s in step.decodes]),
        decode_len=_ints([s.fed + 1 for s in step.decodes]),
        page_table=_page_table([_lease(c).pages for c in step.chunks] + [_lease(s).pages for s in step.decodes]),
        kv_rows=torch.from_numpy(kv_rows),
    )
    batch = ForwardBatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(positions),
        layout,
        torch.from_numpy(np.concatenate(output_rows).astype(np.int64)),
    )
    return batch, [len(rows) for rows in output_rows[:-1]]


def recorded_runs(step: Step, layout: RowLayout) -> Iterator[tuple[slice, Effect]]:
    """Rows of messages that will be stored, and where what they do to the states is to be noted."""
    for chunk, row in zip(step.chunks, layout.chunk_row.tolist(), strict=True):
        for start, end, effect in chunk.spans:
            yield slice(row + start - chunk.start, row + end - chunk.start), effect
    for row, sequence in enumerate(step.decodes, start=layout.decode_row):
        program = sequence.prefill.program
        if program is not None and program.span is not None:
            yield slice(row, row + 1), program.span.effect


def _lease(owner: Chunk | Sequence) -> Lease:
    lease = owner.prefill.lease
    assert lease is not None
    return lease


def _wanted_rows(chunk: Chunk) -> Rows:
    """Rows of a chunk, counted from its first, whose hidden state somebody reads."""
    length = chunk.end - chunk.start
    if chunk.sequence is not None and chunk.sequence.request.sampling.prompt_logprobs is not None:
        return np.arange(length)
    if chunk.sequence is not None and chunk.end == len(chunk.prefill.tokens):
        return np.array([length - 1])
    return np.arange(0)


def _page_table(pages: list[list[int]]) -> Tensor:
    width = max((len(p) for p in pages), default=0)
    table = np.zeros((len(pages), width), np.int64)
    for row, p in zip(table, pages, strict=True):
        row[: len(p)] = p
    return torch.from_numpy(table)


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
