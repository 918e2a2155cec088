"""What becomes of a step: where tiles end, and the states that are kept there."""

import torch

from hybrid_cache.device.worker import Worker, build_batch
from hybrid_cache.kernels.ops import StateTensors
from hybrid_cache.work import Rows, Work
from tests.cache.at_once import HybridCache
from tests.fakes import SumModel, tokens_of


def test_states_are_captured_where_the_tiles_of_a_chunk_end() -> None:
    model = SumModel()
    cache = HybridCache(model.cache_spec, model.prefill_cost, 1 << 20)
    worker, tokens = Worker(model, cache.memory), tokens_of(1, 300)
    lease = cache.acquire(cache.match("", tokens), tokens, publish=False)
    assert lease is not None
    captures = [(position, cache.messages.lend_slot()) for position in (100, 174, 300)]
    known = tuple((position, slot) for position, slot in captures if slot is not None)

    def rows(start: int, end: int, captures: tuple[tuple[int, int], ...] = (), cuts: tuple[int, ...] = ()) -> Rows:
        places = lease.rows_to_fill(start, end)
        return Rows(
            model.fingerprint,
            tokens[start:end],
            start,
            0,
            lease.slot,
            lease.pages,
            places,
            start == 0,
            captures=captures,
            cuts=cuts,
        )

    worker.run(Work(chunks=(rows(0, 64),)))
    work = Work(chunks=(rows(64, 300, known, (100, 110)),))
    layout = build_batch(work, packed=True).layout
    assert layout.tile_start.tolist() == [0, 36, 46, 110, 174]
    assert layout.capture_tiles.tolist() == [1, 3, 5]
    worker.run(work)
    _, states = cache.tensors
    assert isinstance(states, StateTensors)
    for position, slot in known:
        assert torch.equal(states.state[slot][:1], torch.tensor([float(tokens[:position].sum())]))
