"""Tool calls through /v1/chat/completions, from a model that always makes two."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import CALLS, events_of, new_app, new_engine, over_the_wire, script_messages, write_text_model

PLAIN = "Let me see. "
WHOLE = "".join(str(piece) for piece in CALLS)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("tools")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.fixture(scope="module")
def url(text: TextModel) -> Iterator[str]:
    with over_the_wire(new_app(new_engine(), text)) as address:
        yield address


def asked(text: TextModel, **fields: object) -> dict[str, object]:
    return {"messages": script_messages(text, CALLS), "tools": TOOLS, **fields}


def test_calls_are_taken_out_of_the_text(client: httpx.Client, text: TextModel) -> None:
    choice = client.post("/v1/chat/completions", json=asked(text)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == PLAIN
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": '{"x": [1]}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_calls_are_text(client: httpx.Client, text: TextModel, fields: dict[str, object]) -> None:
    choice = client.post("/v1/chat/completions", json=asked(text, **fields)).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == WHOLE
    assert "tool_calls" not in choice["message"]


def test_a_call_that_is_cut_off_stays_text(client: httpx.Client, text: TextModel) -> None:
    choice = client.post("/v1/chat/completions", json=asked(text, max_tokens=5)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == 'Let me see. <tool_call>{"name": "f", "argu'


def test_a_stream_shows_calls_as_they_are_written(client: httpx.Client, text: TextModel) -> None:
    events = events_of(client.post("/v1/chat/completions", json=asked(text, stream=True)).text)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [delta["content"] for delta in deltas if delta.get("content")] == ["Let me", " see.", " "]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in calls] == [
        (0, {"name": "f", "arguments": ""}),
        (0, {"arguments": '{"x": [1]}'}),
        (1, {"name": "g", "arguments": ""}),
        (1, {"arguments": "{}"}),
    ]
    assert [sorted(call) for call in calls] == [["function", "id", "index", "type"], ["function", "index"]] * 2
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_openai_client_collects_the_calls(url: str, text: TextModel) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        messages = script_messages(text, CALLS)
        with client.chat.completions.stream(model="sum", messages=messages, tools=TOOLS) as stream:
            message = stream.get_final_completion().choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["f", "g"]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in message.tool_calls]
        turn = {
            "role": "assistant",
            "content": message.content,
            "tool_calls": [c.to_dict() for c in message.tool_calls],
        }
        follow_up = client.chat.completions.create(model="sum", messages=[*messages, turn, *results], max_tokens=1)
        assert follow_up.usage.completion_tokens == 1


def test_a_strict_tool_is_called_as_it_says_though_nobody_asked_for_a_call(
    client: httpx.Client, text: TextModel
) -> None:
    """The model wants to write [1] for x, and then whatever comes: arguments that are complete end the call."""
    schema = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"], "additionalProperties": False}
    loose = {"type": "function", "function": {"name": "f", "parameters": schema}}
    strict = {**loose, "function": {**loose["function"], "strict": True}}  # type: ignore[dict-item]
    for tools, said in (([loose], '{"x": [1]}'), ([strict], '{"x": 7}')):
        choice = client.post("/v1/chat/completions", json=asked(text, tools=tools, max_tokens=60)).json()["choices"][0]
        assert choice["message"]["content"].startswith("Let me see.")
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": said}
    odd = {**strict, "function": {**strict["function"], "parameters": {**schema, "uniqueItems": True}}}  # type: ignore[dict-item]
    refused = client.post("/v1/chat/completions", json=asked(text, tools=[odd]))
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]


def test_an_answer_in_a_form_may_be_a_call(client: httpx.Client, text: TextModel) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    choice = client.post("/v1/chat/completions", json=asked(text, response_format=form, max_tokens=60)).json()[
        "choices"
    ][0]
    message = choice["message"]
    assert message.get("tool_calls") or message["content"] in ('"yes"', '"no"')


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_no_more_are_wanted(client: httpx.Client, text: TextModel, url: str, stream: bool) -> None:
    body = asked(text, parallel_tool_calls=False, stream=stream)
    reply = client.post("/v1/chat/completions", json=body)
    if stream:
        choices = [event["choices"][0] for event in events_of(reply.text)]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", []) if "id" in call]
    else:
        choices = [reply.json()["choices"][0]]
        calls = choices[0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["f"]
    assert choices[-1]["finish_reason"] == "tool_calls"
    messages = {
        "model": "sum",
        "max_tokens": 100,
        "messages": script_messages(text, CALLS),
        "tools": [{"name": name, "input_schema": {"type": "object"}} for name in "fg"],
    }
    for choice, names in (({"type": "auto"}, "fg"), ({"type": "auto", "disable_parallel_tool_use": True}, "f")):
        blocks = client.post("/v1/messages", json={**messages, "tool_choice": choice}).json()["content"]
        assert [block["name"] for block in blocks if block["type"] == "tool_use"] == list(names)
