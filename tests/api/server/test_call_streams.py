"""A streamed reply says what a whole one says, in both dialects, and calls in it come as they are written."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import pytest
from pydantic_core import from_json

from hybrid_cache.api.server.anthropic.reply import MessageReply
from hybrid_cache.api.server.openai.chat_reply import ChatReply
from hybrid_cache.api.server.schemas.anthropic import MessagesRequest
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.text import call_readers
from hybrid_cache.api.text.answer import Events
from hybrid_cache.api.text.answer_parser import AnswerForm, Item
from hybrid_cache.api.text.answer_parser import Thought as ThoughtItem
from hybrid_cache.api.text.generation import Begin, CallArguments, CallBegin, CallEnd, End, Text, Thought, Usage
from hybrid_cache.api.text.text_work import TextWork
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.api.text.tool_formats import FORMATS, ThoughtFormat
from hybrid_cache.request import FinishReason
from tests.api.servers import Script, events_of, new_app, new_engine, over_the_wire, script_messages, write_text_model
from tests.api.text.reading import items_of, pieces_of
from tests.api.text.writing import TYPES, random_answer

SCRIPTS: dict[str, Script] = {
    "hermes": ('<tool_call>{"name": "look", "arg', 'uments": {"at": "a', ' b"', ', "times": 2', "}}</tool_call>"),
    "qwen3_coder": ("<tool_call><function=look>", "<parameter=at>\na", " b\n</para", "meter></function></tool_call>"),
    "lfm2": ("<|tool_call_start|>[look(at='a", " b', times=", "2", ")", "]<|tool_call_end|>"),
    "kimi": ("<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0", "<|tool_call_argument_begin|>",
             '{"at": "a', ' b"', "}", "<|tool_call_end|><|tool_calls_section_end|>"),
}  # fmt: skip
SCHEMA: Any = {"type": "object", "properties": {"at": {"type": "string"}, "times": {"type": "integer"}}}
FUNCTIONS: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
TOOLS: Any = [{"name": "look", "input_schema": SCHEMA}]


@pytest.fixture(scope="module", params=SCRIPTS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, int]]:
    """A server before a model that makes a call, what to ask it, and how many tokens it says."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    script = SCRIPTS[request.param]
    write_text_model(folder, script)
    text = TextModel.load(folder)
    with over_the_wire(new_app(new_engine(), text, tool_parser=request.param)) as url:
        yield url, script_messages(text, script), len(script)


def test_openais_client(served: tuple[str, Any, int]) -> None:
    url, messages, length = served
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for most in (2, 3, length + 1):
            asked: Any = {"model": "sum", "messages": messages, "tools": FUNCTIONS, "max_tokens": most}
            whole = client.chat.completions.create(**asked).choices[0]
            with client.chat.completions.stream(**asked) as stream:
                deltas = [event.type for event in stream]
                final = stream.current_completion_snapshot.choices[0]
            calls, streamed = ([call.function for call in m.tool_calls or ()] for m in (whole.message, final.message))
            assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in streamed]
            assert (whole.message.content or "") == (final.message.content or "")
            assert whole.finish_reason == final.finish_reason
        assert final.finish_reason == "tool_calls"
        assert json.loads(calls[0].arguments)["at"] == "a b"
        assert deltas.count("tool_calls.function.arguments.delta") > 1


def test_anthropics_client(served: tuple[str, Any, int]) -> None:
    url, messages, length = served
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        for most in (2, 3, length + 1):
            asked: Any = {"model": "sum", "messages": messages, "tools": TOOLS, "max_tokens": most}
            whole = client.messages.create(**asked)
            with client.messages.stream(**asked) as stream:
                deltas = [event.type for event in stream]
                final = stream.get_final_message()
            blocks, streamed = ([b.to_dict() | {"id": ""} for b in m.content] for m in (whole, final))
            assert blocks == streamed
            assert whole.stop_reason == final.stop_reason
        assert final.stop_reason == "tool_use"
        assert streamed[-1]["input"]["at"] == "a b"  # type: ignore[index]
        assert deltas.count("input_json") > 1


def test_what_a_token_adds_to_no_part_is_there_all_the_same(served: tuple[str, Any, int]) -> None:
    url, messages, length = served
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"return_token_ids": True}
        asked: Any = {"model": "sum", "messages": messages, "tools": FUNCTIONS, "extra_body": extra, "logprobs": True}
        whole: Any = client.chat.completions.create(**asked).choices[0]
        chunks: Any = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        ids = [token for chunk in chunks for token in chunk.model_extra.get("token_ids") or ()]
        assert ids == whole.token_ids
        assert len(ids) == length + 1
        assert sum(len(chunk.logprobs.content) for chunk in chunks if chunk.logprobs) == length + 1


class Said:
    """An answer that says pieces of text."""

    usage = Usage(1, 2, 0, 0)
    lookups = shared = ()

    def __init__(self, form: AnswerForm, pieces: Iterable[str]) -> None:
        said = [(self._event(item),) for item in items_of(form, pieces)]
        self._steps: list[Events] = [(Begin(0, (), None),), *said, (End(0, FinishReason.STOP, None, self.usage, None),)]

    async def __aiter__(self) -> AsyncIterator[Events]:
        for step in self._steps:
            yield step

    @staticmethod
    def _event(item: Item) -> Text | Thought | CallBegin | CallArguments | CallEnd:
        match item:
            case str():
                return Text(0, item, None)
            case ThoughtItem():
                return Thought(0, item.text, None)
            case call_readers.CallBegun():
                return CallBegin(0, item.name, None, item.id or "call")
            case call_readers.Arguments():
                return CallArguments(0, item.text, None)
        return CallEnd(0, item.complete, None)


SERVING: Any = SimpleNamespace(
    text=SimpleNamespace(work=TextWork(), tokenizer=None), model=SimpleNamespace(name="m", system_fingerprint="f")
)
SPEC: Any = SimpleNamespace(prompt=SimpleNamespace(boundaries=()))
CHAT = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]})
MESSAGES = MessagesRequest.model_validate(
    {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]}
)


async def both(reply: Any, again: Any) -> tuple[Any, str]:
    """A whole reply, and another as a stream."""
    return json.loads(await reply.whole()), b"".join([data async for data in again.events()]).decode()


def check_replies(form: AnswerForm, text: str, rng: random.Random) -> None:
    def said() -> Any:
        return Said(form, pieces_of(text, rng))

    whole, stream = asyncio.run(both(ChatReply(SERVING, CHAT, said()), ChatReply(SERVING, CHAT, said())))
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for event in events_of(stream):
        delta = event["choices"][0]["delta"]
        for key in ("content", "reasoning_content"):
            message[key] += delta.get(key, "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["calls"])
                message["calls"].append([call["function"]["name"], ""])
            message["calls"][call["index"]][1] += call["function"]["arguments"]
    expected = whole["choices"][0]["message"]
    assert message["content"] == (expected["content"] or "")
    assert message["reasoning_content"] == expected.get("reasoning_content", "")
    calls = [call["function"] for call in expected.get("tool_calls", ())]
    assert message["calls"] == [[call["name"], call["arguments"]] for call in calls]

    replies = [MessageReply(SERVING, MESSAGES, SPEC, said()) for _ in range(2)]
    whole, stream = asyncio.run(both(*replies))
    blocks: list[dict[str, Any]] = []
    for event in (json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")):
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "json": ""})
            case "content_block_delta":
                kind = event["delta"].pop("type")
                assert event["index"] == len(blocks) - 1
                key = {"text_delta": "text", "thinking_delta": "thinking"}.get(kind, "json")
                blocks[-1][key] += event["delta"]["partial_json" if key == "json" else key]
    for block in blocks:
        if written := block.pop("json"):
            block["input"] = from_json(written, allow_partial=True)
    assert [{**block, "id": ""} for block in blocks] == [{**block, "id": ""} for block in whole["content"]]


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_said(name: str) -> None:
    rng, form = random.Random(name), AnswerForm(FORMATS[name], TYPES, ThoughtFormat())
    for _ in range(12):
        check_replies(form, random_answer(name, rng), rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_said_a_thousand_times(name: str) -> None:
    rng, form = random.Random(name), AnswerForm(FORMATS[name], TYPES, ThoughtFormat())
    for _ in range(1000):
        check_replies(form, random_answer(name, rng), rng)
