"""`RowLayout` as Python values: what a loop over sequences needs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout, place_rows, tile_bounds


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one sequence in this batch: a chunk, or one decode row.

    rows      [row, row + length)
    positions [start, start + length)
    """

    row: int
    length: int
    start: int
    slot: int
    fresh: bool
    pages: list[int]  # pages of positions [0, start + length)
    captures: list[tuple[int, int]]  # (tokens of the run that end a tile, slot that gets the state after them)
    cuts: tuple[int, ...] = ()  # tokens of the run after which a tile ends and the grid starts afresh, rising

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """(start, end) of each tile, in tokens of the run."""
        return list(pairwise(tile_bounds(self.length, self.cuts)))


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs of a layout, chunks first, then decode rows, in the order of `RowLayout.page_table`."""

    chunks: list[Run]
    decodes: list[Run]

    def __iter__(self) -> Iterator[Run]:
        yield from self.chunks
        yield from self.decodes


def read(layout: RowLayout) -> Runs:
    lengths, tile_start = layout.chunk_len.tolist(), layout.tile_start.tolist()
    bounds = [  # of the tiles of each chunk
        [*tile_start[first : first + count], length]
        for first, count, length in zip(layout.chunk_tile.tolist(), layout.chunk_tiles.tolist(), lengths, strict=True)
    ]
    captures: dict[int, list[tuple[int, int]]] = {}
    points = (layout.capture_chunk.tolist(), layout.capture_tiles.tolist(), layout.capture_slot.tolist())
    for chunk, tiles, slot in zip(*points, strict=True):
        captures.setdefault(chunk, []).append((bounds[chunk][tiles], slot))
    tables = layout.page_table.tolist()
    columns = (
        layout.chunk_row.tolist(),
        lengths,
        layout.chunk_start.tolist(),
        layout.chunk_slot.tolist(),
        layout.chunk_fresh.tolist(),
        map(_cuts, bounds),
    )
    chunks = [
        Run(row, length, start, slot, bool(fresh), _pages(tables[i], start + length), captures.get(i, []), cuts)
        for i, (row, length, start, slot, fresh, cuts) in enumerate(zip(*columns, strict=True))
    ]
    decodes = [
        Run(layout.decode_row + i, 1, length - 1, slot, False, _pages(tables[len(chunks) + i], length), [])
        for i, (slot, length) in enumerate(zip(layout.decode_slot.tolist(), layout.decode_len.tolist(), strict=True))
    ]
    return Runs(chunks, decodes)


def _cuts(bounds: list[int]) -> tuple[int, ...]:
    return tuple(end for start, end in pairwise(bounds[:-1]) if end - start < TILE)


def _pages(table: list[int], num_tokens: int) -> list[int]:
    return table[: -(-num_tokens // TILE)]


def arrange(chunks: Sequence[Run], decodes: Sequence[Run], *, packed: bool = False) -> tuple[RowLayout, Runs]:
    """The layout of a batch, and the same runs with `Run.row` filled in; what it was before does not matter."""
    rows, decode_row, num_rows = place_rows([chunk.length for chunk in chunks], len(decodes), packed=packed)
    placed = [replace(chunk, row=row) for chunk, row in zip(chunks, rows, strict=True)]
    runs = Runs(placed, [replace(decode, row=decode_row + i) for i, decode in enumerate(decodes)])
    bounds = [tile_bounds(chunk.length, chunk.cuts) for chunk in chunks]
    tiles = [len(of_chunk) - 1 for of_chunk in bounds]
    kv_rows = torch.full((num_rows,), -1)
    table = torch.zeros(len(placed) + len(decodes), max((len(run.pages) for run in runs), default=0), dtype=torch.int64)
    for i, run in enumerate(runs):
        positions = torch.arange(run.start, run.end)
        table[i, : len(run.pages)] = torch.tensor(run.pages)
        kv_rows[run.row : run.row + run.length] = table[i, positions // TILE] * TILE + positions % TILE
    captures = [(i, bounds[i].index(tokens), slot) for i, run in enumerate(placed) for tokens, slot in run.captures]
    layout = RowLayout(
        num_rows=num_rows,
        num_tiles=sum(tiles),
        num_decode=len(decodes),
        decode_row=decode_row,
        chunk_row=_index(rows),
        chunk_tile=_index(sum(tiles[:i]) for i in range(len(tiles))),
        chunk_tiles=_index(tiles),
        chunk_start=_index(run.start for run in placed),
        chunk_len=_index(run.length for run in placed),
        chunk_slot=_index(run.slot for run in placed),
        chunk_fresh=_index(int(run.fresh) for run in placed),
        tile_start=_index(start for of_chunk in bounds for start in of_chunk[:-1]),
        capture_chunk=_index(chunk for chunk, _, _ in captures),
        capture_tiles=_index(tiles for _, tiles, _ in captures),
        capture_slot=_index(slot for _, _, slot in captures),
        decode_slot=_index(run.slot for run in decodes),
        decode_len=_index(run.end for run in decodes),
        page_table=table,
        kv_rows=kv_rows,
    )
    return layout, runs


def _index(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
