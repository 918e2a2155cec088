"""What the policy is told of requests that end in the engine, and told again once more is known."""

from dataclasses import replace

import pytest

from hybrid_cache.cache.policies.signals import Ending, Finish, Origin
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.endings import MOST_ENDINGS, Endings
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import RequestError
from hybrid_cache.request import FinishReason, Request, Stopper
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.cache.observing import NAME, Observing
from tests.fakes import SumModel, tokens_of

ENDING = Ending(b"name", 3, Finish.STOP)


def watched() -> tuple[Engine, Observing]:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=4 << 20, policy=NAME))
    policy = engine.cache.pool.policy
    assert isinstance(policy, Observing)
    return engine, policy


def request(name: str, seed: int = 0, most: int = 3, **more: object) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=most)
    return Request(name, Prompt(tokens_of(seed, 100)), sampling, **more)  # type: ignore[arg-type]


def stopping(reason: FinishReason | bool) -> Stopper:
    return lambda token: reason


@pytest.mark.parametrize(
    ("reason", "finish"), [(FinishReason.TOOL_CALL, Finish.TOOL_CALL), (True, Finish.STOP), (False, Finish.LENGTH)]
)
def test_the_reason_of_an_ending_is_the_engines(reason: FinishReason | bool, finish: Finish) -> None:
    engine, policy = watched()
    engine.submit(request("a", session="s", user="u", tools=True, template="t", make_stopper=lambda: stopping(reason)))
    engine.run_until_idle()
    (ending,) = policy.endings
    assert (ending.finish, ending.origin) == (finish, Origin("s", "u", True, "t"))
    assert ending.num_output_tokens == (3 if finish is Finish.LENGTH else 1)
    assert policy.outlines[0].origin == ending.origin


def test_an_answer_without_tokens_was_cut() -> None:
    engine, policy = watched()
    engine.submit(request("a", most=0))
    engine.run_until_idle()
    assert [(each.num_output_tokens, each.finish) for each in policy.endings] == [(0, Finish.LENGTH)]


def test_a_canonical_pass_is_of_its_requests_origin() -> None:
    engine, policy = watched()
    engine.submit(request("a", session="s", most=60))
    engine.run_until_idle()
    assert [(each.generated, each.session) for each in policy.outlines] == [(False, "s"), (True, "s")]


def test_what_ends_before_its_answer_is_complete() -> None:
    def broken() -> Stopper:
        def stop(token: int) -> bool:
            raise RequestError("not today")

        return stop

    engine, policy = watched()
    for name, more in (("gone", {}), ("failed", {"make_stopper": broken}), ("paused", {})):
        engine.submit(request(name, most=100, **more))
        while not any(s.generated for s in engine.sequences()) and engine.is_open(name):  # type: ignore[attr-defined]
            engine.step()
        if name == "gone":
            engine.abort(name)
        elif name == "paused":
            engine.pause(name)
    assert [each.finish for each in policy.endings] == [Finish.GONE, Finish.FAILED, Finish.TOOL_CALL]


def test_what_is_learned_later_is_told_once() -> None:
    told = list[Ending]()
    endings = Endings(told.append)
    endings.ended("a", ENDING)
    for _ in range(2):
        endings.called("a")
        endings.left("a")
    endings.called("nobody")
    called = replace(ENDING, finish=Finish.TOOL_CALL, again=True)
    assert told == [called, replace(called, connected=False)]


def test_of_a_client_that_is_gone_and_of_an_id_that_is_used_again_nothing_more_is_told() -> None:
    told = list[Ending]()
    endings = Endings(told.append)
    endings.ended("gone", replace(ENDING, finish=Finish.GONE))
    endings.ended("again", ENDING)
    endings.begins("again")
    endings.ended("short", None)
    for name in ("gone", "again", "short"):
        endings.called(name)
        endings.left(name)
    assert not told


def test_the_latest_endings_are_remembered() -> None:
    told = list[Ending]()
    endings = Endings(told.append)
    for number in range(MOST_ENDINGS + 1):
        endings.ended(str(number), ENDING)
    endings.left("0")
    assert not told
    endings.left("1")
    assert len(told) == 1
