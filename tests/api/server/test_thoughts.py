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
    (folder / "chat_template.jinja").write_text(TEMPLATE + ending)
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
