"""A step that fails ends one request, and the others go on with the same answers."""

import asyncio

import pytest
from torch import Tensor

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import MOST_FAILURES, Engine
from hybrid_cache.errors import EngineStopped, RequestFailed
from hybrid_cache.request import FailedOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import OutOfDeviceMemory, PassFailed
from tests.engine.test_engine import answers, make_request
from tests.fakes import SumModel, sum_model_answer, tokens_of

POISON = 77


class Fragile(SumModel):
    """Fails after its work is done for a batch with a token in it, and to choose after a number of rows."""

    error: Exception = ZeroDivisionError("a bug")
    logits_left = 10**9

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if POISON in batch.token_ids.tolist():
            raise self.error
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        self.logits_left -= len(hidden)
        if -4 < self.logits_left < 0:
            raise self.error
        return super().logits(hidden)


def clean(seed: int, length: int) -> list[int]:
    tokens = tokens_of(seed, length)
    tokens[tokens == POISON] = 1
    return tokens


def poisoned(seed: int, length: int) -> list[int]:
    tokens = clean(seed, length)
    tokens[-1] = POISON
    return tokens


@pytest.mark.parametrize("length", [20, 300], ids=["at once", "in a later step"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_request_that_came_last_is_given_up_and_the_others_go_on(n: int, length: int) -> None:
    engine = Engine(Fragile(), EngineConfig(budget_bytes=1 << 22, max_tiles=4))
    prompts = {"a": clean(0, 100), "b": clean(1, 20)}
    for name, tokens in prompts.items():
        engine.submit(make_request(name, tokens, 30))
    outputs = engine.step()
    engine.submit(make_request("bad", poisoned(2, length), 5, n=n))
    outputs += engine.run_until_idle()
    assert [o for name, o in outputs if isinstance(o, FailedOutput)] == [FailedOutput("ZeroDivisionError: a bug")]
    for name, tokens in prompts.items():
        assert answers(outputs, name) == sum_model_answer(tokens, 30)
    assert not engine.is_open("bad")
    assert engine.stats().failures == 1
    assert engine.stats().cache.working_bytes == 0
    engine.check()
    engine.submit(make_request("bad", clean(3, 50), 5))
    assert answers(engine.run_until_idle(), "bad") == sum_model_answer(clean(3, 50), 5)


def test_a_token_that_cannot_be_chosen_ends_one_request() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    for i in range(3):
        engine.submit(make_request(str(i), clean(i, 40), 12))
    model.logits_left = 15
    outputs = engine.run_until_idle()
    failed = [name for name, o in outputs if isinstance(o, FailedOutput)]
    assert failed == ["2"]
    for i in range(2):
        assert answers(outputs, str(i)) == sum_model_answer(clean(i, 40), 12)
    engine.check()


def test_choices_that_could_not_be_chosen_for_are_not_forked_twice() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("good", clean(0, 40), 5, n=3))
    engine.submit(make_request("bad", clean(1, 40), 5))
    model.logits_left = 1
    outputs = engine.run_until_idle()
    assert [name for name, o in outputs if isinstance(o, FailedOutput)] == ["bad"]
    for index in range(3):
        assert answers(outputs, "good", index) == sum_model_answer(clean(0, 40), 5)
    assert not engine.is_open("good")
    engine.check()


def test_a_prompt_that_cannot_be_scored_ends_one_request() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("good", clean(0, 40), 8))
    outputs = engine.step()
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    engine.submit(Request("bad", Prompt(clean(1, 30)), sampling))
    score = engine.worker.model.ops.log_sum_exp
    model.ops.log_sum_exp = lambda logits: 1 // 0  # type: ignore[method-assign]
    outputs += engine.step()
    model.ops.log_sum_exp = score  # type: ignore[method-assign]
    outputs += engine.run_until_idle()
    assert [name for name, o in outputs if isinstance(o, FailedOutput)] == ["bad"]
    assert answers(outputs, "good") == sum_model_answer(clean(0, 40), 8)
    engine.check()


def test_an_engine_that_fails_again_and_again_ends() -> None:
    engine = Engine(Fragile(), EngineConfig(budget_bytes=1 << 22))
    for i in range(MOST_FAILURES + 2):
        engine.submit(make_request(str(i), poisoned(i, 40), 3))
    with pytest.raises(PassFailed, match="a bug"):
        engine.run_until_idle()
    assert engine.stats().failures == MOST_FAILURES + 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_of_the_machine_is_memory_of_the_device(error: Exception) -> None:
    """Steps become smaller, until one cannot be."""
    model = Fragile()
    model.error = error
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("big", poisoned(0, 300), 3))
    with pytest.raises(OutOfDeviceMemory):
        engine.run_until_idle()
    assert engine.stats().num_out_of_memory >= 1
    assert engine.stats().failures == 0


def test_a_failed_canonical_pass_is_given_up() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", clean(0, 60), 30))
    while not engine.idle:
        engine.step()
    forward = model.forward

    def failing(batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        raise ZeroDivisionError("a bug")

    model.forward = failing  # type: ignore[method-assign]
    assert engine.run_until_idle() == []
    model.forward = forward  # type: ignore[method-assign]
    engine.check()
    assert engine.stats().failures == 1


def test_a_stream_of_a_request_that_was_given_up_ends_with_an_error() -> None:
    async def run() -> tuple[list[int], Exception]:
        engine = AsyncEngine(Fragile(), EngineConfig(budget_bytes=1 << 22))
        engine.start()
        good = engine.submit(make_request("good", clean(0, 40), 40))
        bad = engine.submit(make_request("bad", poisoned(1, 40), 3))
        found = []

        async def read() -> None:
            async for output in good:
                if hasattr(output, "token"):
                    found.append(output.token)

        reader = asyncio.create_task(read())
        with pytest.raises(RequestFailed) as caught:
            async for _ in bad:
                pass
        await reader
        assert engine.alive
        await engine.stop(0.0)
        with pytest.raises(EngineStopped):
            engine.submit(make_request("late", clean(0, 40), 1))
        return found, caught.value

    found, error = asyncio.run(run())
    assert found == sum_model_answer(clean(0, 40), 40)
    assert "a bug" not in str(error)  # that is for the log
