"""Which decode rows share pages: attention over a shared prefix is computed once for all of them.

Decode attention is cut into splits of PAGES_PER_SPLIT pages at absolute positions, and a split's part of a row's result
depends on the row's query and on the split's pages alone. So a split may be computed for all rows that hold the same
pages there, in one piece of work that reads K and V once (Hydragen, Juravsky et al. 2024, arXiv 2402.05099). Rows are
grouped anew for each split, which gives a hierarchy of any depth and shape:

    split        0    1    2    3    4
    row 0        A    B    C    D    -        items: (0, rows 0-3), (1, rows 0-2), (1, row 3), (2, rows 0-1),
    row 1        A    B    C    E    F               (2, row 2), (2, row 3), (3, row 0), (3, row 1), (4, row 1)
    row 2        A    B    G    -    -
    row 3        A    H    I    -    -

Plans are made on the host, once for all layers of a step.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid_cache.kernels.layout import TILE, RowLayout

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PAGES_PER_SPLIT = 4
MIN_SHARED_ROWS = 2  # an item costs the same time with one row as with as many as fit into its block


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """Items of work: item i computes split `split[i]` for the decode rows `rows[first[i] : first[i + 1]]`.

    Each split that holds tokens of a row is computed for it by exactly one item.
    """

    split: Ints  # [I] ascending
    first: Ints  # [I + 1]
    rows: Ints  # [E] ascending inside an item
    uploaded: dict[tuple[int, torch.device], "DeviceBlocks"] = field(default_factory=dict)  # what `on` has sent

    @property
    def num_items(self) -> int:
        return len(self.split)

    @property
    def num_page_reads_saved(self) -> int:
        """Pages that are not read a second time, of each layer and KV head."""
        return (len(self.rows) - self.num_items) * PAGES_PER_SPLIT

    def blocks(self, rows_per_block: int) -> Ints:
        """-> [B, 3]: split, index into `rows`, number of rows; items come in blocks of at most `rows_per_block`."""
        size = np.diff(self.first)
        num_blocks = -(-size // rows_per_block)
        item = np.repeat(np.arange(self.num_items), num_blocks)
        place = np.arange(len(item)) - np.repeat(num_blocks.cumsum() - num_blocks, num_blocks)
        start = place * rows_per_block
        columns = (self.split[item], self.first[item] + start, np.minimum(size[item] - start, rows_per_block))
        return np.stack(columns, axis=1)

    def on(self, device: torch.device, rows_per_block: int) -> "DeviceBlocks":
        """`blocks` and `rows`, sent to the device at the first call only, in one copy that nobody waits for."""
        key = (rows_per_block, device)
        if key not in self.uploaded:
            blocks = self.blocks(rows_per_block)
            flat = torch.from_numpy(np.concatenate([blocks.ravel(), self.rows]))
            if device.type == "cuda":
                flat = flat.pin_memory()
            self.uploaded[key] = DeviceBlocks(len(blocks), flat.to(device, non_blocking=True))
        return self.uploaded[key]


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """A plan where kernels can read it: `data` holds [num_blocks, 3] as in `DecodePlan.blocks`, then the rows."""

    num_blocks: int
    data: Tensor  # [3 * num_blocks + E] int64


def plan_shared(page_table: Ints, lengths: Ints, min_rows: int = MIN_SHARED_ROWS) -> DecodePlan:
    """page_table [D, pages], lengths [D] tokens of each decode row, its own included.

    A split is shared when it lies before the last page of each row and at least `min_rows` rows hold the same pages
    there: such pages are full, and nobody writes to them in this step. O(D * pages), with one sort of D * splits keys.
    """
    num_rows, num_pages = page_table.shape
    num_splits = -(-num_pages // PAGES_PER_SPLIT)
    padded = np.zeros((num_rows, num_splits * PAGES_PER_SPLIT), np.int64)
    padded[:, :num_pages] = page_table
    pages = padded.reshape(num_rows, num_splits, PAGES_PER_SPLIT).transpose(1, 0, 2)

    last_page = (lengths - 1) // TILE
    splits = np.arange(num_splits)[:, None]
    split, row = np.nonzero(splits * PAGES_PER_SPLIT <= last_page)  # by split, then by row
    sharable = ((splits + 1) * PAGES_PER_SPLIT <= last_page)[split, row]
    order = np.argsort(_sort_key(pages, sharable, split, row), kind="stable")
    split, row, sharable = split[order], row[order], sharable[order]

    joins = np.zeros(len(split), bool)  # the entry belongs to the item of the one before it
    joins[1:] = sharable[1:] & sharable[:-1] & (split[1:] == split[:-1])
    pairs = joins.nonzero()[0]
    held = pages[split[pairs], row[pairs]], pages[split[pairs - 1], row[pairs - 1]]
    joins[pairs] = (held[0] == held[1]).all(axis=1)
    joins = _without_small_items(joins, min_rows)
    starts = (~joins).nonzero()[0]
    return DecodePlan(split[starts], np.append(starts, len(split)), row)


def with_plan(layout: RowLayout) -> RowLayout:
    """A layout on the host with the plan of its decode rows, for devices that must not be asked for page tables."""
    if not layout.num_decode:
        return layout
    tables = layout.page_table[len(layout.chunk_tile) :]
    return replace(layout, decode_plan=plan_shared(tables.numpy(), layout.decode_len.numpy()))


def _sort_key(pages: Ints, sharable: Bools, split: Ints, row: Ints) -> npt.NDArray[np.uint64]:
    """Split in the upper bits, a hash of the pages in the lower ones. Collisions cost sharing, never correctness."""
    mixed = np.zeros(pages.shape[:2], np.uint64)
    for page in range(PAGES_PER_SPLIT):
        mixed = (mixed ^ pages[:, :, page].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    low = np.where(sharable, mixed[split, row] >> np.uint64(24), np.uint64(0))
    return (split.astype(np.uint64) << np.uint64(40)) | low


def _without_small_items(joins: Bools, min_rows: int) -> Bools:
    """Takes items of fewer than `min_rows` entries apart."""
    if min_rows <= 2:
        return joins
    starts = (~joins).nonzero()[0]
    size = np.diff(np.append(starts, len(joins)))
    kept: Bools = joins & np.repeat(size >= min_rows, size)
    return kept
