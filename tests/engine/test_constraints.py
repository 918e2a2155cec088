"""Choices that may consist of some tokens only: whatever happens to their sequences, no other token comes."""

from dataclasses import replace

import numpy as np
import pytest

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.request import FailedOutput, FinishReason, Request, TokenOutput
from hybrid_cache.sampling import Mask, SamplingParams, mask_of
from tests.engine.test_engine import answers, make_request
from tests.fakes import VOCAB, SumModel, sum_model_answer, tokens_of


class Counting:
    """Each token is a multiple of its place, and the one at `length` is the last."""

    def __init__(self, length: int, fails_at: int = 0, has_no_mask_at: int = 0) -> None:
        self.length, self.fails_at, self.has_no_mask_at = length, fails_at, has_no_mask_at
        self.tokens: list[int] = []

    def mask(self) -> Mask:
        if len(self.tokens) == self.has_no_mask_at > 0:
            raise ValueError("a bug")
        return mask_of(np.arange(VOCAB) % (len(self.tokens) + 2) == 0)

    def note(self, token: int) -> None:
        assert token % (len(self.tokens) + 2) == 0
        self.tokens.append(token)
        if len(self.tokens) == self.fails_at:
            raise ValueError("a bug")

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.length


def constrained(name: str, seed: int, length: int, **fields: object) -> Request:
    sampling = SamplingParams(temperature=0.7, seed=seed, max_tokens=200)
    request = replace(make_request(name, tokens_of(seed, 40 + seed), 1), sampling=sampling)
    return replace(request, **{"make_constraint": lambda: Counting(length), **fields})


def check(found: list[int], length: int) -> None:
    assert len(found) == length
    assert all(token % (place + 2) == 0 for place, token in enumerate(found))


def test_only_what_may_come_comes_and_the_last_one_ends() -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(constrained("a", 1, 7))
    engine.submit(make_request("free", tokens_of(9, 50), 9))
    outputs = engine.run_until_idle()
    check(answers(outputs, "a"), 7)
    assert answers(outputs, "free") == sum_model_answer(tokens_of(9, 50), 9)
    last = [output for name, output in outputs if name == "a" and isinstance(output, TokenOutput)][-1]
    assert last.finish is FinishReason.STOP


def test_each_choice_has_a_way_of_its_own() -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(constrained("a", 1, 6, n=4))
    outputs = engine.run_until_idle()
    found = [answers(outputs, "a", index) for index in range(4)]
    for tokens in found:
        check(tokens, 6)
    assert len({tuple(tokens) for tokens in found}) > 1


def test_preemptions_and_the_cache_change_nothing() -> None:
    alone = {}
    for i in range(12):
        engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22, prefix_cache=False))
        engine.submit(constrained(str(i), i, 4 + 9 * i))
        alone[str(i)] = answers(engine.run_until_idle(), str(i))
        check(alone[str(i)], 4 + 9 * i)
    for budget_bytes in (20_000, 1 << 22):
        engine = Engine(SumModel(), EngineConfig(budget_bytes=budget_bytes, max_running=12, max_tiles=2))
        for _ in range(2):
            for i in range(12):
                engine.submit(constrained(str(i), i, 4 + 9 * i))
            outputs = engine.run_until_idle()
            assert {name: answers(outputs, name) for name in alone} == alone
        tight = budget_bytes < 1 << 22
        assert (engine.stats().num_preemptions > 0) == tight
        assert (engine.stats().cached_tokens > 0) == (not tight)
        engine.check()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("how", ["fails_at", "has_no_mask_at"])
def test_a_constraint_that_fails_ends_its_request_alone(n: int, how: str) -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(constrained("bad", 1, 9, n=n, make_constraint=lambda: Counting(9, **{how: 3})))
    engine.submit(constrained("good", 2, 9))
    outputs = engine.run_until_idle()
    assert [type(output) for name, output in outputs if name == "bad"][-1] is FailedOutput
    check(answers(outputs, "good"), 9)
    assert not engine.is_open("bad")
    engine.check()
