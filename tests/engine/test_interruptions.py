"""Requests that stop in the middle for a tool: the same tokens as one prompt, and nothing held meanwhile."""

from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from hybrid_cache.choreography.arrangement import Arrangement, Fidelity, Part
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.interruptions import FORGOTTEN_AFTER_S
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import FailedOutput, FinishReason, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, TokenArray
from tests.engine.test_host_tier import room_for
from tests.fakes import VOCAB, PageSumModel, SumModel, sum_model_answer, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=20)
TOOL = [5, 6, 7] * 30
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 1.1, "repetition_penalty": 1.3}


class EvenModel(SumModel):
    """All tokens are as likely: which come depends on random numbers alone."""

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(len(hidden), VOCAB)


class RoughModel(SumModel):
    """Many tokens are about as likely, others after each sum."""

    table = torch.from_numpy(np.random.default_rng(0).normal(size=(VOCAB, 16)).astype(np.float32))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.full((len(hidden), VOCAB), -10.0)
        logits[:, :16] = self.table[(hidden[:, 0] + hidden[:, 1]).long() % VOCAB]
        return logits


def new_engine(model: SumModel | None = None, budget_bytes: int = 1 << 20, **more: object) -> Engine:
    return Engine(model or SumModel(), EngineConfig(budget_bytes=budget_bytes), **more)  # type: ignore[arg-type]


def request(name: str = "a", length: int = 150, sampling: SamplingParams = GREEDY, **more: object) -> Request:
    return Request(name, Prompt(tokens_of(length, length)), sampling, **more)  # type: ignore[arg-type]


def answer(outputs: Outputs, name: str = "a") -> list[int]:
    return [o.token for id, o in outputs if id == name and isinstance(o, TokenOutput) and o.token is not None]


def steps_until(engine: Engine, num_tokens: int) -> list[int]:
    """Steps until request "a" has so many tokens -> these."""
    said = list[int]()
    while len(said) < num_tokens:
        said += answer(engine.step())
    return said


def whole(model: SumModel, asked: Request) -> list[int]:
    engine = new_engine(model)
    engine.submit(asked)
    return answer(engine.run_until_idle())


@pytest.mark.parametrize("before", [0, 1, 7, 70])
def test_what_goes_on_is_what_a_prompt_of_all_tokens_would_get(before: int) -> None:
    engine, sampling = new_engine(), SamplingParams(temperature=0, max_tokens=100)
    engine.submit(request(sampling=sampling))
    said = steps_until(engine, before)
    engine.pause("a", "look", 1.5)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache.working_bytes) == (0, 0, 0)
    engine.run_until_idle()
    engine.resume("a", TOOL)
    outputs = engine.run_until_idle()
    engine.check()
    prompt = [*request().prompt.tokens, *said, *TOOL]
    assert said + answer(outputs) == said + sum_model_answer(prompt, 100 - before)
    (begun,) = [output for _, output in outputs if isinstance(output, PromptOutput)]
    assert begun.cached_tokens >= ((150 + before) // TILE * TILE if before else 0)
    assert isinstance(outputs[-1][1], TokenOutput)
    assert outputs[-1][1].finish is FinishReason.LENGTH
    assert not engine.is_open("a")


def test_a_request_that_waits_is_paused_too_and_goes_on() -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 20, max_running=1))
    engine.submit(request("first"))
    engine.submit(request("a"))
    outputs = engine.step()
    engine.pause("a")
    assert answer(outputs + engine.run_until_idle(), "first") == sum_model_answer(request().prompt.tokens, 20)
    engine.resume("a", TOOL)
    assert answer(engine.run_until_idle()) == sum_model_answer([*request().prompt.tokens, *TOOL], 20)


@pytest.mark.parametrize("pauses", [(3,), (1, 2, 9)])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1, seed=3, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=12, **PENALTIES),  # type: ignore[arg-type]
        SamplingParams(temperature=0.8, seed=4, max_tokens=12, **PENALTIES),  # type: ignore[arg-type]
    ],
    ids=["seed", "penalties", "both"],
)
def test_with_nothing_added_a_pause_changes_no_token(sampling: SamplingParams, pauses: tuple[int, ...]) -> None:
    engine, said = new_engine(RoughModel()), list[int]()
    engine.submit(request(sampling=sampling))
    for pause in pauses:
        said += steps_until(engine, pause - len(said))
        engine.pause("a", "look")
        engine.resume("a", [])
    said += answer(engine.run_until_idle())
    assert said == whole(RoughModel(), request(sampling=sampling))
    assert len(set(said)) > 2


def test_random_numbers_go_on_behind_what_a_tool_says() -> None:
    sampling = SamplingParams(temperature=1, seed=8, max_tokens=20)
    engine = new_engine(EvenModel())
    engine.submit(request(sampling=sampling))
    said = steps_until(engine, 6)
    engine.pause("a", "look")
    engine.resume("a", TOOL)
    assert said + answer(engine.run_until_idle()) == whole(EvenModel(), request(sampling=sampling))


def test_what_a_tool_says_counts_for_the_repetition_penalty_and_for_no_other() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=8, **PENALTIES)  # type: ignore[arg-type]
    repetition = SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.3)
    added = [*range(8)]
    engine = new_engine(RoughModel())
    engine.submit(request(sampling=sampling))
    engine.pause("a", "look")
    engine.resume("a", added)
    prompt = Prompt(np.asarray([*request().prompt.tokens, *added], np.int32))
    first = answer(engine.run_until_idle())[0]
    assert first == whole(RoughModel(), Request("a", prompt, repetition))[0]
    assert first != whole(RoughModel(), Request("a", prompt, GREEDY))[0]


def test_tokens_are_counted_over_all_parts() -> None:
    model, stop = SumModel(), 3
    prompt = request().prompt.tokens
    said = sum_model_answer(prompt, stop)
    after = sum_model_answer([*prompt, *said, *TOOL], 30)
    sampling = SamplingParams(temperature=0, max_tokens=9, min_tokens=6, stop_token_ids=(after[1], after[4]))
    assert len({*said, *after[:6]}) == stop + 6
    engine = new_engine(model)
    engine.submit(request(sampling=sampling))
    assert steps_until(engine, stop) == said
    engine.pause("a", "look")
    engine.resume("a", TOOL)
    outputs = engine.run_until_idle()
    rest = answer(outputs)
    assert rest[:1] == after[:1]
    assert rest[1] != after[1]  # held back: it would be the fifth of six
    assert stop + len(rest) == 9
    assert isinstance(outputs[-1][1], TokenOutput)
    assert outputs[-1][1].finish is FinishReason.LENGTH


ARRANGED = Arrangement((Part(100, "m"), Part(50)), Fidelity.EXACT)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request("b", n=2), "'b' has several choices"),
        (request("b", arrangement=ARRANGED), "'b' has several choices or an arrangement"),
        (None, "'a' is not known"),
    ],
    ids=["choices", "arranged", "unknown"],
)
def test_what_cannot_be_paused(asked: Request | None, words: str) -> None:
    engine = new_engine()
    if asked is not None:
        engine.submit(asked)
        engine.step()
    with pytest.raises(RequestError, match=words):
        engine.pause(asked.id if asked is not None else "a", "look")
    engine.run_until_idle()
    engine.check()


def test_no_more_requests_are_paused_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.engine.interruptions.MOST_INTERRUPTED", 2)
    engine = new_engine()
    for name in "abc":
        engine.submit(request(name))
    engine.pause("a", "look")
    engine.pause("b", "look")
    with pytest.raises(RequestError, match="2 requests are paused, limit 2"):
        engine.pause("c", "look")
    assert answer(engine.run_until_idle(), "c") == sum_model_answer(request().prompt.tokens, 20)
    engine.abort("a")
    engine.submit(request("d"))
    engine.pause("d", "look")
    engine.check()


@pytest.mark.parametrize("seconds", [-1, 1e12, float("nan"), float("inf")])
def test_a_time_out_of_bounds_is_named_and_the_request_goes_on(seconds: float) -> None:
    engine = new_engine()
    engine.submit(request())
    outputs = engine.step()
    with pytest.raises(RequestError, match=rf"a tool time of {seconds} s, must be in \[0, 86400\]"):
        engine.pause("a", "look", seconds)
    assert answer(outputs + engine.run_until_idle()) == sum_model_answer(request().prompt.tokens, 20)


def test_only_what_is_paused_is_resumed() -> None:
    engine = new_engine()
    engine.submit(request())
    for name in ("a", "b"):
        with pytest.raises(RequestError, match=f"'{name}' is not paused"):
            engine.resume(name, TOOL)
    engine.pause("a", "look")
    engine.resume("a", TOOL)
    with pytest.raises(RequestError, match="'a' is not paused"):
        engine.resume("a", TOOL)
    assert answer(engine.run_until_idle()) == sum_model_answer([*request().prompt.tokens, *TOOL], 20)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([5] * 5000, ContextTooLong),
        *(([n], RequestError) for n in (VOCAB, -1, 2**31, 2**32 + 5, 2**70, 1.5, "5", None)),
    ],
    ids=["context", "vocabulary", "negative", "long", "wraps", "huge", "fraction", "text", "none"],
)
def test_what_does_not_fit_leaves_it_paused(tokens: list[Any], error: type[Exception]) -> None:
    engine = new_engine()
    engine.submit(request())
    engine.step()
    engine.pause("a", "look")
    for _ in range(2):
        with pytest.raises(error):
            engine.resume("a", tokens)
        assert engine.is_open("a")
    engine.resume("a", [])
    assert len(answer(engine.run_until_idle())) >= 19


def test_what_does_not_fit_can_be_aborted() -> None:
    engine = new_engine()
    engine.submit(request())
    engine.step()
    engine.pause("a", "look")
    with pytest.raises(ContextTooLong):
        engine.resume("a", [5] * 5000)
    engine.abort("a")
    assert not engine.is_open("a")
    assert engine.stats().pauses.num_paused == 0
    with pytest.raises(RequestError, match="'a' is not paused"):
        engine.resume("a", [])
    engine.submit(request())  # its id is free again
    assert answer(engine.run_until_idle()) == sum_model_answer(request().prompt.tokens, 20)
    engine.check()


def test_an_abort_leaves_nothing_that_is_spared() -> None:
    engine = new_engine()
    engine.submit(request())
    steps_until(engine, 3)
    engine.pause("a", "look", 3.0)
    assert engine.stats().pauses.num_paused == 1
    assert list(claims(engine))
    engine.abort("a")
    engine.check()
    assert engine.stats().pauses.num_paused == 0
    assert not list(claims(engine))


def claims(engine: Engine) -> list[object]:
    return [claim for on in engine.cache.claims._claims.values() for claim in on]


def test_a_request_that_nobody_continues_is_given_up_after_an_hour() -> None:
    now = [100.0]
    engine = new_engine(clock=lambda: now[0])
    engine.submit(request())
    steps_until(engine, 3)
    engine.pause("a", "look")
    engine.run_until_idle()
    assert engine.forgets_in_s == FORGOTTEN_AFTER_S
    now[0] += FORGOTTEN_AFTER_S - 1
    assert not engine.has_work
    assert engine.step() == []
    assert engine.is_open("a")
    now[0] += 1
    assert engine.has_work
    ((name, output),) = engine.run_until_idle()
    assert name == "a"
    assert isinstance(output, FailedOutput)
    assert str(output.fault) == "request 'a' was paused for 3600 s"
    assert not engine.is_open("a")
    assert engine.stats().pauses.num_paused == 0
    assert engine.stats().pauses.num_forgotten == 1
    assert not claims(engine)
    engine.check()


class Pausing(RuleBasedStateMachine):
    """Requests that are paused, continued and aborted at any moment, with and without room, beside a plain account."""

    names = st.sampled_from("abcdef")

    @initialize(
        order=st.sampled_from(["learned", "fcfs", "infercept", "continuum"]),
        model=st.sampled_from([SumModel, PageSumModel]),
        room=st.sampled_from([(4, 14), (40, 400)]),
        host_pages=st.sampled_from([0, 12]),
    )
    def begin(self, order: str, model: type[SumModel], room: tuple[int, int], host_pages: int) -> None:
        bytes_of = partial(room_for, model())
        host_bytes = bytes_of(1 + host_pages // 4, host_pages) if host_pages else 0
        config = EngineConfig(bytes_of(*room), host_bytes=host_bytes, order=order, max_running=3)
        self.engine = Engine(model(), config)
        self.prompts: dict[str, list[int]] = {}
        self.said: dict[str, list[int]] = {}
        self.paused: set[str] = set()
        self.ended: list[tuple[str, list[int]]] = []  # the latest requests that have, with all their tokens

    @rule(name=names, length=st.integers(1, 200), seed=st.integers(0, 3), session=st.sampled_from(["", "s"]))
    def submit(self, name: str, length: int, seed: int, session: str) -> None:
        self.ask(name, tokens_of(seed, length), session)

    @precondition(lambda self: self.ended)
    @rule(name=names, which=st.integers(0, 3), session=st.sampled_from(["", "s"]), called=st.booleans())
    def go_on(self, name: str, which: int, session: str, called: bool) -> None:
        """The next request of a conversation, maybe after a tool."""
        before, tokens = self.ended[which % len(self.ended)]
        if called and before not in self.prompts:
            with suppress(RequestError):  # it was resumed already
                self.engine.pause(before, "look", 30.0)
        if len(tokens) < 400:
            self.ask(name, np.asarray([*tokens, *TOOL], np.int32), session)

    def ask(self, name: str, tokens: TokenArray, session: str) -> None:
        prompt = Prompt(tokens)
        asked = Request(name, prompt, SamplingParams(temperature=0, max_tokens=30), session=session)
        if name in self.prompts:
            with pytest.raises(RequestError, match="in use"):
                self.engine.submit(asked)
            return
        self.engine.submit(asked)
        self.prompts[name], self.said[name] = prompt.tokens.tolist(), []

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())

    @rule(name=names, seconds=st.sampled_from([None, 0.0, 60.0]))
    def pause(self, name: str, seconds: float | None) -> None:
        if name in self.prompts:
            self.engine.pause(name, "look", seconds)
            self.paused.add(name)

    @rule(name=names, num_tokens=st.integers(0, 80))
    def resume(self, name: str, num_tokens: int) -> None:
        added = tokens_of(9, num_tokens).tolist()
        if name not in self.paused:
            with pytest.raises(RequestError, match="not paused"):
                self.engine.resume(name, added)
            return
        try:
            self.engine.resume(name, added)
        except ContextTooLong:
            return
        self.paused.remove(name)
        self.prompts[name] += self.expected(name) + added

    @rule(name=names)
    def abort(self, name: str) -> None:
        self.engine.abort(name)
        self.end(name)

    @rule(name=names)
    def end_task(self, name: str) -> None:
        if name not in self.prompts:
            self.engine.end_task(name)

    def expected(self, name: str) -> list[int]:
        """What has been said since the last tokens were added, which is as it should be."""
        said, self.said[name] = self.said[name], []
        assert said == sum_model_answer(self.prompts[name], len(said))
        return said

    def take(self, outputs: Outputs) -> None:
        for name, output in outputs:
            assert name not in self.paused
            if isinstance(output, TokenOutput):
                assert output.token is not None
                self.said[name].append(output.token)
                if output.finish:
                    tokens = self.prompts[name] + self.expected(name)
                    self.ended = [*self.ended[-3:], (name, tokens)]
                    self.end(name)

    def end(self, name: str) -> None:
        self.prompts.pop(name, None)
        self.said.pop(name, None)
        self.paused.discard(name)

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            assert all(self.engine.is_open(name) for name in self.prompts)
            assert self.engine.stats().running + self.engine.stats().waiting == len(self.prompts) - len(self.paused)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for name in [*self.paused]:
            self.resume(name, 1)
            if name in self.paused:
                self.abort(name)
        while self.engine.has_work:
            self.take(self.engine.step())
        assert not self.prompts
        self.engine.check()
        assert not any(claim.returned or claim.running for claim in claims(self.engine))  # type: ignore[attr-defined]


TestPausing = Pausing.TestCase
TestPausing.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
