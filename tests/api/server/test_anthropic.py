"""Anthropic's Messages API, asked by its own client and by hand, on a model whose answers are known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import (
    CALLS,
    TEXT,
    new_app,
    new_engine,
    over_the_wire,
    script_messages,
    write_text_model,
)

TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in "fg"]
LONG = "You answer in one word. " * 12


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("calls")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.fixture(scope="module")
def caller(calling: TextModel) -> Iterator[anthropic.Anthropic]:
    with (
        over_the_wire(new_app(new_engine(), calling)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(api: anthropic.Anthropic, **fields: Any) -> Any:
    return api.messages.create(**{"model": "sum", "max_tokens": 20, **fields})


def test_the_clients_own_loop_of_tools_sends_all_messages_once_it_is_told_to(
    caller: anthropic.Anthropic, calling: TextModel
) -> None:
    """It asks for a thread, which is a conversation that the vendor keeps."""
    asked, results = 0, list[str]()

    @anthropic.beta_tool
    def f(x: list[int]) -> str:
        """A tool."""
        results.append("f")
        return str(x)

    @anthropic.beta_tool
    def g() -> str:
        """Another."""
        results.append("g")
        return "2"

    messages: Any = script_messages(calling, CALLS)
    runner = caller.beta.messages.tool_runner(
        model="sum", max_tokens=100, messages=messages, tools=[f, g], max_iterations=2
    )
    for reply in runner:
        asked += 1
        assert reply.role == "assistant"
    assert asked == 2
    assert sorted(set(results)) == ["f", "g"]


def test_a_thread_is_refused_by_the_code_of_the_vendors_own_api(client: httpx.Client) -> None:
    body = {"model": "sum", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        reply = client.post("/v1/messages", json={**body, "thread": thread})
        assert reply.status_code == 400
        assert reply.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    other = client.post("/v1/messages", json={**body, "conversation": "x"})
    assert (other.status_code, "details" in other.json()["error"]) == (400, False)


def test_a_message(api: anthropic.Anthropic, sum_text: TextModel) -> None:
    messages: Any = script_messages(sum_text)
    reply = ask(api, messages=messages)
    assert [block.text for block in reply.content] == [TEXT]
    assert (reply.role, reply.type, reply.model, reply.stop_reason) == ("assistant", "message", "sum", "end_turn")
    assert reply.usage.output_tokens == 10
    counted = api.messages.count_tokens(model="sum", messages=messages)
    usage = reply.usage
    total = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == total
    again = ask(api, messages=messages).usage
    assert again.cache_read_input_tokens == total
    assert again.input_tokens == again.cache_creation_input_tokens == 0
    assert reply._request_id
    assert reply.id.startswith("msg_")


def test_a_message_is_the_same_conversation_as_a_chat_completion(
    api: anthropic.Anthropic, client: httpx.Client, sum_text: TextModel
) -> None:
    """Blocks, turns that are split, and a system prompt beside them, next to what OpenAI's form says."""
    call = {"name": "f", "arguments": '{"x": 1}'}
    theirs = [
        {"role": "system", "content": "Be kind.\nBe short."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "I call.",
            "tool_calls": [{"id": "t1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "Go on"},
    ]
    ours: Any = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "I call."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "Go on"},
            ],
        },
    ]
    system: Any = [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be short."}]
    expected = client.post("/tokenize", json={"model": "sum", "messages": theirs}).json()["count"]
    assert api.messages.count_tokens(model="sum", system=system, messages=ours).input_tokens == expected
    first = client.post("/v1/chat/completions", json={"messages": theirs, "max_tokens": 4, "temperature": 0}).json()
    reply = ask(api, system=system, messages=ours, max_tokens=4, extra_body={"temperature": 0})
    assert reply.content[0].text == first["choices"][0]["message"]["content"]
    assert reply.usage.cache_read_input_tokens == expected


def test_a_stream(api: anthropic.Anthropic, sum_text: TextModel) -> None:
    with api.messages.stream(model="sum", max_tokens=20, messages=script_messages(sum_text)) as stream:  # type: ignore[arg-type]
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 10


def test_the_events_of_a_stream(client: httpx.Client, sum_text: TextModel) -> None:
    asked = {"model": "sum", "max_tokens": 20, "messages": script_messages(sum_text), "stream": True}
    reply = client.post("/v1/messages", json=asked)
    events = events_of(reply.text)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert all(data["type"] == name for name, data in events)
    assert "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta") == TEXT
    started = events[0][1]["message"]
    assert started["content"] == []
    assert started["stop_reason"] is None
    assert started["usage"]["cache_read_input_tokens"] + started["usage"]["input_tokens"] > 0
    assert events[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    lines = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop"),
    [
        ({"max_tokens": 3}, "Hello ", "max_tokens", None),
        ({"stop_sequences": ["STOP", "no"]}, "Hello € ", "stop_sequence", "STOP"),
        ({"stop_sequences": ["never"]}, TEXT, "end_turn", None),
    ],
)
def test_why_an_answer_ends(
    api: anthropic.Anthropic, sum_text: TextModel, fields: dict[str, Any], text: str, reason: str, stop: str | None
) -> None:
    reply = ask(api, messages=script_messages(sum_text), **fields)
    assert (reply.content[0].text, reply.stop_reason, reply.stop_sequence) == (text, reason, stop)


def test_an_answer_that_the_context_ends(sum_text: TextModel) -> None:
    app = new_app(new_engine(budget_bytes=1 << 22), sum_text)
    with over_the_wire(app) as url, anthropic.Anthropic(base_url=url, api_key="none") as api:
        reply = ask(api, messages=[{"role": "user", "content": "a" * 4070}], max_tokens=4000)
        assert reply.stop_reason in ("model_context_window_exceeded", "end_turn")
        if reply.stop_reason == "model_context_window_exceeded":
            assert (
                reply.usage.input_tokens + reply.usage.cache_creation_input_tokens + reply.usage.output_tokens == 4096
            )


def test_tool_calls(caller: anthropic.Anthropic, calling: TextModel) -> None:
    messages: Any = script_messages(calling, CALLS)
    reply = ask(caller, messages=messages, tools=TOOLS, max_tokens=40)
    assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use"]
    assert reply.content[0].text == "Let me see. "
    assert [(block.name, block.input) for block in reply.content[1:]] == [("f", {"x": [1]}), ("g", {})]
    assert reply.stop_reason == "tool_use"
    with caller.messages.stream(model="sum", max_tokens=40, messages=messages, tools=TOOLS) as stream:  # type: ignore[arg-type]
        final = stream.get_final_message()
    assert [block.to_dict() | {"id": ""} for block in final.content[1:]] == [
        block.to_dict() | {"id": ""} for block in reply.content[1:]
    ]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "2"}
        for block in final.content
        if block.type == "tool_use"
    ]
    turns = [*messages, {"role": "assistant", "content": final.content}, {"role": "user", "content": results}]
    assert ask(caller, messages=turns, tools=TOOLS, max_tokens=1).usage.output_tokens == 1


def test_without_tools_calls_are_text(caller: anthropic.Anthropic, calling: TextModel) -> None:
    messages = script_messages(calling, CALLS)
    reply = ask(caller, messages=messages, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=40)
    assert [block.type for block in reply.content] == ["text"]


def test_the_last_message_may_begin_the_answer(api: anthropic.Anthropic, client: httpx.Client) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]
    reply = ask(api, messages=messages, max_tokens=4, extra_body={"temperature": 0})
    asked = {"messages": messages, "max_tokens": 4, "temperature": 0, "continue_final_message": True}
    expected = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert reply.content[0].text == expected


SAID: Any = {"role": "assistant", "content": "I call."}
THOUGHT: Any = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Well", "signature": ""}]}
EMPTY: Any = {"role": "user", "content": []}
QUESTION: Any = {"role": "user", "content": "Hi"}
MARK: Any = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("more", [{}, MARK, {"stream": True}, {"tools": TOOLS}], ids=str)
@pytest.mark.parametrize(("messages", "which"), [([EMPTY], 0), ([EMPTY, EMPTY], 0), ([QUESTION, EMPTY], 1)])
def test_an_empty_turn_is_named(
    client: httpx.Client, path: str, more: dict[str, Any], messages: list[Any], which: int
) -> None:
    reply = client.post(path, json={"model": "sum", "max_tokens": 1, "messages": messages, **more})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"messages.{which}: a message with role 'user' needs content")


def marked(text: str, ttl: str | None = None) -> dict[str, Any]:
    control = {"type": "ephemeral"} if ttl is None else {"type": "ephemeral", "ttl": ttl}
    return {"type": "text", "text": text, "cache_control": control}


def test_a_marked_prefix_is_kept_to_the_token(sum_text: TextModel) -> None:
    """Without marks a state lies at the end of a tile; a mark is where the next prompt goes on."""
    with (
        over_the_wire(new_app(new_engine(), sum_text)) as url,
        anthropic.Anthropic(base_url=url, api_key="none") as api,
    ):
        first = ask(api, system=[marked(LONG, "1h")], messages=[{"role": "user", "content": "one"}], max_tokens=1)
        total = first.usage.input_tokens + first.usage.cache_creation_input_tokens
        assert first.usage.cache_creation.ephemeral_1h_input_tokens > 0
        second = ask(api, system=[marked(LONG, "1h")], messages=[{"role": "user", "content": "two!"}], max_tokens=1)
        assert second.usage.cache_read_input_tokens >= 64 * ((total - 30) // 64)
        later = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": [marked("Once more, " * 20)]},
        ]
        third = ask(api, system=[marked(LONG, "1h")], messages=later, max_tokens=1)
        assert third.usage.cache_read_input_tokens >= second.usage.cache_read_input_tokens
        assert third.usage.cache_creation.ephemeral_5m_input_tokens > 0
        assert third.usage.cache_creation.ephemeral_1h_input_tokens == 0


@pytest.mark.parametrize("keep", [False, True])
def test_a_billing_header_with_a_number_of_its_own(sum_text: TextModel, keep: bool) -> None:
    with (
        over_the_wire(new_app(new_engine(), sum_text, keep_billing_header=keep)) as url,
        anthropic.Anthropic(base_url=url, api_key="none") as api,
    ):
        usages = []
        for number in ("aaa", "bbb"):
            billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number};"}
            system = [billing, {"type": "text", "text": LONG}]
            usages.append(ask(api, system=system, messages=[{"role": "user", "content": "one"}], max_tokens=1).usage)
        assert (usages[1].cache_read_input_tokens > 200) == (not keep)


def refused(api: anthropic.Anthropic, **fields: Any) -> anthropic.APIStatusError:
    with pytest.raises(anthropic.APIStatusError) as found:
        ask(api, **{"messages": [{"role": "user", "content": "Hi"}], **fields})
    body: Any = found.value.body
    assert body["type"] == "error"
    assert body["request_id"] == found.value.request_id
    return found.value


USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]}
TWICE = {"role": "assistant", "content": 2 * USE["content"]}  # type: ignore[operator]


def result(name: str = "t1") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": name, "content": "1"}]}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "named"),
    [
        ({"model": "claude"}, 404, "not_found_error", "claude"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, 400, "invalid_request_error", "temperature"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"extra_body": {"output_config": {"format": {}}}}, 400, "invalid_request_error", "output_config"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "image"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [result()]}, 400, "invalid_request_error", "'t1' answers no tool_use"),
        ({"messages": [QUESTION, USE]}, 400, "invalid_request_error", "messages.1: a tool_use block needs its tool"),
        ({"messages": [QUESTION, USE, SAID]}, 400, "invalid_request_error", "messages.2: a tool_use block needs its"),
        ({"messages": [QUESTION, {**SAID, "content": ""}]}, 400, "invalid_request_error", "messages.1: the answer con"),
        ({"messages": [QUESTION, THOUGHT]}, 400, "invalid_request_error", "messages.1: the answer continues"),
        (
            {"messages": [USE, {"role": "user", "content": "a"}]},
            400,
            "invalid_request_error",
            "'t1' has no tool_result",
        ),
        ({"messages": [USE, result(), result()]}, 400, "invalid_request_error", "'t1' answers no tool_use"),
        ({"messages": [TWICE, result()]}, 400, "invalid_request_error", "same id"),
        ({"messages": [{"role": "user", "content": USE["content"]}]}, 400, "invalid_request_error", "tool_use"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "no thoughts"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "bash_20250124"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "invalid_request_error", "context"),
    ],
    ids=str,
)
def test_errors_have_the_form_of_the_dialect(
    api: anthropic.Anthropic, fields: dict[str, Any], status: int, kind: str, named: str
) -> None:
    error = refused(api, **fields)
    body: Any = error.body
    assert (error.status_code, body["error"]["type"]) == (status, kind)
    assert named in body["error"]["message"]


def test_a_key_is_taken_from_the_header_that_the_client_sends(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("right", "other"))) as url:
        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as api:
            assert isinstance(refused(api), anthropic.AuthenticationError)
        messages: Any = [{"role": "user", "content": LONG}]
        usages = []
        for key in ("right", "right", "other"):
            with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as api:
                usages.append(ask(api, messages=messages, max_tokens=1).usage.cache_read_input_tokens)
        assert usages[0] == usages[2] == 0
        assert usages[1] > 0


def test_what_is_no_json_is_an_error_of_the_dialect(client: httpx.Client) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        reply = client.post(path, content=b"{", headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert reply.json()["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    assert client.get("/v1/messages").json()["type"] == "error"
    assert "type" not in client.post("/v1/chat/completions", content=b"{").json()
