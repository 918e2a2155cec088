"""The search for the request at fault: by itself, and in an engine with any mixture of requests."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybrid_cache.choreography.arrangement import Arrangement, Fidelity, Part
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.engine.suspects import MOST_IN_VAIN, QUIET, Suspects
from hybrid_cache.request import FailedOutput, PromptOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.engine.test_engine import answers, make_request
from tests.engine.test_out_of_memory import SmallDevice, SmallStage, arranged
from tests.fakes import SumModel, sum_model_answer, tokens_of

POISON = 77  # a batch that holds it fails
CURSED = 500  # and so does the choice of a token where this one is the likeliest


def search(num: int, bad: set[int], goal: Callable[[int], int], gone: dict[int, int]) -> tuple[list[int], int]:
    """Requests that each want some steps, and fail in the last one -> those given up, and steps taken.

    gone: by step, a request that is aborted before it
    """
    suspects, open_, given_up, steps, last = Suspects(), set(range(num)), [], 0, 0
    state = dict.fromkeys(range(num), 0)
    while open_ and last < 3 * num:  # nobody is bad any more
        steps += 1
        assert steps < 100 * num
        if (who := gone.get(steps)) in open_:
            open_.discard(who)
            suspects.ended((who, 0))
            continue
        if suspects.advance():
            state = dict.fromkeys(range(num), 0)
        runs = [i for i in sorted(open_) if suspects.may_run(i)]
        assert runs
        if any(i in bad and state[i] + 1 >= goal(i) for i in runs):
            found = suspects.failed({(i, 0): min(state[i] + 1, goal(i)) for i in runs})
            state = dict.fromkeys(range(num), 0)
            if found is not None:
                assert runs == [found]
                open_.remove(found)
                suspects.ended((found, 0))
                given_up.append(found)
        else:
            for i in runs:
                state[i] += 1
                suspects.reached((i, 0), state[i])
            last = last + 1 if not suspects and min(state[i] for i in runs) > 20 else 0
    return given_up, steps


@given(st.data())
def test_those_at_fault_are_given_up_and_nobody_else(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 12))
    bad = data.draw(st.sets(st.integers(0, num - 1)))
    goals = data.draw(st.lists(st.integers(1, 9), min_size=num, max_size=num))
    gone = data.draw(st.dictionaries(st.integers(1, 40), st.integers(0, num - 1), max_size=3))
    given_up, _ = search(num, bad, lambda i: goals[i], gone)
    assert set(given_up) <= bad
    assert bad - set(given_up) <= set(gone.values())


@pytest.mark.parametrize("bad", range(16))
def test_one_of_sixteen_is_found_in_few_steps(bad: int) -> None:
    suspects = Suspects()
    assert suspects.failed({(i, 0): 1 for i in range(16)}) is None
    tries = passes = 0
    while True:
        suspects.advance()
        tries += 1
        runs = [i for i in range(16) if suspects.may_run(i)]
        if bad not in runs:
            passes += 1
            for i in runs:
                suspects.reached((i, 0), 1)
        elif suspects.failed({(i, 0): 1 for i in runs}) is not None:
            break
    assert runs == [bad]
    assert tries <= 5
    assert passes == bin(15 - bad).count("1")  # none where it came last
    assert not suspects  # nobody waits any longer


class Cursed(SmallStage):
    """Works like its parent, and then fails for some tokens."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if POISON in batch.token_ids.tolist():
            raise ZeroDivisionError("poison")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        if CURSED in logits.argmax(1).tolist():
            raise ZeroDivisionError("a curse")
        return logits


class Crowded(SumModel):
    """Fails whenever it decodes several sequences at once, or computes several tiles."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if batch.layout.num_decode > 2 or len(batch.layout.chunk_slot) > 2:
            raise ZeroDivisionError("a crowd")
        return hidden


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_only_fail_together_run_in_smaller_numbers(
    prefix_cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(budget_bytes=1 << 22, max_running=8, prefix_cache=prefix_cache)
    engine = Engine(Crowded(), config)
    prompts = {str(i): tokens_of(i, 300 + 20 * i) for i in range(6)}
    for name, tokens in prompts.items():
        engine.submit(make_request(name, tokens, 30))
    outputs = engine.run_until_idle()
    assert not failed_in(outputs)
    for name, tokens in prompts.items():
        assert answers(outputs, name) == sum_model_answer(tokens, 30)
    assert "no request is at fault; from now on at most 2 sequences run" in caplog.text
    assert "at most 1 sequences" not in caplog.text


def test_failures_that_lie_far_apart_are_forgotten() -> None:
    suspects = Suspects()

    def search_in_vain() -> int:
        suspects.failed({(0, 0): 1, (1, 0): 1})
        most = suspects.fewer(8)
        for i in (1, 0):
            suspects.reached((i, 0), 1)
            suspects.advance()
        assert not suspects
        return most

    for _ in range(2 * MOST_IN_VAIN):
        assert search_in_vain() == 8
        for _ in range(QUIET):
            suspects.rest()
    assert [search_in_vain() for _ in range(MOST_IN_VAIN + 1)] == [8] * MOST_IN_VAIN + [4]


def random_request(rng: random.Random, name: str) -> Request:
    """One in four or so fails: its prompt, a token of its answer, or the choice of one."""
    n, length = rng.choice([1, 1, 2, 4]), rng.choice([5, 40, 64, 100, 300])
    tokens = tokens_of(rng.randrange(1000), length)
    tokens[tokens == POISON] = 1
    if rng.random() < 0.5:
        stem = tokens_of(1, 150)
        stem[stem == POISON] = 1
        tokens = np.concatenate([stem, tokens])
    if rng.random() < 0.15:
        tokens[rng.randrange(len(tokens))] = POISON
    seed = rng.choice([None, rng.randrange(100)])
    sampling = SamplingParams(
        temperature=0 if seed is None else 1.0,
        seed=seed,
        max_tokens=rng.choice([0, 1, 5, 30]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
        logprobs=rng.choice([None, 1]),
        repetition_penalty=rng.choice([1.0, 1.2]),
    )
    arrangement = None
    if rng.random() < 0.25:
        lengths = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 4))]
        tokens = tokens[: sum(lengths) + 5]
        lengths[-1] += len(tokens) - sum(lengths) - 5
        if min(lengths) > 0:  # messages of its own: an answer does not depend on what is stored
            parts = (*(Part(each, f"{name} {i}") for i, each in enumerate(lengths)), Part(5))
            arrangement = Arrangement(parts, Fidelity.COMPOSED)
    return Request(name, Prompt(tokens), sampling, n=n, arrangement=arrangement, tenant=rng.choice("ab"))


def alone(model: SmallDevice, request: Request) -> Outputs:
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(request)
    return engine.run_until_idle()


def failed_in(outputs: Outputs) -> set[str]:
    return {name for name, output in outputs if isinstance(output, FailedOutput)}


def scores_of(outputs: Outputs, name: str) -> list[object]:
    return [output.logprobs for each, output in outputs if each == name and isinstance(output, PromptOutput)]


@pytest.mark.parametrize("seed", range(6))
def test_every_request_of_any_mixture_ends_as_it_does_alone(seed: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(
        budget_bytes=rng.choice([200_000, 1 << 22]), max_running=rng.choice([2, 8, 32]), max_tiles=rng.choice([2, 16])
    )
    engine = Engine(Cursed(), config)
    requests = [random_request(rng, str(i)) for i in range(16)]
    requests[seed % 16].prompt.tokens[-1] = POISON
    aborted, outputs = set[str](), Outputs()
    for request in requests:
        engine.submit(request)
        for _ in range(rng.randrange(4)):
            outputs += engine.step()
        engine.check()
        if rng.random() < 0.1:
            aborted.add(victim := rng.choice(requests).id)
            engine.abort(victim)
    outputs += engine.run_until_idle()
    engine.check()
    assert engine.stats().cache.working_bytes == 0
    assert failed_in(outputs) or aborted
    for request in requests:
        bad, right = bool(failed_in(alone(Cursed(), request))), alone(SmallStage(), request)
        if request.id not in aborted:
            assert (request.id in failed_in(outputs)) == bad
            assert scores_of(outputs, request.id) == scores_of(right, request.id) or bad
        for index in range(request.n):
            said, expected = answers(outputs, request.id, index), answers(right, request.id, index)
            assert said == (expected[: len(said)] if bad or request.id in aborted else expected)


def test_a_message_at_fault_is_dropped_and_then_its_request_is_found() -> None:
    """The message is computed before its prompt, beside other requests."""
    bad = arranged(30, 40, 3)
    bad.prompt.tokens[:] = 1
    bad.prompt.tokens[35] = POISON
    requests = {name: random_request(random.Random(0), name) for name in "acd"}
    engine = Engine(Cursed(), EngineConfig(budget_bytes=1 << 22))
    outputs = Outputs()
    for request in (requests["a"], bad, requests["c"], requests["d"]):
        engine.submit(request)
        outputs += engine.step()
    outputs += engine.run_until_idle()
    engine.check()
    assert failed_in(outputs) == {"b"}
    assert engine.stats().cache.messages == 0
    for name, request in requests.items():
        assert answers(outputs, name) == answers(alone(SmallStage(), request), name) != []
