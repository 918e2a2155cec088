"""How packed rows map to sequences: the one argument that every sequence-mixing kernel shares.

A batch has R rows of tokens and no batch axis:

    [0, TILE * num_tiles)                    prefill tiles, TILE rows each; the last tile of a chunk is zero-padded
    [TILE * num_tiles, ... + num_decode)     decode rows, one token of one sequence each
    [..., R)                                 padding, so that R >= MIN_ROWS; computed and ignored

On a CPU, where a row less is time saved, R ends with the last token: without decode rows, the rest of the last tile is
not there (`end_of`).

A *chunk* is a run of consecutive tiles of one sequence. It starts at a multiple of TILE in that sequence, so a
token sits in the same row of the same tile whether or not earlier tokens came from the cache: this grid is what makes
reuse bit-exact. Every kernel must give a row the same bits whatever else is in the batch, and must not let
padded rows change a state.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hybrid_cache.kernels.shared_prefix import DecodePlan

TILE = 64  # rows; also the tokens of a KV page
MIN_ROWS = 4  # fewer rows take another code path, with other rounding, in some matrix multiplications


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Index tensors, all int64 on the device of the rows. C chunks, X captures, D decode rows."""

    num_rows: int  # R
    num_tiles: int
    num_decode: int  # D

    chunk_tile: Tensor  # [C] index of the chunk's first tile
    chunk_tiles: Tensor  # [C] number of tiles
    chunk_start: Tensor  # [C] position of its first token in the sequence, a multiple of TILE
    chunk_len: Tensor  # [C] tokens; rows past this are padding
    chunk_slot: Tensor  # [C] state slot read at the start and overwritten at the end
    chunk_fresh: Tensor  # [C] 1 to start from the zero state instead of the slot's content

    # The state after the first `capture_tiles` tiles of a chunk also goes to `capture_slot`.
    capture_chunk: Tensor  # [X]
    capture_tiles: Tensor  # [X] between 1 and chunk_len // TILE
    capture_slot: Tensor  # [X]

    decode_slot: Tensor  # [D] state slot read and overwritten
    decode_len: Tensor  # [D] tokens in the sequence including this row: its position + 1

    page_table: Tensor  # [C + D, max_pages] page of each TILE tokens: chunks first, then decode rows; 0 past the end
    kv_rows: Tensor  # [R] where the row's K and V go, page * TILE + offset; -1 writes nothing

    decode_plan: "DecodePlan | None" = None  # for devices that must not be asked for page tables: who shares pages

    def to(self, device: torch.device) -> "RowLayout":
        """The same layout with its tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def end_of(num_tiles: int, num_decode: int, last_tile_tokens: int, *, trim: bool) -> int:
    """R of a batch. `trim` leaves out what follows the last token of the last tile, if no decode rows do."""
    rows = num_tiles * TILE + num_decode
    if trim and num_tiles and not num_decode:
        rows -= TILE - last_tile_tokens
    return max(rows, MIN_ROWS)
