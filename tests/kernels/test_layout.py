"""Where the tiles of a chunk lie, and layouts as Python values."""

from dataclasses import replace

import pytest

from hybrid_cache.kernels import runs
from hybrid_cache.kernels.layout import tile_bounds
from hybrid_cache.kernels.runs import Run, arrange

BOUNDS = {
    "nothing": (0, (), [0]),
    "one token": (1, (), [0, 1]),
    "a whole tile": (64, (), [0, 64]),
    "a token more": (65, (), [0, 64, 65]),
    "three tiles": (130, (), [0, 64, 128, 130]),
    "a cut": (200, (100,), [0, 64, 100, 164, 200]),
    "cuts in one tile": (10, (1, 2, 9), [0, 1, 2, 9, 10]),
    "a cut on the grid": (130, (64,), [0, 64, 128, 130]),
    "a cut a token later": (130, (65,), [0, 64, 65, 129, 130]),
}


@pytest.mark.parametrize(("length", "cuts", "bounds"), BOUNDS.values(), ids=BOUNDS.keys())
def test_the_grid_starts_afresh_at_each_cut(length, cuts, bounds):
    assert tile_bounds(length, cuts) == bounds


def run(length, captures=(), cuts=(), start=0):
    return Run(0, length, start, 3, start == 0, list(range(-(-(start + length) // 64))), list(captures), cuts)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_is_read_back_as_its_runs(packed):
    chunks = [
        run(130, [(64, 5), (130, 6)]),
        run(200, [(100, 7), (164, 8), (200, 9)], cuts=(100,)),
        run(1),
        run(90, [(2, 4)], cuts=(1, 2, 80), start=37),
    ]
    layout, placed = arrange(chunks, [run(1, start=70)], packed=packed)
    assert runs.read(layout) == placed
    assert [replace(chunk, row=0) for chunk in placed.chunks] == chunks
    assert layout.chunk_tile.tolist() == [0, 3, 7, 8]
    assert layout.chunk_tiles.tolist() == [3, 4, 1, 5]
    assert layout.num_tiles == len(layout.tile_start) == 13
    assert layout.tile_start.tolist() == [0, 64, 128, 0, 64, 100, 164, 0, 0, 1, 2, 66, 80]
    assert layout.capture_tiles.tolist() == [1, 3, 2, 3, 4, 2]


def test_tiles_of_a_run_are_those_of_its_parts():
    assert run(200, cuts=(100,)).tiles == [(0, 64), (64, 100), (100, 164), (164, 200)]
    assert run(64).tiles == [(0, 64)]


@pytest.mark.parametrize("tokens", [63, 65, 131])
def test_no_state_is_captured_where_no_tile_ends(tokens):
    with pytest.raises(ValueError, match="not in list"):
        arrange([run(130, [(tokens, 5)])], [])
