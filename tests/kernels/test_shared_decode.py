"""Decode rows that share pages: the same bits as rows that read them one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.kernels.compiler import compiler_needed

pytestmark = compiler_needed

NUM_PAGES = 40
APART = 1 << 30  # rows that would have to share before anything is shared


@st.composite
def forests(draw):
    """Decode rows whose page tables are paths in random trees, each with a last page of its own."""
    paths, rows = [[]], []
    for page in range(draw(st.integers(0, 12))):
        paths.append([*draw(st.sampled_from(paths)), page])
    for last in range(draw(st.integers(1, 9))):
        pages = [*draw(st.sampled_from(paths)), 30 + last]
        end = (len(pages) - 1) * TILE + draw(st.integers(1, TILE))
        rows.append(Run(0, 1, end - 1, 0, False, pages, []))
    return draw(st.permutations(rows))


def decode(ops, rows, dtype, kv, heads, window):
    layout, _ = arrange([], rows)
    rng = torch.Generator().manual_seed(len(rows))
    q, k, v = (torch.randn(layout.num_rows, n, 32, generator=rng).to(dtype) for n in (heads, 2, 2))
    layout.kv_rows.fill_(-1)  # the pages are full
    return ops.attention(q, k, v, 0.2, layout, kv, window)[: len(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=60, deadline=None)
@given(rows=forests(), group=st.integers(1, 5), window=st.sampled_from([None, 70]))
def test_sharing_changes_no_bit(dtype, rows, group, window):
    rng = torch.Generator().manual_seed(0)
    kv = KVTensors(*(torch.randn(NUM_PAGES, TILE, 2, 32, generator=rng).to(dtype) for _ in range(2)))
    shared, apart, plain = (
        decode(ops, rows, dtype, kv, 2 * group, window) for ops in (NativeOps(), NativeOps(APART), TorchOps())
    )
    assert torch.equal(shared, apart)
    assert torch.allclose(shared.float(), plain.float(), atol=2e-2 if dtype == torch.bfloat16 else 2e-5)


def test_four_rows_below_two_levels():
    """Segments as they are read off the page tables: rows 0 and 2 share three pages, all share the first."""
    ops = NativeOps()
    tables = [[1, 2, 3, 10], [1, 4, 11], [1, 2, 3, 12], [1, 5, 13]]
    rows = [Run(0, 1, TILE * len(pages) - 1, 0, False, pages, []) for pages in tables]
    layout, _ = arrange([], rows)
    ops._layout_address(layout)
    order, trees, segments = ops._layout.tensors[-3:]
    assert ops._layout.structure.num_trees == 1
    assert order.tolist() == [0, 2, 1, 3]
    found = segments[: 4 * trees[1]].view(-1, 4).tolist()
    assert found == [[0, 4, 0, 1], [0, 2, 1, 3], [0, 1, 3, 4], [1, 1, 3, 4], [2, 1, 1, 3], [3, 1, 1, 3]]
