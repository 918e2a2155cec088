"""Decode steps as graphs over the kernels: other rows, pages and shared prefixes in the memory that was recorded."""

from dataclasses import replace

import pytest
import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.device.cuda_graphs import DecodeGraphs
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.shared_prefix import with_schedule
from hybrid_cache.kernels.triton_ops import TritonOps
from tests.cache.at_once import HybridCache

PREFIX = [13, 11, 12, 15]  # pages of a split
FIRST_SLOT = 30  # pages and slots share memory: behind the last page
CONFIG = {
    **SMALL["granite"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["attention", "mamba"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_n_heads": 2,
    "mamba_d_state": 16,
    "shared_intermediate_size": 32,
    "num_local_experts": 0,
}


def repeat_the_call(forward):
    """In place of a recorder: a replay runs the call again on the same tensors."""
    hidden = torch.full((3, 32), torch.nan)
    return lambda: hidden.copy_(forward()), hidden


def batch_of(tails):
    """A row for each tail: pages behind the shared prefix, or None for a row of one page by itself."""
    runs = []
    for i, tail in enumerate(tails):
        pages = [16 + i] if tail is None else [*PREFIX, *tail]
        runs.append(Run(0, 1, (len(pages) - 1) * TILE + 7 + i, FIRST_SLOT + i, False, pages, []))
    layout, _ = arrange([], runs)
    ids = torch.randint(0, 64, (layout.num_rows,), generator=torch.Generator().manual_seed(len(tails)))
    positions = torch.zeros(layout.num_rows, dtype=torch.int64)
    positions[: len(runs)] = layout.decode_len - 1
    return ForwardBatch(ids, positions, layout, torch.arange(len(runs)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of this test lie on the CPU")
def test_a_replay_has_the_bits_of_a_launched_step():
    model, _ = random_model(CONFIG, TritonOps(), torch.float32)
    cache = HybridCache(model.cache_spec, model.prefill_cost, 100 * (model.cache_spec.page_bytes + 1000))
    for tensors in cache.tensors:
        for name in ("k", "v", "conv", "state"):
            if hasattr(tensors, name):
                getattr(tensors, name).normal_(generator=torch.Generator().manual_seed(1))
    start = cache.memory._arena._buffer.clone()
    graphs = DecodeGraphs(model, cache.memory, cache.scratch_slot(), repeat_the_call)
    batches = [
        batch_of([[21], [22]]),  # looked at
        batch_of([[21], [22], None]),  # run and recorded for 3 rows
        batch_of([None, [22], [25]]),  # replayed
    ]
    for i, batch in enumerate(batches):
        results = []
        for run in (
            lambda b: model.forward(replace(b, layout=with_schedule(b.layout)), cache.tensors),
            graphs.run,
        ):
            cache.memory._arena._buffer.copy_(start)
            hidden = run(batch).clone()
            states = [t.state[FIRST_SLOT : FIRST_SLOT + 4].clone() for t in cache.tensors if hasattr(t, "state")]
            results.append([hidden, *states])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), i
    assert graphs.num_captures == 1
    assert graphs.num_replays == 1
