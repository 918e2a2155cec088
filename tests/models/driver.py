"""Runs sequences through a model by hand: pages, slots and row layouts, with nothing cached and nothing clever."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch, HybridModel
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout, place_rows, tile_bounds
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.spec import AttentionSpec, CacheSpec

NAN = float("nan")


def arena(spec: CacheSpec, num_pages: int, num_slots: int) -> tuple[KVTensors | StateTensors, ...]:
    """Cache tensors full of NaN: whoever reads what nobody wrote will show."""

    def entry(s):
        if isinstance(s, AttentionSpec):
            shape = (num_pages, TILE, s.num_kv_heads, s.head_dim)
            return KVTensors(torch.full(shape, NAN, dtype=s.dtype), torch.full(shape, NAN, dtype=s.dtype))
        conv = torch.full((num_slots, *s.conv_shape), NAN, dtype=s.conv_dtype)
        return StateTensors(conv, torch.full((num_slots, *s.state_shape), NAN))

    return tuple(entry(s) for s in spec.layers)


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    slot: int
    pages: list[int] = field(default_factory=list)
    done: int = 0  # tokens in the cache
    fresh: bool = True  # the next chunk starts from the zero state


@dataclass
class Chunk:
    """Prefill of the next `num_tokens`; `captures` maps tiles of this chunk to slots."""

    sequence: Sequence
    num_tokens: int
    captures: dict[int, int] = field(default_factory=dict)
    outputs: int | None = None  # how many of its last rows are wanted; None for all
    cuts: tuple[int, ...] = ()


class Driver:
    def __init__(self, model: HybridModel, num_pages: int = 48, num_slots: int = 24) -> None:
        self.model = model
        self.cache = arena(model.cache_spec, num_pages, num_slots)
        self._free_pages = list(range(num_pages))[::-1]
        self._free_slots = list(range(num_slots))[::-1]

    def sequence(self, tokens: list[int]) -> Sequence:
        return Sequence(list(tokens), self.slot())

    def slot(self) -> int:
        return self._free_slots.pop()

    def resume(self, source: Sequence, length: int, slot: int, tokens: list[int]) -> Sequence:
        """A sequence that shares the first `length` tokens' pages with `source` and starts from a captured state."""
        state = self.slot()
        for entry in self.cache:
            if isinstance(entry, StateTensors):
                entry.conv[state] = entry.conv[slot]
                entry.state[state] = entry.state[slot]
        return Sequence(list(tokens), state, source.pages[: -(-length // TILE)], done=length, fresh=False)

    @torch.inference_mode()
    def step(self, chunks: list[Chunk], decodes: list[Sequence] = ()) -> list[Tensor]:
        """-> hidden rows [n, hidden] of each chunk, then of each decode."""
        batch, spans = self._batch(chunks, list(decodes))
        hidden = self.model.forward(batch, self.cache)
        return list(hidden.split(spans))

    def prefill(self, tokens: list[int]) -> tuple[Sequence, Tensor]:
        sequence = self.sequence(tokens)
        return sequence, self.step([Chunk(sequence, len(tokens))])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.logits(hidden)

    def greedy(self, sequences: list[Sequence], last: list[Tensor], num_tokens: int) -> list[list[int]]:
        """Batched decoding from the last hidden row of each sequence."""
        new: list[list[int]] = [[] for _ in sequences]
        for _ in range(num_tokens):
            for sequence, out, token in zip(sequences, new, self.logits(torch.stack(last)).argmax(1), strict=True):
                sequence.tokens.append(int(token))
                out.append(int(token))
            last = [rows[0] for rows in self.step([], sequences)]
        return new

    def _batch(self, chunks: list[Chunk], decodes: list[Sequence]) -> tuple[ForwardBatch, list[int]]:
        bounds = [tile_bounds(c.num_tokens, c.cuts) for c in chunks]
        tiles = [len(b) - 1 for b in bounds]
        first, decode_row, num_rows = place_rows([c.num_tokens for c in chunks], len(decodes), packed=self.model.packs)
        tokens = torch.zeros(num_rows, dtype=torch.int64)
        positions = torch.zeros(num_rows, dtype=torch.int64)
        kv_rows = torch.full((num_rows,), -1)
        outputs, spans, tables = [], [], []
        wanted = [c.num_tokens if c.outputs is None else c.outputs for c in chunks] + [1] * len(decodes)
        runs = [(c.sequence, row, c.num_tokens) for c, row in zip(chunks, first, strict=True)]
        runs += [(s, decode_row + i, 1) for i, s in enumerate(decodes)]
        starts = [s.done for s, _, _ in runs]
        for (s, row, n), num_wanted in zip(runs, wanted, strict=True):
            start, end = s.done, s.done + n
            while len(s.pages) * TILE < end:
                s.pages.append(self._free_pages.pop())
            rows, where = slice(row, row + n), torch.arange(start, end)
            tokens[rows] = torch.tensor(s.tokens[start:end])
            positions[rows] = where
            kv_rows[rows] = torch.tensor(s.pages)[where // TILE] * TILE + where % TILE
            outputs.append(torch.arange(row + n - num_wanted, row + n))
            spans.append(num_wanted)
            tables.append(list(s.pages))
            s.done = end
        width = max(map(len, tables))
        captures = [(i, t, slot) for i, c in enumerate(chunks) for t, slot in c.captures.items()]
        layout = RowLayout(
            num_rows=num_rows,
            num_tiles=sum(tiles),
            num_decode=len(decodes),
            decode_row=decode_row,
            chunk_row=_ints(first),
            chunk_tile=_ints([sum(tiles[:i]) for i in range(len(tiles))]),
            chunk_tiles=_ints(tiles),
            chunk_start=_ints(starts[: len(chunks)]),
            chunk_len=_ints([c.num_tokens for c in chunks]),
            chunk_slot=_ints([c.sequence.slot for c in chunks]),
            chunk_fresh=_ints([int(c.sequence.fresh) for c in chunks]),
            tile_start=_ints([start for b in bounds for start in b[:-1]]),
            capture_chunk=_ints([c[0] for c in captures]),
            capture_tiles=_ints([c[1] for c in captures]),
            capture_slot=_ints([c[2] for c in captures]),
            decode_slot=_ints([s.slot for s in decodes]),
            decode_len=_ints([s.done for s in decodes]),
            page_table=_ints([t + [0] * (width - len(t)) for t in tables]),
            kv_rows=kv_rows,
        )
        for c in chunks:
            c.sequence.fresh = False
        return ForwardBatch(tokens, positions, layout, torch.cat(outputs)), spans


def _ints(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
