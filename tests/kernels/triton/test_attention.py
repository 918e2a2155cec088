"""Attention in Triton against the reference, and bit for bit: in any company, cut anywhere, sharing pages or not."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from hybrid_cache.kernels import reference, selfcheck
from hybrid_cache.kernels.decode_schedule import PAGES_PER_SPLIT
from hybrid_cache.kernels.grid import MIN_ROWS, TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.problems import AttentionProblem, Stream, pool
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.shared_prefix import schedule_shared
from hybrid_cache.kernels.triton_kernels import attention
from hybrid_cache.kernels.unsupported import UnsupportedShape
from tests.kernels.test_against_reference import BATCHES, assert_close, play
from tests.kernels.test_off_the_grid import pieces_of

# A prompt is always resumed from a captured state too.
CUTS = [(), pytest.param(((1, 2),), marks=pytest.mark.slow)]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPAN = PAGES_PER_SPLIT * TILE


def on_device(layout):
    tensors = {f.name: getattr(layout, f.name) for f in fields(layout)}
    return replace(layout, **{name: t.to(DEVICE) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


class TritonAttention:
    """`Ops` as far as these tests go, for tensors on the CPU."""

    packs = False

    def attention(self, q, k, v, scale, layout, kv, window=None):
        pages = KVTensors(kv.k.to(DEVICE), kv.v.to(DEVICE))
        rows = (x.to(DEVICE) for x in (q, k, v))
        out = attention.attention(*rows, scale, on_device(layout), pages, window).cpu()
        kv.k.copy_(pages.k)
        kv.v.copy_(pages.v)
        return out


@pytest.mark.parametrize(
    ("batch", "dtype", "sizes"),
    [
        ("prefill and decode", torch.float32, (4, 2, 32)),
        ("prefill and decode", torch.bfloat16, (2, 1, 16)),
        ("resumed", torch.bfloat16, (6, 1, 40)),
        ("resumed", torch.float16, (4, 2, 128)),
        ("resumed for one token", torch.float32, (3, 3, 7)),
        ("decoded after one token", torch.float16, (6, 2, 64)),
        ("63 tokens", torch.bfloat16, (1, 1, 256)),
    ],
    ids=str,
)
def test_attention_agrees_with_the_reference(batch, dtype, sizes):
    problem = AttentionProblem(dtype, num_heads=sizes[0], num_kv_heads=sizes[1], head_dim=sizes[2])
    outputs, cache = play(TritonAttention(), problem, BATCHES[batch])
    expected_outputs, expected_cache = play(reference, problem, BATCHES[batch])
    for found, right in zip([*outputs, *cache], [*expected_outputs, *expected_cache], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("window", [1, 5, 64, 66])
def test_a_token_sees_the_window_that_ends_with_itself(window):
    calls = [([(0, 0, 132, ()), (1, 0, 20, ())], []), ([], [(0, 132), (1, 20)])]
    problem = AttentionProblem(torch.float32, num_heads=2, num_kv_heads=1, head_dim=16, window=window)
    outputs, _ = play(TritonAttention(), problem, calls)
    expected, _ = play(reference, problem, calls)
    for found, right in zip(outputs, expected, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 70)], ids=str)
def test_no_bit_depends_on_cuts_company_places_or_unused_memory(monkeypatch, dtype, window, cuts):
    monkeypatch.setattr(selfcheck, "PROMPT", 2 * TILE + 9)
    monkeypatch.setattr(selfcheck, "CUTS", cuts)
    monkeypatch.setattr(selfcheck, "NUM_DECODES", 1)
    problem = AttentionProblem(dtype, num_heads=2, num_kv_heads=1, head_dim=16, window=window)
    assert selfcheck.mismatches(TritonAttention(), problem) == []


def test_padding_rows_are_zero_and_views_of_rows_are_taken_as_they_are():
    layout, runs = arrange([Run(0, 70, 0, 0, True, [2, 0], [])], [Run(0, 1, 4, 1, False, [1], [])])
    packed = torch.full((layout.num_rows, 5 * 16), torch.nan)
    for run in runs:
        packed[run.row : run.row + run.length] = torch.randn(run.length, 5 * 16)
    q, k, v = (x.unflatten(1, (-1, 16)) for x in packed.split([48, 16, 16], dim=1))
    kv = KVTensors(*(pool(4, (TILE, 1, 16), q.dtype, 0.0) for _ in "kv"))
    found, copied = (
        TritonAttention().attention(*rows, 0.3, layout, kv)
        for rows in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous()))
    )
    assert torch.equal(found, copied)
    used = torch.zeros(layout.num_rows, dtype=torch.bool)
    for run in runs:
        used[run.row : run.row + run.length] = True
    assert (found[used] != 0).all()
    assert (found[~used] == 0).all()


# Decode over long sequences. What follows writes random pages instead of running prompts.


class DecodeBatch:
    """Decode rows over the given pages; tokens that nobody has written yet are NaN."""

    def __init__(self, tables, lengths, sizes, dtype):
        heads, kv_heads, head_dim = sizes
        rng = torch.Generator().manual_seed(5)
        runs = [Run(0, 1, n - 1, i, False, table, []) for i, (table, n) in enumerate(zip(tables, lengths, strict=True))]
        self.layout, _ = arrange([], runs)
        self.scale = 2.0 * head_dim**-0.5
        num_pages = max(map(max, tables)) + 1
        self.kv = KVTensors(*(pool(num_pages, (TILE, kv_heads, head_dim), dtype, torch.nan) for _ in "kv"))
        for table, length in zip(tables, lengths, strict=True):
            for i, page in enumerate(table):
                held = min(TILE, length - 1 - i * TILE)
                for pages in (self.kv.k, self.kv.v):
                    if held > 0 and pages[page, 0].isnan().any():
                        pages[page, :held] = torch.randn(held, kv_heads, head_dim, generator=rng).to(dtype)
        rows = self.layout.num_rows
        self.rows = [torch.randn(rows, n, head_dim, generator=rng).to(dtype) for n in (heads, kv_heads, kv_heads)]

    def decode(self, schedule, window=None):
        """-> [D, heads, head_dim]."""
        q, k, v = (x.to(DEVICE) for x in self.rows)
        kv, layout = KVTensors(self.kv.k.to(DEVICE), self.kv.v.to(DEVICE)), on_device(self.layout)
        attention.write_rows(k, v, layout, kv)
        out = torch.full(q.shape, torch.nan, device=DEVICE)
        attention.decode(q, out, self.scale, layout, kv, window, attention._sizes(q, k), schedule)
        return out[: layout.num_decode].to(q.dtype).cpu()

    def reference(self, window=None):
        kv = KVTensors(self.kv.k.clone(), self.kv.v.clone())
        return reference.attention(*self.rows, self.scale, self.layout, kv, window)[: self.layout.num_decode]

    def schedule(self, **options):
        return schedule_shared(self.layout.page_table.numpy(), self.layout.decode_len.numpy(), **options)


def branching():
    """Three rows with a split in common, then one that only the first two share, and a last page for each."""
    trunk, branch = [3, 9, 0, 5], [7, 2, 11, 4]
    tables = [[*trunk, *branch, 1], [*trunk, *branch, 6], [*trunk, 8]]
    return tables, [8 * TILE + 1, 8 * TILE + 50, 4 * TILE + 30]


@pytest.mark.parametrize(
    ("sizes", "dtype", "window"),
    [
        ((2, 1, 16), torch.float32, None),
        ((6, 2, 24), torch.bfloat16, None),
        ((2, 1, 16), torch.float16, SPAN + 40),
    ],
    ids=str,
)
def test_shared_decode_has_the_bits_of_decode_alone(sizes, dtype, window):
    batch = DecodeBatch(*branching(), sizes, dtype)
    schedule, apart = batch.schedule(), batch.schedule(min_rows=4)
    assert sorted(np.diff(schedule.first)) == [1, 1, 1, 2, 3]
    assert np.diff(apart.first).max() == 1
    shared = batch.decode(schedule, window)
    assert torch.equal(shared, batch.decode(apart, window))
    assert torch.equal(shared, batch.decode(None, window))
    assert_close(shared, batch.reference(window))


def test_a_group_may_be_larger_than_a_block(monkeypatch):
    monkeypatch.setattr(attention, "DECODE_M", 16)
    batch = DecodeBatch(*branching(), (7, 1, 16), torch.float32)
    schedule = batch.schedule()
    assert len(schedule.blocks(2)) == schedule.num_items + 1
    assert torch.equal(batch.decode(schedule), batch.decode(None))


def test_a_row_has_the_same_bits_alone_and_in_a_group():
    tables, lengths = branching()
    together = DecodeBatch(tables, lengths, (2, 1, 16), torch.float32)
    found = together.decode(together.schedule())
    alone = DecodeBatch(tables[1:2], lengths[1:2], (2, 1, 16), torch.float32)
    alone.kv = together.kv
    alone.rows = [torch.cat([x[1:2], x[: MIN_ROWS - 1]]) for x in together.rows]
    assert torch.equal(alone.decode(None)[0], found[1])


def test_many_splits_are_merged_in_several_rounds(monkeypatch):
    monkeypatch.setattr(attention, "MERGE_SPLITS", 2)
    batch = DecodeBatch([list(range(17))], [16 * TILE + 5], (1, 1, 16), torch.float32)
    assert_close(batch.decode(None), batch.reference())
    assert_close(batch.decode(None, 3 * SPAN), batch.reference(3 * SPAN))


def test_more_heads_than_a_block_are_cut(monkeypatch):
    monkeypatch.setattr(attention, "DECODE_M", 16)
    batch = DecodeBatch([[1, 0]], [TILE + 2], (19, 1, 16), torch.float32)
    assert_close(batch.decode(None), batch.reference())


def test_the_plan_of_a_layout_is_used():
    class Scheduled:
        decode_schedule = object()
        decode_len = torch.zeros(1)

    assert attention.schedule_of(Scheduled) is Scheduled.decode_schedule


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 257), (torch.float32, 129)], ids=str)
def test_heads_that_are_too_wide_are_refused(dtype, head_dim):
    q = torch.zeros(MIN_ROWS, 1, head_dim, dtype=dtype)
    layout, _ = arrange([], [Run(0, 1, 0, 0, False, [0], [])])
    kv = KVTensors(*(torch.zeros(1, TILE, 1, head_dim, dtype=dtype) for _ in "kv"))
    with pytest.raises(UnsupportedShape, match=f"{head_dim}.*at most {head_dim - 1}"):
        attention.attention(q, q, q, 1.0, layout, kv)


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_may_start_off_the_grid(window):
    problem = AttentionProblem(torch.float32, num_heads=2, num_kv_heads=1, head_dim=16, window=window)
    stream = Stream(problem.inputs(101, torch.Generator().manual_seed(6)), 0, [2, 0])
    whole = pieces_of(reference, problem, stream, (0, 100))
    assert_close(pieces_of(TritonAttention(), problem, stream, (0, 37, 100)), whole)
