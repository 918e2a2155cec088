"""LangChain's chat models, as their users use them, in either dialect."""

import asyncio
from typing import Any

import anthropic
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.conformance.conftest import MODEL, STEPS, Find, Place
from tests.conformance.conftest import SYSTEM as ASKED

SYSTEM = SystemMessage(ASKED)
# The client's own, about what it has parsed itself.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


@tool
def look(place: Place, twice: bool) -> str:
    """Looks into a box."""
    return f"{place.box + 2} pencils" + " and a lamp" * twice


@pytest.fixture(scope="module")
def of_openai(server: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{server}/v1", api_key="none", max_retries=0, max_tokens=300, stream_usage=True
    )


@pytest.fixture(scope="module")
def of_anthropic(server: str) -> ChatAnthropic:
    return ChatAnthropic(model=MODEL, base_url=server, api_key="none", max_retries=0, max_tokens=300)


@pytest.fixture(params=["of_openai", "of_anthropic"])
def chat(request: pytest.FixtureRequest) -> BaseChatModel:
    model: BaseChatModel = request.getfixturevalue(request.param)
    return model


def test_whole_and_as_a_stream(chat: BaseChatModel) -> None:
    whole = chat.invoke([SYSTEM, HumanMessage("Hello!")])
    pieces = list(chat.stream([SYSTEM, HumanMessage("Hello!")]))
    joined: Any = sum(pieces[1:], pieces[0])
    assert len(pieces) > 5
    assert joined.content == whole.content != ""
    ended = {"stop", "end_turn"}
    for reply in (whole, joined):
        details = reply.response_metadata
        assert {details.get("finish_reason"), details.get("stop_reason")} & ended
        assert reply.usage_metadata["total_tokens"] == sum(
            reply.usage_metadata[f"{side}_tokens"] for side in ("input", "output")
        )
    assert joined.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]
    # Once answered, the same prompt is in the cache to the last token.
    assert joined.usage_metadata["input_token_details"]["cache_read"] == whole.usage_metadata["input_tokens"]


async def replies(chat: BaseChatModel) -> list[Any]:
    return [await chat.ainvoke("Hello!"), *await chat.abatch(["Hello!", "Hi!"]), [c async for c in chat.astream("Hi!")]]


def test_without_waiting(chat: BaseChatModel) -> None:
    one, same, other, pieces = asyncio.run(replies(chat))
    assert one.content == same.content
    assert other.content == "".join(piece.content for piece in pieces if isinstance(piece.content, str))


def test_stop_words(chat: BaseChatModel) -> None:
    whole = chat.invoke("Hello!").content
    assert isinstance(whole, str)
    assert chat.invoke("Hello!", stop=["llo"]).content == whole.partition("llo")[0]


def test_a_loop_with_a_tool(chat: BaseChatModel) -> None:
    messages: list[Any] = [SYSTEM, HumanMessage("What is in the boxes?")]
    bound = chat.bind_tools([look], tool_choice="any", parallel_tool_calls=False)
    for step in range(STEPS):
        reply: Any = bound.invoke(messages)
        [call] = reply.tool_calls
        assert reply.invalid_tool_calls == []
        assert {reply.response_metadata.get(name) for name in ("finish_reason", "stop_reason")} & {
            "tool_calls",
            "tool_use",
        }
        details = reply.usage_metadata["input_token_details"]
        assert step == 0 or details["cache_read"] >= 0.9 * reply.usage_metadata["input_tokens"]
        messages += [reply, look.invoke(call)]
        assert "pencils" in messages[-1].content
    assert chat.bind_tools([look]).invoke(messages).usage_metadata["output_tokens"] > 0


def test_calls_as_a_stream(chat: BaseChatModel) -> None:
    bound = chat.bind_tools([look], tool_choice="look", parallel_tool_calls=False)
    pieces: Any = list(bound.stream("Look into the box"))
    joined: Any = sum(pieces[1:], pieces[0])
    assert isinstance(joined, AIMessageChunk)
    [call] = joined.tool_calls
    assert call["name"] == "look"
    assert set(call["args"]) == {"place", "twice"}
    assert call["args"] == bound.invoke("Look into the box").tool_calls[0]["args"]


def test_no_call_where_none_is_wanted(of_openai: ChatOpenAI, of_anthropic: ChatAnthropic) -> None:
    for choice, chat in (("none", of_openai), ({"type": "none"}, of_anthropic)):
        assert chat.bind_tools([look], tool_choice=choice).invoke("Hello!").tool_calls == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "schema"), [("function_calling", Find.model_json_schema()), ("json_schema", Place)], ids=["call", "json"]
)
def test_an_answer_in_a_form(chat: BaseChatModel, method: str, schema: Any) -> None:
    found = chat.with_structured_output(schema, method=method).invoke("What is where?")
    assert isinstance(found, Place) if schema is Place else Find.model_validate(found)
    *_, last = chat.with_structured_output(schema, method=method).stream("What is where?")
    assert last == found


def test_any_json(of_openai: ChatOpenAI) -> None:
    class Whatever(BaseModel, extra="allow"):
        pass

    assert isinstance(of_openai.with_structured_output(Whatever, method="json_mode").invoke("Hello!"), Whatever)


def test_what_openais_only_can_do(of_openai: ChatOpenAI) -> None:
    reply = of_openai.bind(logprobs=True, top_logprobs=2).invoke("Hello!")
    tokens = reply.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens[:-1]) == reply.content
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    [[one, two]] = of_openai.generate([[HumanMessage("Hello!")]], n=2).generations
    assert one.text == two.text == reply.content


def test_what_anthropics_only_can_do(of_anthropic: ChatAnthropic) -> None:
    control = {"type": "ephemeral", "ttl": "1h"}
    marked = SystemMessage([{"type": "text", "text": "You know the boxes by heart. " * 30, "cache_control": control}])
    first, second = (of_anthropic.invoke([marked, HumanMessage(text)]) for text in ("Hello there!", "Good day!"))
    assert first.usage_metadata["input_token_details"]["ephemeral_1h_input_tokens"] > 100  # type: ignore[index, typeddict-item]
    assert second.usage_metadata["input_token_details"]["cache_read"] > 100  # type: ignore[index]
    messages = [marked, HumanMessage("Good day!")]
    assert of_anthropic.get_num_tokens_from_messages(messages) == second.usage_metadata["input_tokens"]  # type: ignore[index]


def test_errors(of_openai: ChatOpenAI, of_anthropic: ChatAnthropic) -> None:
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
    for chat, error in ((of_openai, openai.BadRequestError), (of_anthropic, anthropic.BadRequestError)):
        with pytest.raises(error, match="image"):
            chat.invoke([picture])
    with pytest.raises(openai.NotFoundError, match="another"):
        of_openai.bind(model="another").invoke("Hello!")
    with pytest.raises(anthropic.NotFoundError, match="another"):
        of_anthropic.bind(model="another").invoke("Hello!")


def test_openais_responses(server: str) -> None:
    chat = ChatOpenAI(
        model=MODEL, base_url=f"{server}/v1", api_key="none", max_retries=0, max_tokens=300, use_responses_api=True
    )
    asked: list[Any] = [SYSTEM, HumanMessage("What is in the boxes?")]
    whole, pieces = chat.invoke(asked), list(chat.stream(asked))
    joined: Any = sum(pieces[1:], pieces[0])
    assert joined.text == whole.text != ""
    following = [HumanMessage("And in the last one?")]
    after: Any = chat.invoke(following, previous_response_id=whole.response_metadata["id"])
    same: Any = chat.invoke([*asked, whole, *following])
    assert after.text == same.text
    assert after.usage_metadata["input_tokens"] == same.usage_metadata["input_tokens"]
    bound = chat.bind_tools([look], tool_choice="look", parallel_tool_calls=False, strict=True)
    for step in range(STEPS):
        reply: Any = bound.invoke(asked)
        [call] = reply.tool_calls
        read = reply.usage_metadata["input_token_details"]["cache_read"]
        assert step == 0 or read >= 0.9 * reply.usage_metadata["input_tokens"]
        asked += [reply, look.invoke(call)]
    assert isinstance(chat.with_structured_output(Place).invoke("What is where?"), Place)
