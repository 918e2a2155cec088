"""Choices that may consist of some tokens only: whatever happens to their sequences, no other token comes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.sampler import log_probabilities
from hybrid_cache.engine.engine import Engine
from hybrid_cache.request import FailedOutput, FinishReason, Request, TokenOutput
from hybrid_cache.sampling import Mask, SamplingParams, TokenChooser, mask_of
from tests.engine.test_engine import answers, make_request
from tests.fakes import VOCAB, SumModel, sum_model_answer, tokens_of


class Counting:
    """Each token is a multiple of its place, and the one at `length` is the last."""

    def __init__(self, length: int, fails_at: int = 0, has_no_mask_at: int = 0, forces: bool = False) -> None:
        self.forces = forces
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

    def ahead(self, most: int) -> Sequence[int]:
        """Up to five tokens behind each third one, none else."""
        place = len(self.tokens)
        if not self.forces or self.tokens[-1] // (place + 1) % 3:
            return ()
        return [(place + 2 + i) * (place % 5) for i in range(min(place % 6, self.length - place, most))]

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


@pytest.mark.parametrize("forces", [False, True])
def test_preemptions_and_the_cache_change_nothing(forces: bool) -> None:
    def request(i: int) -> Request:
        length = 4 + 9 * i
        return constrained(str(i), i, length, make_constraint=lambda: Counting(length, forces=forces))

    alone = {}
    for i in range(12):
        engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22, prefix_cache=False))
        engine.submit(request(i))
        alone[str(i)] = answers(engine.run_until_idle(), str(i))
        check(alone[str(i)], 4 + 9 * i)
    for budget_bytes in (20_000, 1 << 22):
        engine = Engine(SumModel(), EngineConfig(budget_bytes=budget_bytes, max_running=12, max_tiles=2))
        for _ in range(2):
            for i in range(12):
                engine.submit(request(i))
            outputs = engine.run_until_idle()
            assert {name: answers(outputs, name) for name in alone} == alone
        tight = budget_bytes < 1 << 22
        assert (engine.stats().num_preemptions > 0) == tight
        assert (engine.stats().cached_tokens > 0) == (not tight)
        engine.check()


def outputs_of(request: Request) -> tuple[list[TokenOutput], int]:
    """-> what it says, alone, and the steps that it takes."""
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(request)
    found = [output for _, output in engine.run_until_idle() if isinstance(output, TokenOutput)]
    return found, engine.stats().steps


def forced(seed: int, length: int, **sampling: object) -> Request:
    request = constrained("a", seed, length, make_constraint=lambda: Counting(length, forces=True))
    return replace(request, sampling=replace(request.sampling, **sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_forced_tokens_take_fewer_steps_and_have_the_models_own_log_probabilities(seed: int) -> None:
    found, steps = outputs_of(forced(seed, 60, logprobs=2))
    tokens = [output.token for output in found]
    check([token for token in tokens if token is not None], 60)
    assert steps < 55
    prompt, model = tokens_of(seed, 40 + seed).tolist(), SumModel()
    for i, output in enumerate(found):
        before = [*prompt, *tokens[:i]]
        logits = model.logits(torch.tensor([[float(sum(before)), float(len(before))]]))
        assert [output.logprob] == log_probabilities(logits, [tokens[i] or 0], [2], model.ops)


def test_forced_tokens_draw_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[float] = []
    point = TokenChooser.point
    monkeypatch.setattr(TokenChooser, "point", lambda self: points.append(point(self)) or points[-1])
    found, _ = outputs_of(forced(5, 40))
    expected = np.random.default_rng([5, 0]).random(len(points)).tolist()
    assert points == expected
    assert 15 < len(points) < len(found) == 40


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_ends_within_forced_tokens_where_it_would_end_elsewhere(seed: int) -> None:
    whole = [output.token for output in outputs_of(forced(seed, 60))[0]]
    for most in range(1, 61, 4):
        cut = outputs_of(forced(seed, 60, max_tokens=most))[0]
        assert [output.token for output in cut] == whole[:most]
        assert cut[-1].finish is (FinishReason.STOP if most == 60 else FinishReason.LENGTH)
        places: list[int] = []

        def stops(token: int, most: int = most, places: list[int] = places) -> bool:
            places.append(token)
            return len(places) == most

        stopped = outputs_of(replace(forced(seed, 60), make_stopper=lambda stops=stops: stops))[0]
        assert [output.token for output in stopped] == whole[:most]
        assert stopped[-1].finish is FinishReason.STOP


def test_a_bias_is_heard_before_tokens_are_forced() -> None:
    found, steps = outputs_of(forced(1, 60, logit_bias={0: 3.0}))
    assert steps >= len(found) == 60


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


@pytest.mark.parametrize("tool", [[], [1, 2, 3]])
@pytest.mark.parametrize("pauses", [*((n,) for n in range(1, 30)), (3, 4, 5, 6), (11, 12, 13), (20, 21)])
def test_a_pause_behind_forced_tokens_loses_none_of_them(pauses: tuple[int, ...], tool: list[int]) -> None:
    """The constraint has passed them already. With nothing added, no token of the answer changes."""
    asked = forced(2, 60)
    engine, said = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22)), list[int]()
    engine.submit(asked)
    for step in range(1, max(pauses) + 1):
        said += answers(engine.step(), "a")
        if step in pauses and engine.is_open("a"):
            engine.pause("a", "look")
            engine.resume("a", tool)
    said += answers(engine.run_until_idle(), "a")
    check(said, 60)
    if not tool:
        assert said == [output.token for output in outputs_of(asked)[0]]
    engine.check()
