"""How packed rows map to sequences: the one argument that every sequence-mixing kernel shares.

A batch has R rows of tokens and no batch axis:

    [0, decode_row)                          chunks of prompts, one after the other
    [decode_row, decode_row + num_decode)    decode rows, one token of one sequence each
    [..., R)                                 padding, where a backend pads; computed and ignored

A *chunk* is a run of consecutive tiles of one sequence. Where results must be exact it starts at a multiple of TILE in
that sequence, so a token sits in the same row of the same tile whether or not earlier tokens came from the cache: this
grid is what makes reuse bit-exact. (Choreography starts chunks anywhere.) Every kernel must give a row the same bits
whatever else is in the batch, and must not let padding rows change a state.

A chunk may have *cuts*: at each a tile ends, and the grid starts again. So it has the same tiles, and gets the same
bits, as the chunks that it would be if it were split there.

    200 tokens, no cut     0..64  64..128  128..192  192..200
    200 tokens, cut 100    0..64  64..100  100..164  164..200

A tile may hold fewer than TILE tokens: the last of a chunk, or one that ends at a cut. On a CPU, where each row
costs time, the next one follows at once (*packed*). Elsewhere a chunk's last tile is padded, so that tile i starts in
row TILE * i. A backend that does not pack never sees a cut: tile i of a chunk starts at its token TILE * i.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from hybrid_cache.kernels.decode_schedule import DecodeSchedule
from hybrid_cache.kernels.grid import TILE


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Index tensors, all int64 on the device of the rows. C chunks, X captures, D decode rows."""

    num_rows: int  # R
    num_tiles: int
    num_decode: int  # D
    decode_row: int  # row of the first decode row

    chunk_row: Tensor  # [C] row of the chunk's first token
    chunk_tile: Tensor  # [C] index of the chunk's first tile, counted over all chunks
    chunk_tiles: Tensor  # [C] number of tiles
    chunk_start: Tensor  # [C] position of its first token in the sequence
    chunk_len: Tensor  # [C] tokens; rows of its tiles past this are padding, or not there
    chunk_slot: Tensor  # [C] state slot read at the start and overwritten at the end
    chunk_fresh: Tensor  # [C] 1 to start from the zero state instead of the slot's content

    tile_start: Tensor  # [num_tiles] tokens of the chunk before the tile, which ends where the next one starts, if any

    # The state after the first `capture_tiles` tiles of a chunk also goes to `capture_slot`.
    capture_chunk: Tensor  # [X]
    capture_tiles: Tensor  # [X] between 1 and chunk_tiles; where nothing packs, chunk_len // TILE
    capture_slot: Tensor  # [X]

    decode_slot: Tensor  # [D] state slot read and overwritten
    decode_len: Tensor  # [D] tokens in the sequence including this row: its position + 1

    page_table: Tensor  # [C + D, max_pages] page of each TILE tokens: chunks first, then decode rows; 0 past the end
    kv_rows: Tensor  # [R] where the row's K and V go, page * TILE + offset; -1 writes nothing

    decode_schedule: DecodeSchedule | None = (
        None  # rows that share pages, made on the host: reading page tables back from a device is slow
    )

    def to(self, device: torch.device) -> "RowLayout":
        """The same layout with its tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def tile_bounds(length: int, cuts: Iterable[int] = ()) -> list[int]:
    """Tokens of a chunk before each of its tiles, then `length`. cuts: tokens of the chunk before each, rising"""
    starts = (range(first, end, TILE) for first, end in pairwise((0, *cuts, length)))
    return [*chain.from_iterable(starts), length]


def place_rows(lengths: Sequence[int], num_decode: int, *, packed: bool) -> tuple[list[int], int, int]:
    """Chunks of `lengths` tokens -> first row of each, of the decode rows, and R."""
    rows, row = [], 0
    for length in lengths:
        rows.append(row)
        row += length if packed else -(-length // TILE) * TILE
    return rows, row, row + num_decode
