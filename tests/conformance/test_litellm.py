"""LiteLLM: its openai, hosted_vllm and anthropic providers, and text completions."""

import asyncio
import json
from typing import Any

import pytest

from tests.conformance.conftest import MODEL, Find, Place

WHY = "LiteLLM needs versions of its own: make conformance"
litellm = pytest.importorskip("litellm", reason=WHY)

SYSTEM = {"role": "system", "content": "You look into the boxes, one after the other. " * 60}
HELLO = [SYSTEM, {"role": "user", "content": "Hello!"}]
STEPS = 2


LOOK = {"name": "look", "description": "Looks into a box.", "parameters": Place.model_json_schema()}
TOOLS = [{"type": "function", "function": LOOK}]


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def model(request: pytest.FixtureRequest, server: str) -> dict[str, Any]:
    """What leads to the server, by provider."""
    base = server if request.param == "anthropic" else f"{server}/v1"
    return {
        "model": f"{request.param}/{MODEL}",
        "api_base": base,
        "api_key": "none",
        "num_retries": 0,
        "max_tokens": 300,
    }


def test_whole_and_as_a_stream(model: dict[str, Any]) -> None:
    whole = litellm.completion(messages=HELLO, **model)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content
    chunks = list(litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **model))
    assert len(chunks) > 5
    joined = litellm.stream_chunk_builder(chunks)
    assert joined.choices[0].message.content == whole.choices[0].message.content
    assert joined.usage.completion_tokens == whole.usage.completion_tokens
    assert joined.usage.prompt_tokens == whole.usage.prompt_tokens
    assert joined.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens


def test_without_waiting(model: dict[str, Any]) -> None:
    async def talk() -> tuple[Any, list[Any]]:
        whole = await litellm.acompletion(messages=HELLO, **model)
        stream = await litellm.acompletion(messages=HELLO, stream=True, **model)
        return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(talk())
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=str)
def test_a_loop_with_a_tool(model: dict[str, Any], choice: Any) -> None:
    messages: list[Any] = [SYSTEM, {"role": "user", "content": f"What is in the boxes? {choice}"}]
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, **model}
    for step in range(STEPS):
        reply = litellm.completion(messages=messages, **asked)
        assert reply.choices[0].finish_reason == "tool_calls"
        [call] = reply.choices[0].message.tool_calls
        assert Place.model_validate_json(call.function.arguments)
        assert step == 0 or reply.usage.prompt_tokens_details.cached_tokens >= 0.9 * reply.usage.prompt_tokens
        messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "A lamp"}]
    joined = litellm.stream_chunk_builder(list(litellm.completion(messages=messages, stream=True, **asked)))
    [call] = joined.choices[0].message.tool_calls
    assert call.function.name == "look"
    assert Place.model_validate_json(call.function.arguments)
    assert (
        not litellm.completion(messages=messages, tools=TOOLS, tool_choice="none", **model)
        .choices[0]
        .message.tool_calls
    )


@pytest.mark.parametrize("form", ["class", "schema"])
def test_an_answer_in_a_form(model: dict[str, Any], form: str) -> None:
    schema = {"name": "find", "schema": Find.model_json_schema(), "strict": True}
    asked = Find if form == "class" else {"type": "json_schema", "json_schema": schema}
    content = litellm.completion(messages=HELLO, response_format=asked, **model).choices[0].message.content
    assert Find.model_validate_json(content)


def test_any_json(server: str) -> None:
    reply = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=f"{server}/v1",
        api_key="none",
        messages=[{"role": "user", "content": "Hello!"}],
        response_format={"type": "json_object"},
        max_tokens=300,
    )
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_a_mark_in_the_prompt(server: str) -> None:
    """As an Anthropic client marks it; it gets to the server, which says what it has written and read."""
    part = {"type": "text", "text": "You know the boxes by heart. " * 30, "cache_control": {"type": "ephemeral"}}
    usages = []
    for text in ("Hello there!", "Good day!"):
        messages = [{"role": "system", "content": [part]}, {"role": "user", "content": text}]
        reply = litellm.completion(
            model=f"anthropic/{MODEL}", api_base=server, api_key="none", messages=messages, max_tokens=9
        )
        usages.append(reply.usage)
    assert usages[0].cache_creation_input_tokens > 100
    assert usages[1].cache_read_input_tokens > 100


def test_stop_words_and_sampling(model: dict[str, Any]) -> None:
    whole = litellm.completion(messages=HELLO, temperature=0, **model).choices[0].message.content
    stopped = litellm.completion(messages=HELLO, temperature=0, top_p=0.5, stop=["llo"], user="me", **model)
    assert stopped.choices[0].message.content == whole.partition("llo")[0]


def test_text_completions(server: str) -> None:
    reply = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", api_base=f"{server}/v1", api_key="none", prompt="Hello", max_tokens=5
    )
    assert reply.usage.completion_tokens == 5
    assert reply.choices[0].text


def test_messages_as_anthropic_has_them(server: str) -> None:
    async def talk() -> Any:
        return await litellm.anthropic.messages.acreate(
            model=f"anthropic/{MODEL}",
            api_base=server,
            api_key="none",
            max_tokens=20,
            messages=[{"role": "user", "content": "Hello!"}],
        )

    reply = asyncio.run(talk())
    assert reply["stop_reason"] == "end_turn"
    assert reply["content"][0]["text"]


def test_errors(model: dict[str, Any]) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(litellm.BadRequestError, match="image"):
        litellm.completion(messages=[{"role": "user", "content": [picture]}], **model)
    with pytest.raises(litellm.NotFoundError, match="another"):
        litellm.completion(messages=HELLO, **{**model, "model": model["model"].replace(MODEL, "another")})
