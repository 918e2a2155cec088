"""pydantic-ai's agents, in either dialect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput, UsageLimits
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ImageUrl, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles.anthropic import AnthropicModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

from tests.conformance.conftest import MODEL, STEPS, SYSTEM, Find, Place

Talk = Callable[[Callable[[Model], Awaitable[None]]], None]


@asynccontextmanager
async def model_of(dialect: str, server: str) -> AsyncIterator[Model]:
    if dialect in ("openai", "responses"):
        of_openai = OpenAIChatModel if dialect == "openai" else OpenAIResponsesModel
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            yield of_openai(MODEL, provider=OpenAIProvider(openai_client=client))
    else:
        forms = AnthropicModelProfile(supports_json_schema_output=True)
        async with anthropic.AsyncAnthropic(base_url=server, api_key="none", max_retries=0) as client:
            yield AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client), profile=forms)


@pytest.fixture(params=["openai", "anthropic", "responses"])
def talk(request: pytest.FixtureRequest, server: str) -> Talk:
    """Runs something with a model, and closes what it has opened."""

    async def with_model(what: Callable[[Model], Awaitable[None]]) -> None:
        async with model_of(request.param, server) as model:
            await what(model)

    return lambda what: asyncio.run(with_model(what))


def agent(model: Model, **more: Any) -> Agent[None, Any]:
    settings = {"max_tokens": 300, "parallel_tool_calls": False}
    return Agent(model, instructions=SYSTEM, model_settings=settings, retries=0, **more)  # type: ignore[call-overload, no-any-return]


def test_whole_as_a_stream_and_once_more(talk: Talk) -> None:
    async def check(model: Model) -> None:
        asked = agent(model)
        whole = await asked.run("Hello!")
        async with asked.run_stream("Hello!") as answer:
            pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
            usage = answer.usage
        assert "".join(pieces) == whole.output != ""
        assert len(pieces) > 5
        assert usage.cache_read_tokens == usage.input_tokens == whole.usage.input_tokens > 300
        assert usage.output_tokens == whole.usage.output_tokens
        later = await asked.run("And now?", message_history=whole.all_messages())
        assert later.usage.cache_read_tokens >= 0.9 * whole.usage.input_tokens

    talk(check)


def test_an_answer_in_a_form(talk: Talk) -> None:
    async def check(model: Model) -> None:
        assert isinstance((await agent(model, output_type=NativeOutput(Place)).run("Where?")).output, Place)
        async with agent(model, output_type=ToolOutput(Find)).run_stream("What is where?") as answer:
            *_, last = [each async for each in answer.stream_output(debounce_by=None)]
        assert isinstance(last, Find)

    talk(check)


def test_a_loop_with_a_tool(talk: Talk) -> None:
    """The tool is there for some steps, and after them there is only the answer."""
    seen: list[Place] = []

    async def while_boxes_are_left(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
        return tool if len(seen) < STEPS else None

    async def check(model: Model) -> None:
        asked = agent(model, output_type=ToolOutput(Find))

        @asked.tool_plain(prepare=while_boxes_are_left)
        def look(place: Place, twice: bool) -> str:
            """Looks into a box."""
            seen.append(place)
            return f"{place.box + 2} pencils"

        done = await asked.run("What is in the boxes?", usage_limits=UsageLimits(request_limit=STEPS + 1))
        assert isinstance(done.output, Find)
        messages = done.all_messages()
        replies = [message for message in messages if isinstance(message, ModelResponse)]
        calls = [part.tool_name for reply in replies for part in reply.parts if isinstance(part, ToolCallPart)]
        results = [part for m in messages for part in m.parts if isinstance(part, ToolReturnPart)]
        assert calls == [*["look"] * len(seen), "final_result"]
        assert [each.content for each in results[:-1]] == [f"{place.box + 2} pencils" for place in seen]
        ended = "stop" if isinstance(model, OpenAIResponsesModel) else "tool_call"
        assert all(reply.finish_reason == ended for reply in replies)
        for reply in replies[1 : len(seen)]:
            assert reply.usage.cache_read_tokens >= 0.9 * reply.usage.input_tokens

    talk(check)


def test_errors(talk: Talk) -> None:
    async def check(model: Model) -> None:
        with pytest.raises(ModelHTTPError) as found:
            await agent(model).run(["What is this?", ImageUrl("data:image/png;base64,AAAA")])
        assert found.value.status_code == 400
        assert "image" in str(found.value.body)

    talk(check)
