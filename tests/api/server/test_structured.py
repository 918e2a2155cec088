"""Answers in a form that is asked for, in both dialects, from a model that would say something else."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import script_messages, script_prompt

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "sure": {"type": "boolean"}},
    "required": ["name", "sure"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


class Found(BaseModel):
    sure: bool


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def messages(sum_text: TextModel) -> Any:
    return script_messages(sum_text)


def test_a_schema(api: openai.OpenAI, messages: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        reply = api.chat.completions.create(
            model="sum", messages=messages, response_format=form, temperature=1, seed=seed, max_tokens=400
        )
        found = json.loads(reply.choices[0].message.content or "")
        assert list(found) == ["name", "sure"]
        assert isinstance(found["sure"], bool)
        assert reply.choices[0].finish_reason == "stop"


def test_the_clients_own_parser(api: openai.OpenAI, messages: Any) -> None:
    reply = api.chat.completions.parse(model="sum", messages=messages, response_format=Found, max_tokens=400)
    assert isinstance(reply.choices[0].message.parsed, Found)


def test_a_form_that_is_complete_ends_an_answer_before_min_tokens(client: httpx.Client, sum_text: TextModel) -> None:
    asked = {"messages": script_messages(sum_text), "min_tokens": 30, "max_tokens": 40}
    for form, said in (({"choice": ["yes"]}, "yes"), ({"regex": "a?"}, None), ({"regex": "(yes)?"}, None)):
        reply = client.post("/v1/chat/completions", json={**asked, "structured_outputs": form}).json()
        choice = reply["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert said is None or choice["message"]["content"] == said


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_fields(client: httpx.Client, stream: bool) -> None:
    forms: list[dict[str, Any]] = [{"regex": "[ab]{3}c"}, {"choice": ["yes", "no"]}, {"grammar": 'start: "q"'}]
    for outputs in forms:
        asked = {"prompt": script_prompt(), "structured_outputs": outputs, "max_tokens": 50, "stream": stream}
        reply = client.post("/v1/completions", json=asked)
        assert reply.status_code == 200, reply.text
        if stream:
            blocks = [block.removeprefix("data: ") for block in reply.text.split("\n\n")[:-2]]
            text = "".join(json.loads(block)["choices"][0]["text"] for block in blocks)
        else:
            text = reply.json()["choices"][0]["text"]
        if "regex" in outputs:
            assert set(text[:3]) <= {"a", "b"}
            assert text[3:] == "c"
        else:
            assert text in outputs.get("choice", ["q"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_has_to_be_made(api: openai.OpenAI, messages: Any, choice: Any) -> None:
    for seed in range(5):
        reply = api.chat.completions.create(
            model="sum",
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            temperature=1,
            seed=seed,
            max_tokens=900,
            parallel_tool_calls=False,
        )
        [call] = reply.choices[0].message.tool_calls or []
        assert call.function.name == "look"  # type: ignore[union-attr]
        assert list(json.loads(call.function.arguments)) == ["name", "sure"]  # type: ignore[union-attr]
        assert reply.choices[0].finish_reason == "tool_calls"


def test_the_same_for_anthropics_client(url: str, messages: Any) -> None:
    tools: Any = [{"name": "look", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as api:
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}):
            reply: Any = api.messages.create(
                model="sum",
                max_tokens=900,
                messages=messages,
                tools=tools,
                tool_choice=choice,  # type: ignore[arg-type]
            )
            assert [block.type for block in reply.content] == ["tool_use"]
            assert list(reply.content[0].input) == ["name", "sure"]
            assert reply.stop_reason == "tool_use"
        form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
        reply = api.messages.create(model="sum", max_tokens=900, messages=messages, output_config=form)
        assert list(json.loads(reply.content[0].text)) == ["name", "sure"]


NUMBER: Any = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize("choice", ["required", "look"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": NUMBER}}}),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": NUMBER}}}),
        ("messages", {"output_config": {"format": {"type": "json_schema", "schema": NUMBER}}}),
    ],
    ids=str,
)
def test_a_call_that_has_to_be_made_leaves_no_text_to_have_a_form(
    client: httpx.Client, messages: Any, path: str, fields: dict[str, Any], choice: str
) -> None:
    """As clients send it that ask for one thing in two ways at once."""
    named: dict[str, Any] = {
        "chat/completions": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": choice}}},
        "responses": {
            "tools": [{"type": "function", "name": "look", "parameters": SCHEMA}],
            "tool_choice": {"type": "function", "name": choice},
        },
        "messages": {
            "tools": [{"name": "look", "input_schema": SCHEMA}],
            "tool_choice": {"type": "tool", "name": choice, "disable_parallel_tool_use": True},
        },
    }[path]
    if choice == "required":
        named |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True} if path == "messages" else choice}
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    said = "input" if path == "responses" else "messages"
    asked = {"model": "sum", said: messages, length: 900, **named, **fields}
    if path != "messages":
        asked["parallel_tool_calls"] = False
    reply = client.post(f"/v1/{path}", json=asked)
    assert reply.status_code == 200, reply.text
    assert list(_arguments_of(reply.json())) == ["name", "sure"]


def _arguments_of(body: Any) -> Any:
    """Of the one call that a reply of any dialect is."""
    if "choices" in body:
        [call] = body["choices"][0]["message"]["tool_calls"]
        return json.loads(call["function"]["arguments"])
    [call] = body["output"] if "output" in body else body["content"]
    return json.loads(call["arguments"]) if "arguments" in call else call["input"]


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
            "response_format",
            "foo",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "only one"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "cannot both",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g', which is none",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(
    client: httpx.Client, messages: Any, fields: dict[str, Any], param: str, named: str
) -> None:
    reply = client.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert named in error["message"]


@pytest.mark.parametrize("schema", [{"properties": {}, "required": [{}]}, {"properties": {"a": {"type": 5}}}], ids=str)
def test_tools_that_have_no_schema_are_refused_in_all_dialects(url: str, messages: Any, schema: Any) -> None:
    tool = {"name": "f", "parameters": {"type": "object", **schema}}
    bodies: dict[str, Any] = {
        "chat/completions": {"messages": messages, "tools": [{"type": "function", "function": tool}]},
        "responses": {"input": "a", "tools": [{"type": "function", **tool}]},
        "messages": {"messages": messages, "tools": [{"name": "f", "input_schema": tool["parameters"]}]},
    }
    for path, body in bodies.items():
        more = {"tool_choice": {"type": "any"}, "max_tokens": 9} if path == "messages" else {"tool_choice": "required"}
        reply = httpx.post(f"{url}/v1/{path}", json={"model": "sum", **body, **more})
        assert reply.status_code == 400, reply.text
        assert "required" in reply.text or "type must be" in reply.text
