"""A step that fails ends one request, and the others go on with the same answers."""

import asyncio

import pytest
from torch import Tensor

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import MOST_FAILURES, Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import EngineStopped, RequestFailed
from hybrid_cache.request import FailedOutput, Request, Stopper
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import PassFailed
from tests.engine.test_engine import answers, make_request
from tests.fakes import VOCAB, SumModel, sum_model_answer, tokens_of

POISON = 77


class Fragile(SumModel):
    """Fails after its work is done for a batch with a token in it, and a few times to choose after a number of rows."""

    error: Exception = ZeroDivisionError("a bug")
    logits_left = 10**9
    logits_failing = 3

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if POISON in batch.token_ids.tolist():
            raise self.error
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        self.logits_left -= len(hidden)
        if self.logits_left < 0 < self.logits_failing:
            self.logits_failing -= 1
            raise self.error
        return super().logits(hidden)


def clean(seed: int, length: int) -> list[int]:
    """A prompt without the token, and so are 40 tokens of its answer."""
    while True:
        tokens = tokens_of(seed, length)
        if POISON not in tokens and POISON not in sum_model_answer(tokens, 40):
            return tokens
        seed += 1000


def poisoned(seed: int, length: int) -> list[int]:
    tokens = clean(seed, length)
    tokens[-1] = POISON
    return tokens


def late(seed: int, length: int, steps: int) -> list[int]:
    """A prompt after which the fed token number `steps` fails; the token before it is the last one to come."""
    first = POISON
    for _ in range(steps - 1):
        first = (first - 1) * pow(2, -1, VOCAB) % VOCAB
    tokens = clean(seed, length)
    tokens[-1] = 0
    tokens[-1] = (first - sum(int(t) for t in tokens) - length) % VOCAB
    assert sum_model_answer(tokens, steps)[-1] == POISON
    return tokens


def failed_of(outputs: Outputs) -> list[str]:
    return [name for name, o in outputs if isinstance(o, FailedOutput)]


@pytest.mark.parametrize("bad", [0, 3, 7], ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("fault", ["in the prompt", "behind the first step", "in a late token"])
def test_whoever_is_at_fault_is_found_and_the_others_go_on(bad: int, fault: str) -> None:
    engine = Engine(Fragile(), EngineConfig(budget_bytes=1 << 22, max_tiles=4))
    prompts = {str(i): clean(i, 40 + 10 * i) for i in range(8)}
    prompts[str(bad)] = {
        "in the prompt": poisoned(50, 20),
        "behind the first step": poisoned(50, 300),
        "in a late token": late(50, 40, 9),
    }[fault]
    outputs: Outputs = []
    for name, tokens in prompts.items():
        engine.submit(make_request(name, tokens, 30, n=1 + int(name) % 3))
        outputs += engine.step()
    outputs += engine.run_until_idle()
    assert [o for _, o in outputs if isinstance(o, FailedOutput)] == [FailedOutput("ZeroDivisionError: a bug")]
    assert failed_of(outputs) == [str(bad)]
    for name, tokens in prompts.items():
        for index in range(1 + int(name) % 3 if name != str(bad) else 0):
            assert answers(outputs, name, index) == sum_model_answer(tokens, 30)
    said = answers(outputs, str(bad))
    assert said == (sum_model_answer(prompts[str(bad)], 9) if fault == "in a late token" else [])
    assert not engine.is_open(str(bad))
    assert engine.stats().failures <= 4
    assert engine.stats().cache.working_bytes == 0
    engine.check()
    engine.submit(make_request(str(bad), clean(60, 50), 5))
    assert answers(engine.run_until_idle(), str(bad)) == sum_model_answer(clean(60, 50), 5)


def test_an_error_that_does_not_come_again_costs_no_request() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    for i in range(3):
        engine.submit(make_request(str(i), clean(i, 40), 12, n=1 + i))
    model.logits_left = 15
    model.logits_failing = 1
    outputs = engine.run_until_idle()
    assert failed_of(outputs) == []
    for i in range(3):
        for index in range(1 + i):
            assert answers(outputs, str(i), index) == sum_model_answer(clean(i, 40), 12)
    assert engine.stats().failures == 1
    engine.check()


def test_seeded_choices_beside_a_failed_choice_of_tokens_keep_their_numbers() -> None:
    """Also where the failure comes after the tokens are drawn: their log-probabilities."""
    sampling = SamplingParams(seed=7, max_tokens=20, logprobs=1, repetition_penalty=1.1)
    requests = [Request(str(i), Prompt(tokens_of(i, 40)), sampling, n=2) for i in range(3)]

    def run(fails: bool) -> Outputs:
        engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
        for request in requests:
            engine.submit(request)
        outputs: Outputs = []
        for _ in range(5):
            outputs += engine.step()
        if fails:
            ops = engine.worker.model.ops
            score, ops.log_sum_exp = ops.log_sum_exp, lambda logits: 1 // 0  # type: ignore[method-assign]
            try:
                assert engine.step() == []
            finally:
                ops.log_sum_exp = score  # type: ignore[method-assign]
        outputs += engine.run_until_idle()
        assert engine.stats().failures == int(fails)
        return outputs

    without, outputs = run(False), run(True)
    for request in requests:
        for index in range(2):
            assert answers(outputs, request.id, index) == answers(without, request.id, index)
            assert len(answers(outputs, request.id, index)) == 20


def test_a_prompt_that_cannot_be_scored_ends_one_request() -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("good", clean(0, 40), 8))
    outputs = engine.step()
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    engine.submit(Request("bad", Prompt(clean(1, 30)), sampling))
    score = engine.worker.model.ops.log_sum_exp
    model.ops.log_sum_exp = lambda logits: 1 // 0  # type: ignore[method-assign]
    while engine.is_open("bad"):
        outputs += engine.step()
    model.ops.log_sum_exp = score  # type: ignore[method-assign]
    outputs += engine.run_until_idle()
    assert failed_of(outputs) == ["bad"]
    assert answers(outputs, "good") == sum_model_answer(clean(0, 40), 8)
    engine.check()


def test_a_request_that_is_aborted_while_it_is_suspected_ends_the_search() -> None:
    engine = Engine(Fragile(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("good", clean(0, 40), 8))
    engine.submit(make_request("bad", poisoned(1, 40), 8))
    outputs = engine.step()
    engine.abort("bad")
    outputs += engine.run_until_idle()
    assert failed_of(outputs) == []
    assert answers(outputs, "good") == sum_model_answer(clean(0, 40), 8)


def test_an_engine_that_cannot_compute_a_prompt_of_its_own_ends(caplog: pytest.LogCaptureFixture) -> None:
    model = Fragile()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    for i in range(MOST_FAILURES + 2):
        engine.submit(make_request(str(i), clean(i, 40), 3))

    def failing(batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        raise ZeroDivisionError("a bug")

    model.forward = failing  # type: ignore[method-assign]
    outputs: Outputs = []
    while len(failed_of(outputs)) < MOST_FAILURES:
        outputs += engine.step()
    with pytest.raises(PassFailed, match="a bug"):
        engine.step()
    assert f"{MOST_FAILURES} requests in a row failed, and so does a prompt of our own" in caplog.text


def test_an_engine_goes_on_however_many_bad_requests_come() -> None:
    engine = Engine(Fragile(), EngineConfig(budget_bytes=1 << 22))
    outputs: Outputs = []
    for i in range(4 * MOST_FAILURES):
        engine.submit(make_request(f"alone {i}", poisoned(i, 40), 3))
        outputs += engine.run_until_idle()
    for i in range(4 * MOST_FAILURES):
        engine.submit(make_request(f"bad {i}", poisoned(i, 40), 3))
    engine.submit(make_request("good", clean(0, 40), 8))
    outputs += engine.run_until_idle()
    assert len(failed_of(outputs)) == 8 * MOST_FAILURES
    assert answers(outputs, "good") == sum_model_answer(clean(0, 40), 8)
    assert {name for name, _ in outputs} == {"good", *failed_of(outputs)}
    engine.check()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_of_the_machine_is_memory_of_the_device(error: Exception) -> None:
    """Steps become smaller, until one cannot be."""
    model = Fragile()
    model.error = error
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("big", poisoned(0, 300), 3))
    engine.submit(make_request("good", clean(0, 100), 3))
    outputs = engine.run_until_idle()
    assert failed_of(outputs) == ["big"]
    assert answers(outputs, "good") == sum_model_answer(clean(0, 100), 3)
    assert engine.stats().num_out_of_memory >= 1


@pytest.mark.parametrize("where", ["when it is made", "at the third token"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stopper_that_fails_ends_its_own_request(where: str, n: int) -> None:
    def make_stopper() -> Stopper:
        seen: list[int] = []

        def stopper(token: int) -> bool:
            seen.append(token)
            return bool(1 // (3 - len(seen))) and False

        return stopper if where != "when it is made" else [][0]

    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", tokens_of(0, 40), 8))
    engine.submit(make_request("bad", tokens_of(1, 40), 8, n=n, make_stopper=make_stopper))
    engine.submit(make_request("b", tokens_of(2, 40), 8, n=2))
    outputs = engine.run_until_idle()
    assert failed_of(outputs) == ["bad"]
    assert answers(outputs, "bad") == ([] if where == "when it is made" else sum_model_answer(tokens_of(1, 40), 2))
    assert answers(outputs, "a") == sum_model_answer(tokens_of(0, 40), 8)
    assert answers(outputs, "b", 1) == sum_model_answer(tokens_of(2, 40), 8)
    assert engine.stats().failures == 0
    engine.check()


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
