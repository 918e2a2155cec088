"""What the cache's policy is told of requests that come over HTTP: where they come from, and how their answers end."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.schemas.anthropic import MessagesRequest
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.sessions import user_of
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.cache.policies.base import Outline
from hybrid_cache.cache.policies.signals import Ending, Finish
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.server.test_pauses import LONG, TOOLS, Scene
from tests.api.servers import CALLS, IM_END, new_app, new_engine, over_the_wire, write_text_model
from tests.cache.observing import NAME, Observing

TURN = {"role": "user", "content": LONG}
SYSTEM = {"role": "system", "content": "Be brief. " * 12}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", **fields})


def message(**metadata: str) -> MessagesRequest:
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": [TURN], "metadata": metadata})


@dataclass
class Observed:
    """A server whose policy notes down what it is told."""

    url: str
    engine: AsyncEngine
    stack: ExitStack = field(default_factory=ExitStack)

    def client(self) -> httpx.Client:
        return self.stack.enter_context(httpx.Client(base_url=self.url, timeout=20))

    def ask(self, body: dict[str, Any], client: httpx.Client | None = None) -> dict[str, Any]:
        reply = (client or self.client()).post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def scene(self) -> Scene:
        return Scene(self.url, self.engine, self.stack)

    def told(self, look: Callable[[Observing], list[Any]], count: int) -> list[Any]:
        """What the policy has been told, once there is that much of it."""
        deadline = time.monotonic() + 10
        while True:
            found: list[Any] = asyncio.run(self.engine.ask(lambda engine: [*look(engine.cache.pool.policy)]))  # type: ignore[arg-type]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    def endings(self, count: int) -> list[Ending]:
        return self.told(lambda policy: policy.endings, count)

    def prompts(self, count: int) -> list[Outline]:
        return self.told(lambda policy: [each for each in policy.outlines if not each.generated], count)


@pytest.fixture
def observed(calls_text: TextModel) -> Iterator[Observed]:
    engine = new_engine(budget_bytes=16 << 20, policy=NAME)
    with over_the_wire(new_app(engine, calls_text)) as url, ExitStack() as stack:
        yield Observed(url, engine, stack)


@pytest.fixture(scope="module")
def calls_text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("signals")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_that_calls_tools_ends_in_a_tool_call(observed: Observed, parallel: bool) -> None:
    messages = observed.scene().begin("")
    said = observed.ask({"messages": messages, "tools": TOOLS, "parallel_tool_calls": parallel})
    assert said["choices"][0]["finish_reason"] == "tool_calls"
    first, last = observed.endings(2)
    assert (first.name, first.finish, first.again) == (last.name, Finish.STOP, False), "the engine reads no text"
    assert (last.finish, last.again) == (Finish.TOOL_CALL, True)
    assert last.num_output_tokens == said["usage"]["completion_tokens"]
    assert last.origin.tools is True


def test_an_answer_that_stops_and_one_that_is_cut(observed: Observed) -> None:
    messages = observed.scene().leading_to(IM_END, [TURN])
    assert observed.ask({"messages": messages, "max_tokens": 60})["choices"][0]["finish_reason"] == "stop"
    assert observed.ask({"messages": [TURN], "max_tokens": 3})["choices"][0]["finish_reason"] == "length"
    stopped, cut = (ending for ending in observed.endings(2) if not ending.again)
    assert (stopped.finish, cut.finish) == (Finish.STOP, Finish.LENGTH)
    assert cut.num_output_tokens == 3
    assert stopped.origin.tools is cut.origin.tools is False
    assert stopped.name in {name for outline in observed.prompts(2) for name in outline.keys.names}


def test_a_client_that_goes_away_before_its_answer_is_complete_is_gone(observed: Observed) -> None:
    body = {"messages": [TURN], "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=observed.url) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as told,
    ):
        next(told.iter_lines())
    (ending,) = observed.endings(1)
    assert ending.finish is Finish.GONE
    assert ending.num_output_tokens < 3000


def test_a_connection_that_is_closed_after_its_answers_is_told_of_each(observed: Observed) -> None:
    with httpx.Client(base_url=observed.url) as client:
        for turn in ("one", "two"):
            observed.ask({"messages": [{"role": "user", "content": turn + LONG}], "max_tokens": 3}, client)
        first, second = observed.endings(2)
        assert first.connected is second.connected is None
    others = observed.endings(4)[2:]
    assert [(each.name, each.connected, each.again) for each in others] == [
        (each.name, False, True) for each in (first, second)
    ]
    assert {each.finish for each in others} == {Finish.LENGTH}, "what was known is still told"


def test_what_a_request_says_of_itself_reaches_the_policy(observed: Observed) -> None:
    for session, user, tools, messages in (
        ("s", "u", TOOLS, [SYSTEM, TURN]),
        ("t", "", TOOLS, [SYSTEM, {"role": "user", "content": "Other. " + LONG}]),
        ("", "", [], [SYSTEM, TURN]),
        ("", "", [], [TURN]),
    ):
        more: dict[str, Any] = {"tools": tools} if tools else {}
        said = {"session_id": session, "user": user, "messages": messages, "max_tokens": 2, **more}
        observed.ask({name: value for name, value in said.items() if value})
    first, second, third, fourth = (outline.origin for outline in observed.prompts(4))
    assert (first.session, first.user, first.tools) == ("s", "u", True)
    assert (second.session, second.user, third.tools) == ("t", "", False)
    assert first.template == second.template != third.template != fourth.template == ""
    assert len(first.template) == 16


@pytest.mark.parametrize(
    ("asked", "user"),
    [
        (chat(messages=[TURN], user=" me "), "me"),
        (chat(messages=[TURN]), ""),
        (chat(messages=[TURN], user="u" * 300), None),
        (message(user_id="somebody"), "somebody"),
        (message(user_id="user_4f_account_5_session_6"), "user_4f_account_5"),
        (message(user_id='{"session_id": "s"}'), ""),
        (message(), ""),
    ],
)
def test_where_a_user_is_found(asked: Any, user: str | None) -> None:
    assert user_of(asked) == user or (user is None and user_of(asked).startswith("sha256:"))
