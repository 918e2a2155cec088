"""What the cache is told of the next turn is what the next request begins with, for every family's template."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.api.text.generation import Text, Thought
from hybrid_cache.api.text.messages import SentBack, Talk, TemplateMessage, begun_object
from hybrid_cache.api.text.next_turn import Said, beginnings
from hybrid_cache.api.text.text_engine import adds_pages
from hybrid_cache.api.text.whole_calls import ToolCall
from hybrid_cache.bench.turns.script import sent_back
from tests.api.small_text import small_text
from tests.api.text.test_family_templates import (
    NO_SYSTEM,
    NO_TOOLS,
    ROOM,
    each_template,
    encoder_for,
    message,
    rendering_for,
    words,
)

WRITTEN = '{"at":  "%s",\n "n": 1}'  # as a model may write arguments, and no template


@st.composite
def answers(draw: st.DrawFn, name: str) -> Said:
    """Text, thoughts and calls, in the spaces that models write."""
    said = Said()
    space = st.sampled_from(["", " ", "\n"])
    if draw(st.booleans()):
        said.take(Thought(0, draw(words), None))
    calls = draw(st.integers(0, 1 if name == "llama3" else 2)) if name not in NO_TOOLS else 0
    for i in range(calls):
        said.take(ToolCall(0, "look", WRITTEN % i, None, f"call_{i}"))
    if not calls or (name != "llama3" and draw(st.booleans())):
        said.take(Text(0, draw(space) + draw(words) + draw(space), None))
    return said


def following(said: Said, text: str) -> Sequence[TemplateMessage]:
    if not said.calls:
        return [message("user", text)]
    return [message("tool", text, tool_call_id=call.id, name=call.name) for call in said.calls]


@each_template
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_the_next_request_begins_as_was_expected(name: str, data: st.DataObject) -> None:
    encoder, rendering = encoder_for(name), rendering_for(name, opening=True)
    messages = [message("system", "You help.")] if name not in NO_SYSTEM else []
    keeps = data.draw(st.booleans(), "the client sends thoughts back")
    messages.append(message("user", data.draw(words)))
    for _ in range(3):
        said = data.draw(answers(name))
        talk = Talk(tuple(messages), rendering)
        expected = beginnings(encoder, talk, said, ROOM)
        messages.append(sent_back(encoder, talk, said, thoughts=keeps))
        count = len(messages)
        messages += following(said, data.draw(words))
        made = encoder.conversation(messages, rendering, ROOM)
        sent, end = made.prompt.tokens, made.num_tokens(count)
        assert 1 <= len(expected) <= 2
        begun = [len(e.tokens) for e in expected if np.array_equal(sent[: len(e.tokens)], e.tokens)]
        assert begun, "neither with thoughts nor without them"
        assert end is None or end in begun


@pytest.mark.parametrize("back", [SentBack(), SentBack(objects=True, blocks=True), SentBack(whole=True)], ids=str)
def test_each_dialect_sends_an_answer_back_in_its_own_way(back: SentBack) -> None:
    """Text, a call, text and a call that broke off, after two thoughts."""
    said, encoder = Said(), encoder_for("qwen3_next")
    for event in (
        *(
            Thought(0, "one", None),
            Text(0, "", None),
            Thought(0, "!", None),
            Text(0, "Let", None),
            Text(0, " me", None),
        ),
        *(ToolCall(0, "look", '{"at":  "a"}', None, "c1"), Thought(0, "two", None), Text(0, "see", None)),
        ToolCall(0, "look", '{"at":  "b', None, "c2", complete=False),
    ):
        said.take(event)
    messages = [message("user", "u")]
    expected = beginnings(encoder, Talk(messages, rendering_for("qwen3_next", opening=True), back), said, ROOM)
    texts = [encoder_text(prompt.tokens) for prompt in expected]
    assert len(texts) == 2, "with thoughts, and without them"
    joined, apart = ("Let mesee", "one!two"), ("Let me\nsee", "one!\ntwo")
    text, thought = apart if back.blocks else joined
    assert f"<think>\n{thought}\n</think>\n\n{text}" in texts[0]
    assert text in texts[1]
    assert "<think>" not in texts[1]
    for shown in texts:
        assert shown.count("<tool_call>") == (1 if back.whole else 2)
        assert ('{"at": "a"}' if back.objects else '{"at":  "a"}') in shown
        assert ('"arguments": {}' in shown) == back.objects, "what of a broken call is an object"


def encoder_text(tokens: Sequence[int]) -> str:
    return small_text().tokenizer.decode(list(map(int, tokens)))


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        ("", {}),
        ("{", {}),
        ('{"a": 1, "b": [2', {"a": 1, "b": [2]}),
        ('{"a": 1, "b": "\\ud8', {"a": 1}),
        ('{"a": "\\ud800"}', {}),
        ("7", {}),
        ("what?", {}),
    ],
)
def test_arguments_that_broke_off_are_an_object(arguments: str, begun: dict[str, object]) -> None:
    """Whatever a model has written: nothing of it may end the reply, or the work on the next turn."""
    assert begun_object(arguments) == begun
    said = Said()
    said.take(ToolCall(0, "look", arguments, None, "c", complete=False))
    rendering = rendering_for("qwen3_next", opening=True)
    talk = Talk([message("user", "u")], rendering, SentBack(objects=True, blocks=True))
    assert beginnings(encoder_for("qwen3_next"), talk, said, ROOM)


@pytest.mark.parametrize(
    ("beginning", "prompt", "adds"),
    [
        (range(100), range(100), False),  # the answer filled no page
        (range(127), range(80), False),
        (range(128), range(80), True),
        (range(128), range(128), False),
        ([*range(10), 7, *range(11, 64)], range(100), True),  # a thought has left the history
        (range(10), range(10), False),
    ],
)
def test_only_beginnings_that_add_a_page_are_committed(
    beginning: Sequence[int], prompt: Sequence[int], adds: bool
) -> None:
    assert adds_pages(np.array(beginning, np.int32), np.array(prompt, np.int32)) is adds
