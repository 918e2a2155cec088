"""Chat templates in the forms that the families of hybrid models publish: what becomes of their messages.

The files in `templates/` are written for these tests, after the published formats: tools in the system message, system
messages that are there without being sent, tool results that share one turn, thoughts that leave the history, dates.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.template import ChatTemplate
from hybrid_cache.errors import ModelError, RequestError
from hybrid_cache.tokens import Prompt
from tests.api.small_text import small_text

FILES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
FORGET_THOUGHTS = {"qwen3_next", "lfm2"}  # of earlier turns
THOUGHTS_IN_CONTENT = {"lfm2", "nemotron_h"}
SHARE_TURNS = {"granite4", "qwen3_next", "nemotron_h"}  # several tool results in one
NO_SYSTEM = {"gemma"}
NO_TOOLS = {"gemma", "zamba2"}
ROOM = 100_000

words = st.text(alphabet="helo w\n😀{}\"'", min_size=1, max_size=10).filter(str.strip)


each_template = pytest.mark.parametrize("name", [path.stem for path in FILES])


def encoder_for(name: str) -> ChatEncoder:
    source = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    tokenizer = small_text().tokenizer
    return ChatEncoder(tokenizer, {"default": ChatTemplate(source, tokenizer.named_tokens)})


def message(role: str, text: str | None, **fields: object) -> TemplateMessage:
    return TemplateMessage(role, None if text is None else (TextPart(text),), fields)


def call(number: int, argument: str) -> dict[str, object]:
    return {"id": f"call{number}", "type": "function", "function": {"name": "look", "arguments": {"at": argument}}}


@st.composite
def conversations(draw: st.DrawFn, name: str) -> list[TemplateMessage]:
    """Questions and answers; some answers think, or call tools first."""
    messages = [message("system", draw(words))] if name not in NO_SYSTEM and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(message("user", draw(words)))
        if name not in NO_TOOLS and draw(st.booleans()):
            calls = [call(i, draw(words)) for i in range(draw(st.integers(1, 2)))]
            calls = calls[:1] if name == "llama3" else calls
            messages.append(message("assistant", draw(st.none() | words), tool_calls=calls, reasoning_content="hmm"))
            messages += [message("tool", draw(words), tool_call_id=c["id"]) for c in calls]
        thought, answer = draw(st.none() | words), draw(words)
        if thought and name in THOUGHTS_IN_CONTENT:
            messages.append(message("assistant", f"<think>{thought}</think>{answer}"))
        else:
            messages.append(message("assistant", answer, **({"reasoning_content": thought} if thought else {})))
    return messages


def positions(prompt: Prompt) -> list[int]:
    return [b.position for b in prompt.boundaries]


def texts(prompt: Prompt) -> dict[int, str]:
    """The text before each boundary."""
    return {p: small_text().tokenizer.decode(prompt.tokens[:p].tolist()) for p in positions(prompt)}


def rendering_for(name: str, *, opening: bool) -> Rendering:
    return Rendering(tools=None if name in NO_TOOLS else TOOLS, add_generation_prompt=opening)


@each_template
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_what_follows_a_boundary_does_not_change_the_tokens_before_it(name: str, data: st.DataObject) -> None:
    encoder, messages = encoder_for(name), data.draw(conversations(name))
    whole = encoder.encode(messages, rendering_for(name, opening=True), ROOM)
    for count in range(1, len(messages)):
        for opening in (False, True):
            try:
                part = encoder.encode(messages[:count], rendering_for(name, opening=opening), ROOM)
            except RequestError:  # a template may want turns to be complete
                continue
            text, ends = encoder.render(messages, rendering_for(name, opening=True)), texts(whole)
            common = [p for p, before in texts(part).items() if text.startswith(before) and p in ends]
            for position in common:
                assert part.tokens[:position].tolist() == whole.tokens[:position].tolist()
            if name not in FORGET_THOUGHTS | SHARE_TURNS and not opening:
                assert len(common) == len(positions(part))


@each_template
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_the_pieces_add_up_to_the_text_of_the_template(name: str, data: st.DataObject) -> None:
    encoder, messages = encoder_for(name), data.draw(conversations(name))
    rendering = rendering_for(name, opening=True)
    prompt = encoder.encode(messages, rendering, ROOM)
    assert small_text().tokenizer.decode(prompt.tokens.tolist()) == encoder.render(messages, rendering)


@each_template
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_the_next_turn_shares_all_tokens_up_to_the_last_question(name: str, data: st.DataObject) -> None:
    """Also where thoughts leave the history: what stays before the last question stays for good."""
    encoder, messages = encoder_for(name), data.draw(conversations(name))
    first_answer = max(i for i, m in enumerate(messages) if m.role == "user") + 1
    asked = encoder.encode(messages[:first_answer], rendering_for(name, opening=False), ROOM)
    later = [*messages, message("user", "hello")]
    whole = encoder.encode(later, rendering_for(name, opening=True), ROOM)
    assert len(asked.tokens) in positions(whole)
    assert np.array_equal(whole.tokens[: len(asked.tokens)], asked.tokens)


def test_thoughts_of_earlier_turns_are_gone_and_their_turn_is_no_boundary() -> None:
    encoder = encoder_for("qwen3_next")
    turn = [message("user", "hello"), message("assistant", "w", reasoning_content="hmm")]
    rendering = Rendering(add_generation_prompt=False)
    now = encoder.encode(turn, rendering, ROOM)
    later = encoder.encode([*turn, message("user", "hello")], rendering, ROOM)
    text = small_text().tokenizer.decode(later.tokens.tolist())
    assert "hmm" in small_text().tokenizer.decode(now.tokens.tolist())
    assert "hmm" not in text
    pieces = [small_text().tokenizer.decode(p.tolist()) for p in np.split(later.tokens, positions(later))]
    assert pieces[0] == "<|im_start|>user\nhello<|im_end|>\n"
    assert pieces[1].startswith("<|im_start|>assistant\nw<|im_end|>\n")


def test_a_template_without_a_system_role_says_so() -> None:
    with pytest.raises(RequestError, match="there is no system role"):
        encoder_for("gemma").encode([message("system", "w"), message("user", "w")], Rendering(), ROOM)


def test_a_template_that_loops_over_its_own_output_is_stopped() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="more than"):
        ChatTemplate(source, {})
    source = "{% for m in messages %}{% for i in range(4000) %}{{ m.content }}{% endfor %}{% endfor %}"
    encoder = ChatEncoder(small_text().tokenizer, {"default": ChatTemplate(source, {})})
    with pytest.raises(RequestError, match="more than"):
        encoder.encode([message("user", "w" * 9000)], Rendering(), ROOM)
