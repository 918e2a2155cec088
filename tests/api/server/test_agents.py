"""Agents written with stock clients: six steps with a tool, on the model in the package, and a cache that keeps up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models.loading import load
from tests.api.servers import over_the_wire

MODEL = Path(__file__).parents[3] / "models" / "embedded"
SYSTEM = "You look into the boxes, one after the other, and say what you find in each of them. " * 40
BOX = {
    "type": "object",
    "properties": {"box": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["box"],
    "additionalProperties": False,
}
STEPS = 6
LEAST_CACHED = 0.9


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    text, model = TextModel.load(MODEL), load(MODEL, ops=dispatch.select("auto"))
    settings = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded")
    with over_the_wire(create_app(AsyncEngine(model, EngineConfig(budget_bytes=256 << 20)), text, settings)) as address:
        yield address


def found(arguments: Any) -> str:
    """What the tool says, which takes a box of its schema only."""
    assert list(arguments) == ["box"]
    assert 1 <= arguments["box"] <= 9
    return f"{arguments['box'] + 2} pencils and a lamp"


def test_an_agent_of_openais_client(url: str) -> None:
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is in the boxes?"}]
    tools: Any = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": BOX}}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for step in range(STEPS):
            reply: Any = client.chat.completions.create(
                model="embedded",
                messages=messages,
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
                max_tokens=100,
            )
            message, usage = reply.choices[0].message, reply.usage
            [call] = message.tool_calls
            assert reply.choices[0].finish_reason == "tool_calls"
            assert step == 0 or usage.prompt_tokens_details.cached_tokens >= LEAST_CACHED * usage.prompt_tokens
            result = found(json.loads(call.function.arguments))
            messages += [message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": result}]
        last = client.chat.completions.create(model="embedded", messages=messages, tools=tools, max_tokens=20)
        assert last.choices[0].message.content


def test_an_agent_that_names_the_response_before(url: str) -> None:
    tools: Any = [{"type": "function", "name": "look", "description": "Looks.", "parameters": BOX, "strict": True}]
    asked: Any = "What is in the boxes at last?"
    fields: Any = {"model": "embedded", "instructions": SYSTEM, "tools": tools, "max_output_tokens": 100}
    previous = None
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for step in range(STEPS):
            with client.responses.stream(
                input=asked,
                previous_response_id=previous,
                tool_choice="required",
                parallel_tool_calls=False,
                **fields,
            ) as stream:
                reply: Any = stream.get_final_response()
            [call], usage, previous = reply.output, reply.usage, reply.id
            assert call.type == "function_call"
            assert step == 0 or usage.input_tokens_details.cached_tokens >= LEAST_CACHED * usage.input_tokens
            result = found(json.loads(call.arguments))
            asked = [{"type": "function_call_output", "call_id": call.call_id, "output": result}]
        last = client.responses.create(input=asked, previous_response_id=previous, **fields)
        assert last.output_text
        items = list(client.responses.input_items.list(last.id, order="asc", limit=5))
        assert [item.type for item in items] == ["message", *["function_call", "function_call_output"] * STEPS]


class Box(pydantic.BaseModel):
    """As what the tool is asked."""

    model_config = pydantic.ConfigDict(extra="forbid")
    box: Literal[3, 4]
    open: bool


def test_an_answer_that_is_parsed(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        fields: Any = {"model": "embedded", "input": "Which box?", "text_format": Box, "max_output_tokens": 400}
        reply = client.responses.parse(**fields)
        assert isinstance(reply.output_parsed, Box)
        with client.responses.stream(**fields) as stream:
            assert isinstance(stream.get_final_response().output_parsed, Box)


def test_an_agent_of_anthropics_client(url: str) -> None:
    messages: Any = [{"role": "user", "content": "What is in the boxes now?"}]
    system: Any = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    tools: Any = [{"name": "look", "description": "Looks.", "input_schema": BOX}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        for step in range(STEPS):
            with client.messages.stream(
                model="embedded",
                system=system,
                messages=messages,
                tools=tools,
                tool_choice={"type": "tool", "name": "look"},
                max_tokens=100,
            ) as stream:
                reply: Any = stream.get_final_message()
            [call], usage = reply.content, reply.usage
            assert reply.stop_reason == "tool_use"
            total = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
            assert step == 0 or usage.cache_read_input_tokens >= LEAST_CACHED * total
            result = {"type": "tool_result", "tool_use_id": call.id, "content": found(call.input)}
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
        last: Any = client.messages.create(
            model="embedded", system=system, messages=messages, tools=tools, max_tokens=20
        )
        assert last.usage.output_tokens > 0
