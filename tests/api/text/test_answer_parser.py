"""Tool calls are found however the text comes, and nothing else is taken for one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.api.text.answer_parser import AnswerForm, AnswerParser
from hybrid_cache.api.text.tool_formats import DEFAULT
from tests.api.text.reading import Call, parse

CALL = '<tool_call>\n{"name": "add", "arguments": {"a":  1}}\n</tool_call>'
FORM = AnswerForm(DEFAULT, {"add": {}})
ADD = Call("add", '{"a":  1}')


CASES = {
    "call": (CALL, [ADD]),
    "text before": ("Sure. " + CALL, ["Sure. ", ADD]),
    "two calls": (CALL + "\n" + CALL + "\n", [ADD, ADD]),
    "never closed": ("a <tool_call>{", ["a <tool_call>{"]),
    "not json": ("<tool_call>add(1)</tool_call>", ["<tool_call>add(1)</tool_call>"]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ['<tool_call>{"arguments": {}}</tool_call>']),
    "text arguments": ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [Call("f", "{}")]),
    "text arguments of a tool": ('<tool_call>{"name": "add", "arguments": "{\\"a\\":  1}"}</tool_call>', [ADD]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [Call("f", "{}")]),
    "nearly": ("a <tool_cal b", ["a <tool_cal b"]),
    "nested name": (
        '<tool_call>{"name": "f", "arguments": {"arguments": 1}}</tool_call>',
        [Call("f", '{"arguments": 1}')],
    ),
    "deep": ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["<tool_call>" + "[" * 100_000 + "</tool_call>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_parsed(name: str) -> None:
    text, expected = CASES[name]
    assert parse(FORM, [text]) == expected


@pytest.mark.parametrize("name", [n for n in CASES if n != "deep"])
@settings(deadline=None)
@given(st.data())
def test_the_pieces_in_which_text_comes_do_not_matter(name: str, data: st.DataObject) -> None:
    text, expected = CASES[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert parse(FORM, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == expected


def test_text_that_cannot_begin_a_call_is_shown_at_once() -> None:
    parser = AnswerParser(FORM)
    assert parser.push("hi <t") == ["hi "]
    assert parser.push("a>") == ["<ta>"]
