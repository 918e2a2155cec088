"""Carries out the work of engine steps on one memory, for a model and others of its shape; decides nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.choreography import commands as choreography
from hybrid_cache.device.adapted import AdaptedModel, Trunk, head_adapters, row_adapters, trunk_of
from hybrid_cache.device.batch import ForwardBatch, HybridModel, go_on
from hybrid_cache.device.composition import Composer
from hybrid_cache.device.cuda_graphs import DecodeGraphs
from hybrid_cache.device.inputs import HeldInputs, KeptInputs, SentInputs
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.sampler import choose_tokens, log_probabilities
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout, place_rows, tile_bounds
from hybrid_cache.kernels.ops import RowAdapters
from hybrid_cache.kernels.shared_prefix import with_schedule
from hybrid_cache.sampling import TokenChooser, TokenLogprob
from hybrid_cache.work import Command, Noted, OutOfDeviceMemory, PassFailed, Rows, Work


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden rows that a piece of work asks for, good until the next one."""

    chunks: tuple[Tensor, ...]  # [rows wanted of each, hidden]
    decodes: Tensor  # [decodes, hidden]
    kept: Tensor  # [kept, hidden]


@dataclass(frozen=True, slots=True)
class Part:
    """What one model computes of a piece of work in a pass, with the adapters beside it."""

    model: HybridModel  # a trunk
    work: Work
    chunks: Sequence[int]  # its places among those of the whole
    decodes: Sequence[int]
    held: Mapping[int, HeldInputs] = field(default_factory=dict)  # by such a place: what is read in a later part


class Worker:
    """Runs models on one memory, one after the other, adapters together with the model that they stand beside. What a
    test or a benchmark watches or forces, it overrides here.

    models: by fingerprint; all have the shape of the first one
    """

    def __init__(
        self, model: HybridModel, memory: CacheMemory, spare_slot: Callable[[], int | None] = lambda: None
    ) -> None:
        """spare_slot: takes a state slot that no sequence owns, for rows that pad a batch; None without room"""
        self.model = model
        self.models = {model.fingerprint: model}
        self.memory = memory
        self.composer = Composer(memory, model.ops, model.cache_spec.effect_sums)
        self.graphs = dict[str, DecodeGraphs]()  # by fingerprint
        self._spare_slot = spare_slot
        self._record(model)

    def add(self, model: HybridModel) -> None:
        """Takes in another model of the same shape."""
        self.models[model.fingerprint] = model
        self._record(model)

    def remove(self, fingerprint: str) -> None:
        """Forgets a model, for which there must be no work any more."""
        trunk = trunk_of(self.models.pop(fingerprint))
        self.graphs.pop(fingerprint, None)
        self.composer.forget(fingerprint)
        if all(trunk_of(model) is not trunk for model in self.models.values()):
            self.composer.forget(trunk.fingerprint)

    def learn_effects(self, fingerprint: str) -> None:
        """Has one token computed to learn where a model has states and keys, unless a pass has shown it: for messages
        that came from a disk.
        """
        if self.composer.maps[fingerprint].known or not self.memory.holds_messages:
            return
        with torch.inference_mode(), self.composer.apart(), self.memory.borrowed() as (slot, page, items):
            rows = Rows(
                *(fingerprint, np.zeros(1, np.int32), 0, 0, slot, (page,), np.array([page * TILE]), True),
                noted=(Noted(0, 1, items, first=True),),
            )
            self._forward(Part(trunk_of(self.models[fingerprint]), Work(chunks=(rows,)), (0,), ()), go_on)

    def _record(self, model: HybridModel) -> None:
        if model.device.type == "cuda" and not isinstance(model, AdaptedModel):
            self.graphs[model.fingerprint] = DecodeGraphs(model, self.memory, self._spare_slot())

    def run(self, work: Work, pause: Callable[[], None] = go_on) -> Hidden:
        """pause: called between layers on a CPU; it may have work on other sequences done

        Raises OutOfDeviceMemory, or PublishedBytesChanged if the memory compares what was published.
        """
        with torch.inference_mode():
            if work.commands:
                self._carry_out(work.commands)
            try:
                return self._pass(work, pause)
            except HybridCacheError:
                raise
            except Exception as error:
                raise failure(error) from error

    def _carry_out(self, commands: Iterable[Command]) -> None:
        """All of them, in order. Raises OutOfDeviceMemory once the others are done if some could not be."""
        lost, why = list[Command](), ""
        for command in commands:
            try:
                self.do(command)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lost.append(command)
                why = str(error)
        if lost:
            raise OutOfDeviceMemory(why, tuple(lost))

    def do(self, command: Command) -> None:
        if isinstance(command, choreography.Command):
            self.composer.run(command)
        else:
            self.memory.run(command)

    def _pass(self, work: Work, pause: Callable[[], None]) -> Hidden:
        hidden = nothing = self.memory.rows[:0]
        if work.chunks or work.decodes:
            hidden = self.memory.rows = self._forward_all(work, pause)
        kept = self.memory.hidden(work.kept) if work.kept else nothing
        if not work.chunks:
            return Hidden((), hidden, kept)
        *chunks, decodes = torch.split(hidden, _num_wanted(work))
        return Hidden(tuple(chunks), decodes, kept)

    def _forward_all(self, work: Work, pause: Callable[[], None]) -> Tensor:
        parts = self._parts(work)
        if len(parts) == 1:
            return self._forward(parts[0], pause)
        chunks: list[Tensor | None] = [None] * len(work.chunks)
        decodes: list[Tensor | None] = [None] * len(work.decodes)
        for part in parts:
            *some, singles = torch.split(self._forward(part, pause), _num_wanted(part.work))
            for place, rows in zip(part.chunks, some, strict=True):
                chunks[place] = rows.clone()
            for place, row in zip(part.decodes, singles, strict=True):
                decodes[place] = row[None].clone()  # a graph's rows are good until its next replay
        return torch.cat([rows for rows in (*chunks, *decodes) if rows is not None])

    def _parts(self, work: Work) -> list[Part]:
        """Transfers each for themselves, the others by trunk, in the order in which they appear; last what is made
        beside chunks, from what these hold for it.
        """
        models, rows = self.models, (*work.chunks, *work.decodes)
        if len(models) == 1:
            return [Part(self.model, work, range(len(work.chunks)), range(len(work.decodes)))]
        trunks = {name: trunk_of(models[name]) for name in dict.fromkeys(each.model for each in rows)}
        plain = {id(trunks[each.model]): trunks[each.model] for each in rows if each.transfer is None}
        sent = [index for index, chunk in enumerate(work.chunks) if chunk.transfer is not None]
        if not sent and len(plain) == 1:
            (first,) = plain.values()
            return [Part(first, work, range(len(work.chunks)), range(len(work.decodes)))]
        held = _held(work)
        alone = [Part(trunks[work.chunks[i].model], Work((), (work.chunks[i],)), (i,), (), held) for i in sent]
        parts = [part for part in alone if part.work.chunks[0].beside is None]
        for model in plain.values():
            chunks, decodes = (
                [i for i, each in enumerate(some) if trunks[each.model] is model and each.transfer is None]
                for some in (work.chunks, work.decodes)
            )
            own = Work((), tuple(work.chunks[i] for i in chunks), tuple(work.decodes[i] for i in decodes))
            parts.append(Part(model, own, chunks, decodes, held))
        return parts + [part for part in alone if part.work.chunks[0].beside is not None]

    def _forward(self, part: Part, pause: Callable[[], None]) -> Tensor:
        work, model = part.work, part.model
        batch = build_batch(work, packed=model.packs)
        on_cpu = model.device.type == "cpu"  # elsewhere the layers are only queued here
        adapters = row_adapters(work, batch.layout, self.models) if len(self.models) > 1 else None
        batch = replace(batch, adapters=adapters, pause=pause if on_cpu else batch.pause)
        if work.chunks:
            batch = self._with_inputs(part, batch)
        recorder = self.composer.recorder(model.fingerprint, noted_rows(work, batch.layout))
        graphs = self.graphs.get(model.fingerprint)
        if recorder is not None:
            self.composer.alias(model.fingerprint, (rows.model for rows in (*work.chunks, *work.decodes)))
            batch = replace(batch, effects=recorder)
        elif graphs is not None and not work.chunks and batch.adapters is None:
            decodes = graphs.run(batch)
            if decodes is not None:
                return decodes
        hidden = self.forward(part, batch)
        if recorder is not None:
            recorder.end()
        return hidden

    def _with_inputs(self, part: Part, batch: ForwardBatch) -> ForwardBatch:
        """The batch of a part with chunks, which keeps what layers are given or takes what another model left."""
        work, memory = part.work, self.memory.inputs
        if work.chunks[0].transfer is not None:
            rows = work.chunks[0]
            held = None if rows.beside is None else part.held[rows.beside]
            return replace(batch, inputs=SentInputs(memory, rows, batch.layout.num_rows, held))
        chunks = [*zip(batch.layout.chunk_row.tolist(), part.chunks, work.chunks, strict=True)]
        taps = list[Callable[[int, Tensor], None]]()
        for first, place, rows in chunks:
            if place in part.held:
                part.held[place].rows = slice(first, first + len(rows.tokens))
                taps.append(part.held[place])
        if any(rows.kept_inputs for rows in work.chunks):
            taps.append(KeptInputs(memory, [(first, rows) for first, _, rows in chunks]))
        return replace(batch, tap=partial(_tap_all, taps)) if taps else batch

    def forward(self, part: Part, batch: ForwardBatch) -> Tensor:
        """Runs a part's model on the batch of its work -> the hidden rows [L, hidden] that the batch wants."""
        return part.model.forward(self.placed(batch), self.memory.tensors)

    def placed(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch on the model's device; unless that is a CPU, with a schedule for pages that decode rows share."""
        if self.model.device.type == "cpu":
            return batch
        return replace(batch, layout=with_schedule(batch.layout)).to(self.model.device)

    def free_memory(self) -> None:
        """To be called once nothing holds the tensors of a step that ran out of memory."""
        torch.cuda.empty_cache()

    # Tokens

    def choose(
        self,
        rows: Sequence[Tensor],
        models: Sequence[str],
        choosers: Sequence[TokenChooser],
        num_top: Sequence[int | None],
    ) -> list[tuple[int, TokenLogprob | None]]:
        """Hidden rows [hidden], the fingerprint of a model and a chooser for each -> its next token, with
        log-probabilities where a number is asked.

        num_top: how many most likely tokens to report with the chosen one; None for no log-probabilities
        """
        try:
            with torch.inference_mode():
                logits = self.all_logits(rows, models)
                tokens = self.pick(logits, choosers)
                scored = [i for i, n in enumerate(num_top) if n is not None]
                if not scored:
                    return [(token, None) for token in tokens]
                some = logits if len(scored) == len(tokens) else logits[scored]
                wanted = [n for n in num_top if n is not None]
                scores = log_probabilities(some, [tokens[i] for i in scored], wanted, self.model.ops)
                known = dict(zip(scored, scores, strict=True))
                return [(token, known.get(i)) for i, token in enumerate(tokens)]
        except HybridCacheError:
            raise
        except Exception as error:
            raise failure(error) from error

    def pick(self, logits: Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
        """The next token of each row of logits [S, V]."""
        return choose_tokens(logits, choosers, self.model.ops)

    def all_logits(self, rows: Sequence[Tensor], models: Sequence[str]) -> Tensor:
        """Hidden rows [hidden], the fingerprint of a model for each -> [S, V] float32."""
        if len(self.models) == 1:
            return self.logits(self.model, torch.stack(list(rows)))
        all_models = [self.models[model] for model in models]
        trunks = [trunk_of(model) for model in all_models]
        if all(trunk is trunks[0] for trunk in trunks):
            return self.logits(trunks[0], torch.stack(list(rows)), head_adapters(all_models))
        found: list[Tensor | None] = [None] * len(rows)
        for trunk in {id(trunk): trunk for trunk in trunks}.values():
            places = [i for i, other in enumerate(trunks) if other is trunk]
            adapters = head_adapters([all_models[i] for i in places])
            logits = self.logits(trunk, torch.stack([rows[i] for i in places]), adapters)
            for i, row in zip(places, logits, strict=True):
                found[i] = row
        return torch.stack([row for row in found if row is not None])

    @torch.inference_mode()
    def score(self, model: str, rows: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of known tokens that the hidden rows [L, hidden] predict; logits of a tile at a time.

        model: the fingerprint of the one that made the rows
        """
        found = list[TokenLogprob]()
        try:
            for start in range(0, len(tokens), TILE):
                some = tokens[start : start + TILE]
                logits = self.logits(self.models[model], rows[start : start + TILE])
                found += log_probabilities(logits, some, [num_top] * len(some), self.model.ops)
            return found
        except HybridCacheError:
            raise
        except Exception as error:
            raise failure(error) from error

    def logits(self, model: HybridModel, hidden: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """hidden [L, hidden] -> [L, V] float32. Without device memory for all rows at once, in halves.

        adapters: of the rows, in a trunk
        """
        try:
            return model.logits(hidden) if adapters is None else cast(Trunk, model).logits(hidden, adapters)
        except (RuntimeError, MemoryError) as error:
            if len(hidden) == 1 or not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        halves = torch.arange(len(hidden)).chunk(2)
        parts = ((hidden[half[0] : half[-1] + 1], adapters and adapters.of(half)) for half in halves)
        return torch.cat([self.logits(model, rows, some) for rows, some in parts])


def _held(work: Work) -> dict[int, HeldInputs]:
    """Of chunks beside which others are made."""
    layers: dict[int, set[int]] = {}
    for rows in work.chunks:
        if rows.beside is not None and rows.transfer is not None:
            layers.setdefault(rows.beside, set()).update(rows.transfer.reads)
    return {place: HeldInputs(reads) for place, reads in layers.items()}


def _tap_all(taps: Sequence[Callable[[int, Tensor], None]], layer: int, hidden: Tensor) -> None:
    for tap in taps:
        tap(layer, hidden)


def _num_wanted(work: Work) -> list[int]:
    """Hidden rows of each chunk, and those of all decodes."""
    return [*(rows.num_wanted for rows in work.chunks), len(work.decodes)]


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine: for that torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "not enough memory" in str(error))
    )


def failure(error: Exception) -> OutOfDeviceMemory | PassFailed:
    """What to raise for an error of a pass that is none of ours."""
    return OutOfDeviceMemory(str(error)) if is_out_of_memory(error) else PassFailed(f"{type(error).__name__}: {error}")


def build_batch(work: Work, *, packed: bool) -> ForwardBatch:
    """The rows and index tensors of a pass."""
    chunks, decodes = work.chunks, work.decodes
    assert packed or not any(c.cuts for c in chunks)
    lengths, num_decode = [len(c.tokens) for c in chunks], len(decodes)
    rows, decode_row, num_rows = place_rows(lengths, num_decode, packed=packed)
    bounds = [tile_bounds(c.end - c.start, (cut - c.start for cut in c.cuts)) for c in chunks]
    tiles = [len(b) - 1 for b in bounds]
    first_tile = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
    token_ids, positions = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    kv_rows = np.full(num_rows, -1, np.int64)
    output_rows = []
    for chunk, row, length in zip(chunks, rows, lengths, strict=True):
        token_ids[row : row + length] = chunk.tokens
        positions[row : row + length] = np.arange(chunk.start, chunk.end) - chunk.shift
        kv_rows[row : row + length] = chunk.kv_rows
        output_rows.append(np.arange(row + length - chunk.num_wanted, row + length))
    for row, decode in enumerate(decodes, start=decode_row):
        token_ids[row], positions[row], kv_rows[row] = decode.tokens[0], decode.start - decode.shift, decode.kv_rows[0]
    output_rows.append(np.arange(decode_row, decode_row + num_decode))
    layout = RowLayout(
        num_rows=num_rows,
        num_tiles=int(first_tile[-1]),
        num_decode=num_decode,
        decode_row=decode_row,
        chunk_row=_ints(rows),
        chunk_tile=torch.from_numpy(first_tile[:-1].copy()),
        chunk_tiles=_ints(tiles),
        chunk_start=_ints([c.start for c in chunks]),
        chunk_len=_ints(lengths),
        chunk_slot=_ints([c.slot for c in chunks]),
        chunk_fresh=_ints([int(c.fresh) for c in chunks]),
        tile_start=_ints([start for b in bounds for start in b[:-1]]),
        capture_chunk=_ints([i for i, c in enumerate(chunks) for _ in c.captures]),
        capture_tiles=_ints([b.index(p - c.start) for c, b in zip(chunks, bounds, strict=True) for p, _ in c.captures]),
        capture_slot=_ints([slot for c in chunks for _, slot in c.captures]),
        decode_slot=_ints([d.slot for d in decodes]),
        decode_len=_ints([d.end for d in decodes]),
        page_table=_page_table([rows.pages for rows in (*chunks, *decodes)]),
        kv_rows=torch.from_numpy(kv_rows),
    )
    wanted = torch.from_numpy(np.concatenate(output_rows).astype(np.int64))
    return ForwardBatch(torch.from_numpy(token_ids), torch.from_numpy(positions), layout, wanted)


def noted_rows(work: Work, layout: RowLayout) -> Iterator[tuple[slice, Noted]]:
    """Rows of the batch that belong to messages which will be stored."""
    first_rows = (*layout.chunk_row.tolist(), *range(layout.decode_row, layout.decode_row + len(work.decodes)))
    for rows, first in zip((*work.chunks, *work.decodes), first_rows, strict=True):
        for noted in rows.noted:
            yield slice(first + noted.start - rows.start, first + noted.end - rows.start), noted


def _page_table(pages: Sequence[Sequence[int]]) -> Tensor:
    width = max((len(p) for p in pages), default=0)
    table = np.zeros((len(pages), width), np.int64)
    for row, p in zip(table, pages, strict=True):
        row[: len(p)] = p
    return torch.from_numpy(table)


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
