"""Messages that the device has no memory to put together, or to keep."""

import pytest
import torch

from hybrid_cache.choreography.arrangement import Encoding, Fidelity
from hybrid_cache.choreography.commands import Compose, KeepEffect, Relocate
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import PromptOutput, TokenOutput
from tests.choreography.conductor import Conductor, exact_logits, message
from tests.engine.test_out_of_memory import short_of
from tests.models.checkpoints import CASES

MESSAGES = [message(length, seed) for seed, length in enumerate((70, 45, 33))]
HYBRID = next(case for case in CASES if case.name.startswith("bamba"))
ATTENTION = next(case for case in CASES if case.name == "llama of one layer")


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("kind", [Relocate, Compose, KeepEffect], ids=lambda kind: kind.__name__)
def test_without_memory_to_put_messages_together_they_are_computed(folder, kind, encoding):
    """Beside a request that has nothing to do with it."""
    model = loading.load(folder(HYBRID), ops=dispatch.select())
    conductor = Conductor(model, worker=short_of(kind, 1000))
    arrangement = conductor.arrangement(MESSAGES, encoding, closing=(7, 8), answer_start=148)
    for _ in range(2):
        conductor.engine.submit(conductor.request([message(90, 9)], max_tokens=20))
        conductor.run(MESSAGES, arrangement, max_tokens=6)
        assert conductor.engine.stats().cache.working_bytes == 0
    alone, told, _ = conductor.run(MESSAGES, arrangement, max_tokens=6)
    assert told.plan.computed == 151
    if encoding is Encoding.ALONE:
        assert torch.equal(alone, exact_logits(model, MESSAGES))
    else:  # what cannot be kept was computed before that, with tiles that end where messages do
        torch.testing.assert_close(alone, exact_logits(model, MESSAGES), atol=1e-4, rtol=1e-4)
    assert conductor.engine.stats().num_out_of_memory >= 1


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("kind", [Relocate, Compose, KeepEffect], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", [HYBRID, ATTENTION], ids=str)
def test_once_there_is_memory_again_messages_are_put_together(folder, case, kind, times):
    model = loading.load(folder(case), ops=dispatch.select())
    fidelity = Fidelity(model.fidelities[-1])
    conductor, plain = Conductor(model, worker=short_of(kind, times)), Conductor(model)
    for _ in range(times + 2):
        for order in (MESSAGES, MESSAGES[::-1]):
            arrangement = conductor.arrangement(order, fidelity=fidelity)
            conductor.engine.submit(conductor.request(order, arrangement, 5))
            conductor.engine.submit(conductor.request(MESSAGES, None, 5))
            outputs = [output for _, output in conductor.engine.run_until_idle()]
            conductor.engine.check()
            assert sum(isinstance(o, PromptOutput) for o in outputs) == 2
            assert sum(isinstance(o, TokenOutput) for o in outputs) == 10
    arrangement = conductor.arrangement(MESSAGES, fidelity=fidelity)
    for _ in range(2):
        (found, told, answer), (expected, _, right) = (one.run(MESSAGES, arrangement, 5) for one in (conductor, plain))
    assert told.plan.computed < 151
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert answer == right
