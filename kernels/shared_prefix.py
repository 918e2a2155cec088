"""Which decode rows share pages: attention over a shared prefix is computed once for all of them.

Decode attention is cut into splits of PAGES_PER_SPLIT pages at absolute positions, and a split's part of a row's result
depends only on the row's query and on the split's pages. So a split may be computed for all rows that hold the same
pages there, in one piece of work that reads K and V once (Hydragen, Juravsky et al. 2024, arXiv 2402.05099). Rows are
grouped again for each split, which gives a hierarchy of any depth and shape:

    split        0    1    2    3    4
    row 0        A    B    C    D    -        items: (0, rows 0-3), (1, rows 0-2), (1, row 3), (2, rows 0-1),
    row 1        A    B    C    E    F               (2, row 2), (2, row 3), (3, row 0), (3, row 1), (4, row 1)
    row 2        A    B    G    -    -
    row 3        A    H    I    -    -

Schedules are made on the host, once for all layers of a step.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hybrid_cache.kernels.decode_schedule import PAGES_PER_SPLIT, DecodeSchedule, Ints
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout

Bools = npt.NDArray[np.bool_]

MIN_SHARED_ROWS = 2  # an item costs the same time with one row as with as many as fit into its block


def schedule_shared(page_table: Ints, lengths: Ints, min_rows: int = MIN_SHARED_ROWS) -> DecodeSchedule:
    """page_table [D, pages], lengths [D] tokens of each decode row, its own included.

    A split is shared when it lies before the last page of each row and at least `min_rows` rows hold the same pages
    there: such pages are full, and not written to in this step. O(D * pages), with one sort of D * splits keys.
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
    return DecodeSchedule(split[starts], np.append(starts, len(split)), row)


def with_schedule(layout: RowLayout) -> RowLayout:
    """A layout on the host with the schedule of its decode rows, for devices where reading page tables is slow."""
    if not layout.num_decode:
        return layout
    tables = layout.page_table[len(layout.chunk_tile) :]
    return replace(layout, decode_schedule=schedule_shared(tables.numpy(), layout.decode_len.numpy()))


def _sort_key(pages: Ints, sharable: Bools, split: Ints, row: Ints) -> npt.NDArray[np.uint64]:
    """Split in the upper bits, a hash of the pages in the lower ones. Collisions cost sharing, never correctness."""
    mixed = np.zeros(pages.shape[:2], np.uint64)
    for page in range(PAGES_PER_SPLIT):
        mixed = (mixed ^ pages[:, :, page].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    low = np.where(sharable, mixed[split, row] >> np.uint64(24), np.uint64(0))
    return (split.astype(np.uint64) << np.uint64(40)) | low


def _without_small_items(joins: Bools, min_rows: int) -> Bools:
    """Splits items of fewer than `min_rows` entries."""
    if min_rows <= 2:
        return joins
    starts = (~joins).nonzero()[0]
    size = np.diff(np.append(starts, len(joins)))
    kept: Bools = joins & np.repeat(size >= min_rows, size)
    return kept
