"""The two promises of `kernels/ops.py`, bit for bit."""

from dataclasses import replace

import pytest
import torch

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.parity import BATCHES, play
from hybrid_cache.kernels.problems import LinearAttentionProblem, Mamba2Problem, Piece, Stream, run_batch, token
from hybrid_cache.kernels.selfcheck import check_exact, mismatches
from hybrid_cache.kernels.torch_ops import TorchOps

LINEARS = [(768, 3352), (1536, 768), (768, 256), (192, 100), (128, 66), (100, 36), (2048, 64), (4096, 96)]
MANY_ROWS = 17 * TILE + 12  # 16 tiles of prefill, a tile more, and decode rows


def test_no_bit_depends_on_cuts_company_places_or_unused_memory(ops, problem, threads):
    assert mismatches(ops, problem) == []


def test_all_operations_are_exact(ops, dtype, threads):
    assert check_exact(ops, dtype) == []


@pytest.mark.parametrize("size", LINEARS, ids=str)
def test_a_row_of_a_product_is_the_same_for_each_number_of_rows(ops, dtype, threads, size):
    rng = torch.Generator().manual_seed(0)
    linear = ops.linear(torch.randn(size[1], size[0], generator=rng).to(dtype))
    x = torch.randn(MANY_ROWS, size[0], generator=rng).to(dtype)
    expected = torch.cat([linear(tile) for tile in x.split(TILE)])
    for num_rows in (1, 2, 3, 4, 5, 31, TILE + 1, 4 * TILE + 4, 8 * TILE, MANY_ROWS):
        assert torch.equal(linear(x[:num_rows]), expected[:num_rows])
        assert torch.equal(linear(x[-num_rows:]), expected[-num_rows:])


def test_a_decode_row_is_the_same_next_to_a_prefill(ops, problem):
    rng = torch.Generator().manual_seed(2)
    decoding = Stream(problem.inputs(40, rng), 0, [1])
    arriving = Stream(problem.inputs(100, rng), 1, [2, 3])
    results = []
    for chunks in ([], [Piece(arriving, 0, 100)]):
        cache = problem.cache(4, 0.0)
        run_batch(ops, problem, cache, [Piece(decoding, 0, 39)])
        results.append(run_batch(ops, problem, cache, chunks, [token(decoding, 39)])[-1])
    assert torch.equal(*results)


def test_a_capture_changes_no_output(ops, problem):
    stream = Stream(problem.inputs(130, torch.Generator().manual_seed(4)), 0, [0, 1, 2])
    captured = ((TILE, 2), (2 * TILE, 3))
    plain, with_captures = (
        run_batch(ops, problem, problem.cache(4, 0.0), [Piece(stream, 0, 130, captures)])[0]
        for captures in ((), captured)
    )
    assert torch.equal(plain, with_captures)


@pytest.mark.parametrize("length", [1, 7, 65, 70, 113])
def test_a_row_does_not_depend_on_later_tokens(ops, problem, length):
    stream = Stream(problem.inputs(130, torch.Generator().manual_seed(5)), 0, [0, 1, 2])
    short, long = (run_batch(ops, problem, problem.cache(4, 0.0), [Piece(stream, 0, n)])[0] for n in (length, 130))
    assert torch.equal(short, long[:length])


def test_padding_between_chunks_changes_no_bit(ops, problem, monkeypatch):
    packed = play(ops, problem, BATCHES["prefill and decode"])
    monkeypatch.setattr(ops, "packs", False)
    monkeypatch.setattr("hybrid_cache.kernels.parity.run_batch", lambda *args: run_batch(*args, padding=float("nan")))
    padded = play(ops, problem, BATCHES["prefill and decode"])
    for found, right in zip([*padded[0], *padded[1]], [*packed[0], *packed[1]], strict=True):
        assert torch.equal(found.nan_to_num(nan=-1.0), right.nan_to_num(nan=-1.0))


class LeakyOps(TorchOps):
    """Lets the batch leak into each row, in the last bits."""

    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, eps) * (1 + 1e-6 * len(x))

    def mamba2(self, zxbcdt, weights, layout, cache):
        y = super().mamba2(zxbcdt, weights, layout, cache)
        return y * (1 + 1e-6 * layout.num_tiles)


def test_the_start_up_check_finds_a_leak():
    failed = check_exact(LeakyOps(), torch.float32)
    assert any("rms_norm" in probe for probe in failed)
    assert any("mamba2" in probe for probe in failed)
    assert not any("attention" in probe for probe in failed)


class GridOps(TorchOps):
    """Takes no notice of cuts."""

    def _runs(self, layout):
        runs = super()._runs(layout)
        return replace(runs, chunks=[replace(run, cuts=()) for run in runs.chunks])


def test_the_start_up_check_finds_cuts_that_are_overlooked():
    [failed] = mismatches(GridOps(), LinearAttentionProblem(torch.float32, torch.Generator().manual_seed(0)))
    assert "chunk with cuts" in failed


def test_the_start_up_check_takes_the_shapes_of_a_model():
    problem = Mamba2Problem(torch.float32, torch.Generator().manual_seed(0), num_heads=2, d_state=16)
    assert check_exact(TorchOps(), torch.float32, linears=[(64, 32)], problems=[problem]) == []
