"""What becomes of a step: where tiles end, and the states that are kept there."""

import torch

from hybrid_cache.device.memory import HybridCache
from hybrid_cache.device.runner import ModelRunner, build_batch
from hybrid_cache.engine.scheduler import Chunk, Step
from hybrid_cache.engine.sequence import Prefill
from hybrid_cache.kernels.ops import StateTensors
from tests.fakes import SumModel, tokens_of


def test_states_are_captured_where_the_tiles_of_a_chunk_end() -> None:
    model = SumModel()
    cache = HybridCache(model.cache_spec, model.prefill_cost, 1 << 20)
    runner, tokens = ModelRunner(model, cache), tokens_of(1, 300)
    prefill = Prefill("", tokens, publish=False, reuse=False)
    prefill.lease = cache.acquire(cache.match("", tokens), tokens, publish=False)
    captures = [(position, cache.messages.lend_slot()) for position in (100, 174, 300)]
    known = tuple((position, slot) for position, slot in captures if slot is not None)
    runner.run(Step((Chunk(prefill, None, 0, 64, ()),)))
    step = Step((Chunk(prefill, None, 64, 300, known, cuts=(100, 110)),))
    layout = build_batch(step, packed=True)[0].layout
    assert layout.tile_start.tolist() == [0, 36, 46, 110, 174]
    assert layout.capture_tiles.tolist() == [1, 3, 5]
    runner.run(step)
    _, states = cache.tensors
    assert isinstance(states, StateTensors)
    for position, slot in known:
        assert torch.equal(states.state[slot][:1], torch.tensor([float(tokens[:position].sum())]))
