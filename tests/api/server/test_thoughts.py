"""What a model thinks before it answers is apart from its answer, in both dialects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import TEMPLATE, Script, new_app, new_engine, over_the_wire, script_messages, write_text_model

SCRIPT: Script = ("<thi", "nk>", "\nThey", " ask", ".\n", "</think>", "\n\nYes", ", I", " do.")
THOUGHT, ANSWER = "They ask.\n", "Yes, I do."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("thoughts")
    write_text_model(folder, SCRIPT)
    ending = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    thoughts = "{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    calls = "{%- for call in"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(calls, thoughts + calls) + ending)
    return TextModel.load(folder)


@pytest.fixture(scope="module")
def url(text: TextModel) -> Iterator[str]:
    with over_the_wire(new_app(new_engine(), text)) as address:
        yield address


def test_reasoning_content_of_a_chat_completion(url: str, text: TextModel) -> None:
    messages: Any = script_messages(text, SCRIPT)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        message: Any = client.chat.completions.create(model="sum", messages=messages).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
        chunks = list(client.chat.completions.create(model="sum", messages=messages, stream=True))
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == ANSWER


def test_thoughts_that_are_switched_off(url: str, text: TextModel) -> None:
    messages: Any = script_messages(text, SCRIPT)
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        counts = {
            kind: client.messages.count_tokens(model="sum", messages=messages, thinking={"type": kind}).input_tokens  # type: ignore[typeddict-item]
            for kind in ("adaptive", "disabled")
        }
    assert counts["disabled"] - counts["adaptive"] == len(text.tokenizer.encode("<think>\n\n</think>\n\n"))


def test_reasoning_items_of_a_response(url: str, text: TextModel) -> None:
    messages: Any = script_messages(text, SCRIPT)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        fields: Any = {"model": "sum", "input": messages, "include": ["reasoning.encrypted_content"]}
        with client.responses.stream(**fields) as stream:
            events: Any = list(stream)
            reply: Any = stream.get_final_response()
        thought, answer = reply.output
        assert (thought.type, thought.summary, thought.content[0].text) == ("reasoning", [], THOUGHT)
        assert (answer.type, answer.content[0].text) == ("message", ANSWER)
        said = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(said) == THOUGHT
        assert [event.text for event in events if event.type == "response.reasoning_text.done"] == [THOUGHT]
        # All but the script's last three, and the end of the answer.
        assert reply.usage.output_tokens_details.reasoning_tokens == reply.usage.output_tokens - 4 == 6
        no_text = {**thought.to_dict(), "content": []}
        counts = [
            client.responses.create(model="sum", input=turns, max_output_tokens=1, **more).usage.input_tokens  # type: ignore[union-attr]
            for turns, more in (
                ("And?", {"previous_response_id": reply.id}),
                ([*messages, thought.to_dict(), answer.to_dict(), {"role": "user", "content": "And?"}], {}),
                ([*messages, no_text, answer.to_dict(), {"role": "user", "content": "And?"}], {}),
                ([*messages, answer.to_dict(), {"role": "user", "content": "And?"}], {}),
            )
        ]
        thought_tokens = len(text.tokenizer.encode(f"<think>{THOUGHT}</think>"))
        assert counts[0] == counts[1] == counts[2] == counts[3] + thought_tokens
        foreign = {**no_text, "encrypted_content": "gAAAAABo"}
        asked: Any = [*messages, foreign, answer.to_dict(), {"role": "user", "content": "And?"}]
        plain: Any = client.responses.create(model="sum", input=asked, max_output_tokens=1)
        assert plain.usage.input_tokens == counts[3]


@pytest.mark.parametrize(("effort", "off"), [(None, False), ("none", True), ("high", False)])
def test_effort_switches_thoughts_off(url: str, text: TextModel, effort: Any, off: bool) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        replies: Any = [
            client.responses.create(model="sum", input="Hi", max_output_tokens=1, reasoning=reasoning)  # type: ignore[call-overload]
            for reasoning in ({"effort": effort, "summary": "auto"}, None)
        ]
    counts = [reply.usage.input_tokens for reply in replies]
    assert counts[0] - counts[1] == (len(text.tokenizer.encode("<think>\n\n</think>\n\n")) if off else 0)


def test_a_thought_that_ends_too_early(url: str, text: TextModel) -> None:
    """It is an answer of its own, and the conversation goes on from it."""
    messages: Any = script_messages(text, SCRIPT)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        reply: Any = client.responses.create(model="sum", input=messages, max_output_tokens=4)
        assert [(item.type, item.status) for item in reply.output] == [("reasoning", "incomplete")]
        assert (reply.status, reply.usage.output_tokens_details.reasoning_tokens) == ("incomplete", 4)
        more: Any = client.responses.create(
            model="sum", input="Go on.", previous_response_id=reply.id, max_output_tokens=1
        )
        assert more.usage.output_tokens == 1


def test_thinking_blocks_of_a_message(url: str, text: TextModel) -> None:
    messages: Any = script_messages(text, SCRIPT)
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        reply = client.messages.create(model="sum", max_tokens=40, messages=messages)
        assert [block.to_dict() for block in reply.content] == [
            {"type": "thinking", "thinking": THOUGHT, "signature": ""},
            {"type": "text", "text": ANSWER},
        ]
        with client.messages.stream(model="sum", max_tokens=40, messages=messages) as stream:
            names = [event.type for event in stream]
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert [final.content[0].thinking, final.content[1].text] == [THOUGHT, ANSWER]  # type: ignore[union-attr]
        assert names.count("content_block_start") == names.count("content_block_stop") == 2
        turns = [*messages, {"role": "assistant", "content": final.content}, {"role": "user", "content": "And?"}]
        assert client.messages.create(model="sum", max_tokens=1, messages=turns).usage.output_tokens == 1


def test_an_answer_cut_off_inside_its_thoughts_is_taken_back(url: str, text: TextModel) -> None:
    messages: Any = script_messages(text, SCRIPT)
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        reply = client.messages.create(model="sum", max_tokens=4, messages=messages)
        assert [block.type for block in reply.content] == ["thinking"]
        counts = []
        for content in ([*reply.content, {"type": "text", "text": ""}], reply.content):
            turns = [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": "And?"}]
            counts.append(client.messages.count_tokens(model="sum", messages=turns).input_tokens)
        assert counts[0] == counts[1]
        assert client.messages.create(model="sum", max_tokens=1, messages=turns).usage.output_tokens == 1
