"""Tasks across requests: what an agent's client does between two answers, and what the engine makes of it."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest

from hybrid_cache.api.server.schemas.anthropic import MessagesRequest
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.tasks import HEADER, kind_of, tool_time_of
from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.api.text.tool_formats import DEFAULT
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import Engine
from hybrid_cache.stats import PauseStats
from tests.api.servers import CALLS, IM_END, new_app, new_engine, over_the_wire, script_ids, write_text_model
from tests.fakes import VOCAB

Messages = list[dict[str, Any]]
NAMES = ("f", "g")
SCHEMA = {"type": "object"}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in NAMES]
CALLING, DONE = script_ids(CALLS)[0], IM_END  # the first token of an answer that calls both, and of one that ends
LONG = "Look into the boxes, one after the other. " * 8


class Chat:
    """An agent's client, which is told the messages of a chat and says the next one."""

    def __init__(self, url: str, stream: bool) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._stream = stream

    def say(self, messages: Messages, headers: dict[str, str]) -> dict[str, Any]:
        fields: Any = {"model": "sum", "messages": messages, "tools": TOOLS, "extra_headers": headers}
        if self._stream:
            with self.client.chat.completions.stream(**fields) as stream:
                choice: Any = stream.get_final_completion().choices[0]
        else:
            choice = self.client.chat.completions.create(**fields).choices[0]
        calls = [call.to_dict() for call in choice.message.tool_calls or ()]
        for call in calls:
            call["function"].pop("parsed_arguments", None)
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        return said(choice.message.content, calls)


class Anthropic:
    """The same in the words of /v1/messages."""

    def __init__(self, url: str, stream: bool) -> None:
        self.client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        self._stream = stream

    def say(self, messages: Messages, headers: dict[str, str]) -> dict[str, Any]:
        tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
        turns = [self._turn(message) for message in messages]
        fields: Any = {"model": "sum", "max_tokens": 60, "messages": turns, "tools": tools, "extra_headers": headers}
        if self._stream:
            with self.client.messages.stream(**fields) as stream:
                reply: Any = stream.get_final_message()
        else:
            reply = self.client.messages.create(**fields)
        text = "".join(block.text for block in reply.content if block.type == "text")
        blocks = [block for block in reply.content if block.type == "tool_use"]
        assert reply.stop_reason == ("tool_use" if blocks else "end_turn")
        return said(text, [called(block.id, block.name, json.dumps(block.input)) for block in blocks])

    def _turn(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            block = {
                "type": "tool_result",
                "tool_use_id": message["tool_call_id"],
                "content": message["content"],
            }
            return {"role": "user", "content": [block]}
        blocks: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}] if message["content"] else []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.loads(function["arguments"])
            blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        return {"role": message["role"], "content": blocks}


class Responses:
    """The same in the words of /v1/responses."""

    def __init__(self, url: str, stream: bool) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._stream = stream

    def say(self, messages: Messages, headers: dict[str, str]) -> dict[str, Any]:
        tools = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": False} for name in NAMES]
        items = [item for message in messages for item in self._items(message)]
        fields: Any = {"model": "sum", "input": items, "tools": tools, "extra_headers": headers}
        if self._stream:
            with self.client.responses.stream(**fields) as stream:
                reply: Any = stream.get_final_response()
        else:
            reply = self.client.responses.create(**fields)
        assert reply.status == "completed"
        calls = [item for item in reply.output if item.type == "function_call"]
        return said(reply.output_text, [called(item.call_id, item.name, item.arguments) for item in calls])

    def _items(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if message["role"] == "tool":
            yield {
                "type": "function_call_output",
                "call_id": message["tool_call_id"],
                "output": message["content"],
            }
            return
        if message["content"]:
            yield {"role": message["role"], "content": message["content"]}
        for call in message.get("tool_calls", ()):
            yield {"type": "function_call", "call_id": call["id"], **call["function"]}


Client = Chat | Anthropic | Responses


def said(text: str | None, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": text or "", **({"tool_calls": calls} if calls else {})}


def called(name: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}


class Scene:
    """A server, and what its engine knows."""

    def __init__(self, url: str, engine: AsyncEngine, stack: ExitStack) -> None:
        self.http = stack.enter_context(httpx.Client(base_url=url, timeout=20))
        self._url = url
        self._engine = engine
        self._stack = stack

    @classmethod
    @contextmanager
    def of(cls, text: TextModel, **settings: object) -> Iterator["Scene"]:
        engine = new_engine(budget_bytes=16 << 20)
        with over_the_wire(new_app(engine, text, **settings)) as url, ExitStack() as stack:
            yield cls(url, engine, stack)

    def agent(self, dialect: "type[Client] | None" = None, *, stream: bool = False) -> "Client":
        agent = (dialect or Chat)(self._url, stream)
        self._stack.enter_context(agent.client)
        return agent

    def leading_to(self, token: int, messages: Messages) -> Messages:
        """The same messages, the last one with more text, so that the model goes on with a token."""
        last, tokens = messages[-1], self.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        for count in range(40):
            missing = (token - sum(tokens) - len(tokens) - count * (ord("a") + 1) - 1) % VOCAB
            if 0x21 <= missing < 0x7F:
                return [*messages[:-1], {**last, "content": last["content"] + "a" * count + chr(missing)}]
        raise AssertionError("no text does it")

    def begin(self, topic: str) -> Messages:
        return self.leading_to(CALLING, [{"role": "user", "content": topic + LONG}])

    def after(self, messages: Messages, answer: dict[str, Any], token: int) -> Messages:
        """The messages with an answer to them and what its tools say, after which the model goes on with a token."""
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in answer["tool_calls"]]
        return self.leading_to(token, [*messages, answer, *results])

    @property
    def pauses(self) -> PauseStats:
        return self.ask(lambda engine: engine.stats().pauses)

    def ask(self, function: Callable[[Engine], Any]) -> Any:
        return asyncio.run(self._engine.ask(function))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.pauses
            time.sleep(0.005)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"hybrid_cache_{name} ")]
        return float(value)

    def claims(self) -> list[Any]:
        """What is counted on in the cache, whose books are in order."""

        def look(engine: Engine) -> list[Any]:
            engine.check()
            return [claim for claims in engine.cache.claims._claims.values() for claim in claims]

        return list(self.ask(look))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("pauses")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.fixture
def scene(text: TextModel) -> Iterator[Scene]:
    with Scene.of(text) as scene:
        yield scene


@pytest.mark.parametrize("session", ["mine", ""])
@pytest.mark.parametrize("dialect", [Chat, Anthropic, Responses])
def test_an_agents_loop_is_one_task(scene: Scene, dialect: type[Client], session: str) -> None:
    agent, messages = scene.agent(dialect, stream=bool(session)), scene.begin("At last. ")
    headers = {"x-session-id": session} if session else {}
    for step in range(3):
        answer = agent.say(messages, {**headers, HEADER: "1500"})
        assert [call["function"]["name"] for call in answer["tool_calls"]] == [*NAMES]
        assert scene.pauses == PauseStats(1, step, step, 0)
        assert scene.metric("tasks_paused") == 1
        [pause] = scene.ask(lambda engine: [*engine._scheduler.tasks.pauses._turns])
        assert (pause.tool, pause.hint_s, pause.task.num_calls) == ("f,g", 1.5, step + 1)
        messages = scene.after(messages, answer, CALLING if step < 2 else DONE)
    assert "tool_calls" not in agent.say(messages, headers)
    assert scene.pauses == PauseStats(0, 3, 3, 0)
    assert scene.metric('tasks_resumed_total{kind="resident"}') == 3
    assert not scene.claims()
    (habits,) = scene.ask(lambda engine: [*engine._scheduler.tasks.load.outlook._habits.values()])
    assert [mean.count for mean in habits.left[:5]] == [2, 2, 2, 2, 1]  # one task of four requests has ended


def test_what_ends_an_answer_is_counted_under_its_own_name_and_under_vllms(text: TextModel) -> None:
    with Scene.of(text, vllm_metrics=True) as scene:
        scene.agent().say(scene.begin(""), {})
        lines = scene.http.get("/metrics").text.splitlines()
        assert 'hybrid_cache_choices_finished_total{finished_reason="tool_call"} 1.0' in lines
        (vllm,) = [line for line in lines if line.startswith("vllm:request_success_total{")]
        assert 'finished_reason="stop"' in vllm


def test_a_hint_that_is_no_time_is_refused_in_the_dialects_own_form(scene: Scene) -> None:
    messages: Messages = [{"role": "user", "content": "x"}]
    agents = [scene.agent(dialect) for dialect in (Chat, Responses, Anthropic)]
    for hint in ("-1", "1e12", "soon", "86400001", "nan", "1_000", "1 2", "-0.5", "9" * 400):
        words = f"the header {HEADER} is {repr(hint)[:100]}"
        for agent in agents[:2]:
            with pytest.raises(openai.BadRequestError) as refused:
                agent.say(messages, {HEADER: hint})
            assert (refused.value.param, refused.value.type) == (HEADER, "invalid_request_error")
            assert words in refused.value.message
            assert "must be a number of milliseconds in [0, 86400000]" in refused.value.message
        with pytest.raises(anthropic.BadRequestError) as other:
            agents[2].say(messages, {HEADER: hint})
        body: Any = other.value.body
        assert body["error"]["type"] == "invalid_request_error"
        assert words in body["error"]["message"]
        reply = scene.http.post("/v1/completions", json={"prompt": "x"}, headers={HEADER: hint})
        assert reply.status_code == 400
    assert scene.ask(lambda engine: engine.stats().steps) == 0


@pytest.mark.parametrize(
    ("said", "seconds"), [("", None), ("0", 0.0), (" 250 ", 0.25), ("86400000", 86400.0), ("0.5", 0.0005)]
)
def test_hints_that_are_times(said: str, seconds: float | None) -> None:
    assert tool_time_of({HEADER: said}) == seconds
    assert tool_time_of({}) is None


def test_the_description_names_the_header(scene: Scene) -> None:
    paths = scene.http.get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        (shown,) = [each for each in paths[path]["post"]["parameters"] if each["in"] == "header"]
        assert shown["name"] == HEADER
        assert shown["schema"]["maximum"] == 86_400_000


def test_the_kind_of_a_task_is_a_digest_of_its_tools_and_its_dialect() -> None:
    asked, other = ChatRequest.model_construct(), MessagesRequest.model_construct()
    one, two = (AnswerForm(DEFAULT, {name: {} for name in names}) for names in ("fg", "gf"))
    kinds = {kind_of(each, form) for each in (asked, other) for form in (one, two)}
    assert len(kinds) == 2
    assert all(len(kind) == 16 for kind in kinds)
    assert kind_of(asked, AnswerForm()) == ""
    assert kind_of(asked, AnswerForm(DEFAULT, {"f": {}})) not in kinds


def test_several_choices_and_answers_without_tools_pause_nothing(scene: Scene) -> None:
    messages = scene.begin("")
    body = {"messages": messages, "tools": TOOLS, "n": 2, "max_tokens": 60}
    several = scene.http.post("/v1/chat/completions", json=body).json()
    assert [choice["finish_reason"] for choice in several["choices"]] == ["tool_calls"] * 2
    scene.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 60})
    cut = {"messages": messages, "tools": TOOLS, "max_tokens": 4}
    assert scene.http.post("/v1/chat/completions", json=cut).json()["choices"][0]["finish_reason"] == "length"
    assert scene.pauses == PauseStats()


def test_a_call_that_is_never_answered_is_forgotten(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.scheduling.pauses.FORGOTTEN_AFTER_S", 0.3)
    agent = scene.agent()
    agent.say(scene.begin("Never. "), {HEADER: "86400000"})
    assert scene.pauses.num_paused == 1
    assert scene.claims()
    time.sleep(0.35)
    agent.say(scene.leading_to(DONE, [{"role": "user", "content": "Other. "}]), {})
    scene.until(lambda: scene.pauses == PauseStats(0, 0, 0, 1))
    assert not scene.claims()


def test_a_turn_that_two_clients_resume_is_one_tasks_and_both_are_answered(scene: Scene) -> None:
    messages, agent = scene.begin("Both. "), scene.agent()
    after = scene.after(messages, agent.say(messages, {}), CALLING)
    answers = list[dict[str, Any]]()
    clients = [threading.Thread(target=lambda: answers.append(scene.agent().say(after, {}))) for _ in range(2)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(20)
    assert [[call["function"] for call in answer["tool_calls"]] for answer in answers] == [
        [{"name": "f", "arguments": '{"x": [1]}'}, {"name": "g", "arguments": "{}"}]
    ] * 2
    assert scene.pauses.num_resumed == 1
    assert scene.pauses.num_paused == 2  # the task goes on, and one of its own
    scene.claims()


@pytest.mark.parametrize("session", ["mine", ""])
def test_a_history_that_was_edited_is_the_same_task_only_where_a_session_says_so(scene: Scene, session: str) -> None:
    headers = {"x-session-id": session} if session else {}
    messages, agent = scene.begin("First. "), scene.agent()
    answer = agent.say(messages, headers)
    edited = [{"role": "user", "content": "Something else, from the first word on. " * 9}]
    rest = agent.say(scene.after(edited, answer, DONE), headers)
    assert rest == said("", [])
    resumed = int(bool(session))
    scene.until(lambda: scene.pauses == PauseStats(1 - resumed, resumed, 0, 0))
    assert len(scene.claims()) == 1 - resumed


def test_an_answer_that_nobody_waits_for_leaves_nothing_that_is_counted_on(scene: Scene) -> None:
    messages, agent = scene.begin("Away. "), scene.agent()
    after = scene.after(messages, agent.say(messages, {}), 500)
    body = {"messages": after, "tools": TOOLS, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with scene.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        assert scene.ask(lambda engine: engine.stats().running) == 1
    scene.until(lambda: scene.ask(lambda engine: engine.stats().running) == 0)
    assert not scene.claims()
    assert scene.pauses == PauseStats(0, 1, 1, 0)
