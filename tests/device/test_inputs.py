"""Rows of the residual stream in the cache: several pages in one item, a page in several, read in other pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_cache.device.inputs import KeptInputs, SentInputs, pieces
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.transfer import upper
from hybrid_cache.work import InputRows, Rows

WIDTH, LAYER = 4, 2


def rows_of(start: int, end: int, **more: object) -> Rows:
    tokens = np.arange(start, end, dtype=np.int32)
    return Rows("m", tokens, start, 0, 0, (), (), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows_in_item", "items"), [(200, (3,)), (100, (5, 0)), (24, tuple(range(9))), (64, (4, 2, 7))]
)
def test_what_is_written_in_one_piece_is_read_in_any(rows_in_item: int, items: tuple[int, ...]) -> None:
    start, end = TILE, 4 * TILE
    memory = torch.full((10, rows_in_item, WIDTH), torch.nan)
    run = InputRows(LAYER, start, end, items)
    hidden = torch.arange(7 * TILE * WIDTH, dtype=torch.float32).view(-1, WIDTH)
    before = 5  # rows of another chunk come first
    keep = KeptInputs(memory, [(0, rows_of(0, before)), (before, rows_of(start, end, kept_inputs=(run,)))])
    keep(LAYER + 1, hidden)
    assert torch.isnan(memory).all(), "another layer's"
    keep(LAYER, hidden)
    assert int((~torch.isnan(memory)).sum()) == (end - start) * WIDTH
    for first, last in ((start, end), (start, 2 * TILE), (2 * TILE, 3 * TILE), (3 * TILE, end)):
        chunk = rows_of(first, last, transfer=upper(6, LAYER), sent_inputs=(run, replace(run, layer=LAYER + 1)))
        found = SentInputs(memory, chunk, last - first + 3)(LAYER)
        assert torch.equal(found[: last - first], hidden[before + first - start : before + last - start])
        assert not found[last - first :].any(), "padding"


def test_pieces_cover_each_token_once() -> None:
    run = InputRows(LAYER, 128, 320, (9, 8))
    found = [*pieces(run, 192, 320, 100)]
    assert [(item, there.start, there.stop) for item, there, _ in found] == [(9, 64, 100), (8, 0, 92)]
    assert [(tokens.start, tokens.stop) for *_, tokens in found] == [(0, 36), (36, 128)]
