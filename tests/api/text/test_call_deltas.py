"""Arguments of calls come while they are written, in linear time, and the same however the text is cut into pieces."""

import json
import random
import sys
from types import FrameType
from typing import Any

import pytest
from pydantic_core import from_json

from hybrid_cache.api.text import answer_parser
from hybrid_cache.api.text.answer_parser import AnswerForm, AnswerParser, Thought
from hybrid_cache.api.text.call_readers import Arguments, CallBegun, CallDone
from hybrid_cache.api.text.incoming import Incoming
from hybrid_cache.api.text.json_pieces import json_or_none
from hybrid_cache.api.text.tool_formats import FORMATS, ThoughtFormat
from tests.api.text.reading import Call, items_of, parse, pieces_of, put_together
from tests.api.text.writing import TYPES, random_answer, random_arguments, written

FORMS = {name: AnswerForm(tools, TYPES, ThoughtFormat()) for name, tools in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    text = written(name, [("look", {"at": "x" * 1000})], random.Random(0))
    parser, so_far, seen = AnswerParser(FORMS[name]), "", list[int]()
    for start in range(0, len(text), 20):
        found = parser.push(text[start : start + 20])
        assert len([item for item in found if isinstance(item, Arguments)]) <= 1
        so_far += "".join(item.text for item in found if isinstance(item, Arguments))
        seen.append(so_far.count("x"))
        assert seen[-1] >= min(1000, text[: start + 20].count("x")) - 20
    assert json.loads(so_far) == {"at": "x" * 1000}
    assert len(set(seen)) > 45


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_written_is_read(name: str) -> None:
    rng = random.Random(name)
    for _ in range(60):
        calls = [
            (rng.choice(["look", "wait", "other"]), random_arguments(name, rng)) for _ in range(rng.randrange(1, 4))
        ]
        if name == "llama3":
            calls = [("look", arguments) for _, arguments in calls]
        text = written(name, calls, rng)
        found = parse(FORMS[name], pieces_of(text, rng))
        assert [(call.name, json.loads(call.arguments)) for call in found if isinstance(call, Call)] == calls, text
        assert len(found) == len(calls), text


def check_pieces(name: str, rng: random.Random, times: int) -> None:
    """One answer, well-formed or not, cut into pieces at random."""
    text = random_answer(name, rng)
    expected = parse(FORMS[name], [text])
    for call in expected:
        if isinstance(call, Call):
            assert (json_or_none(call.arguments) is not None) == call.complete, text
            assert isinstance(from_json(call.arguments, allow_partial=True), dict), text
    for _ in range(times):
        pieces = pieces_of(text, rng, 20)
        assert parse(FORMS[name], pieces) == expected, pieces
    assert parse(FORMS[name], list(text)) == expected, text


@pytest.mark.parametrize("name", FORMATS)
def test_the_pieces_do_not_matter(name: str) -> None:
    rng = random.Random(name)
    for _ in range(30):
        check_pieces(name, rng, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_pieces_do_not_matter_a_hundred_thousand_times(name: str) -> None:
    rng = random.Random(name + " slow")
    for _ in range(100_000 // len(FORMATS) // 10):
        check_pieces(name, rng, 9)


class Counting(Incoming):
    """Counts the characters that are there to be looked at, each time that there are new ones."""

    there = 0

    def feed(self, text: str) -> None:
        super().feed(text)
        Counting.there += len(self._text)


def work_of(name: str, text: str, size: int) -> tuple[int, int]:
    """Lines that run, and characters that are there, while a text is read in pieces of some size."""
    lines, parser, Counting.there = 0, AnswerParser(FORMS[name]), 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        for start in range(0, len(text), size):
            parser.push(text[start : start + size])
        parser.finish()
    finally:
        sys.settrace(None)
    return lines, Counting.there


LARGE = {
    "text": lambda n: [("look", {"at": "ab\n" * n})],
    "numbers": lambda n: [("look", {"how": {"all": [12345] * (n // 2)}})],
    "an unknown tool": lambda n: [("other", {"at": "a<b" * n})],
    "calls": lambda n: [("look", {"times": 1})] * (n // 20),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", LARGE)
def test_time_is_linear(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parser, "Incoming", Counting)
    texts = [written(name, LARGE[kind](n), random.Random(0)) for n in (100, 400)]
    (lines, there), (more_lines, more_there) = (work_of(name, text, 3) for text in texts)
    growth = len(texts[1]) / len(texts[0])
    assert more_lines < 1.2 * growth * lines
    assert more_there < 1.2 * growth * there
    assert more_there < 20 * len(texts[1])


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "llama3"])
def test_sections_that_are_opened_again_and_again_take_linear_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parser, "Incoming", Counting)
    begin = written(name, [("other", {"at": "a"})], random.Random(0)).partition("a")[0]
    lines, there = work_of(name, begin * 50, 3)
    more_lines, more_there = work_of(name, begin * 200, 3)
    assert more_lines < 5 * lines
    assert more_there < 5 * there


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_megabyte_of_arguments(name: str) -> None:
    text = written(name, [("look", {"at": "word \"' \n" * 120_000})], random.Random(0))
    found = parse(FORMS[name], (text[start : start + 4] for start in range(0, len(text), 4)))
    assert [json.loads(call.arguments)["at"].count("word") for call in found if isinstance(call, Call)] == [120_000]


HERMES = '<tool_call>{"name": "look", "arguments": '
HOSTILE: dict[str, tuple[str, str, list[str | Thought | Call]]] = {
    "a pair of surrogates": (
        "hermes",
        HERMES + r'{"a": "\ud83d\ude00"}}</tool_call>',
        [Call("look", r'{"a": "\ud83d\ude00"}')],
    ),
    "half a character": (
        "hermes",
        HERMES + r'{"a": "\ud83d\ud83d\ude00\ude00", "\udfff": 1}}</tool_call>',
        [Call("look", r'{"a": "\ufffd\ud83d\ude00\ufffd", "\ufffd": 1}')],
    ),
    "half a character of Python": (
        "lfm2",
        r"<|tool_call_start|>[look(a='\ud83d', b='\U0001F600\x41\q')]<|tool_call_end|>",
        [Call("look", r'{"a": "\ufffd", "b": "\ud83d\ude00\u0041\\q"}'.replace(r"\u0041", "A"))],
    ),
    "line breaks in strings": ("hermes", HERMES + '{"a": "\n\x01"}}</tool_call>', [Call("look", r'{"a": "\n\u0001"}')]),
    "a comma too many": ("hermes", HERMES + '{"a": [1, ], }, }</tool_call>', [Call("look", '{"a": [1]}')]),
    "a number that is too large": (
        "hermes",
        HERMES + '{"a": 1e999, "b": -' + "9" * 5000 + "}}</tool_call>",
        [Call("look", '{"a": 1.7976931348623157e+308, "b": -1.7976931348623157e+308}')],
    ),
    "duplicate keys": ("hermes", HERMES + '{"a": 1, "a": 2}}</tool_call>', [Call("look", '{"a": 1, "a": 2}')]),
    "duplicate parts": (
        "hermes",
        HERMES + '{}, "name": "wait", "arguments": {"a": 1}}</tool_call>',
        [Call("look", "{}")],
    ),
    "cut off in quotes": (
        "hermes",
        HERMES + r'"{\"a\": {}}',
        [Call("look", '{"a": {}', None, False)],
    ),
    "broken in quotes": (
        "hermes",
        HERMES + r'"{\"a\": \"}}}',
        [Call("look", '{"a": "}}', None, False)],
    ),
    "more in quotes": (
        "hermes",
        HERMES + r'"{\"a\": {}} x"}</tool_call>',
        [Call("look", '{"a": {}', None, False), "}</tool_call>"],
    ),
    "arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"a": [{}]}, "x": [1, {"y": 2}], "name": "look"}</tool_call>',
        [Call("look", '{"a": [{}]}')],
    ),
    "no separator": (
        "hermes",
        HERMES + "{}}" + '{"name": "wait"}</tool_call>',
        [Call("look", "{}"), Call("wait", "{}")],
    ),
    "a huge name": ("hermes", f'<tool_call>{{"name": "{"x" * 100_000}"}}</tool_call>', [Call("x" * 100_000, "{}")]),
    "deep arguments": (
        "hermes",
        HERMES + '{"a": ' + "[" * 200 + "]" * 200 + "}}</tool_call>b",
        [Call("look", '{"a": ' + "[" * 127, None, False), "[" * 73 + "]" * 200 + "}}</tool_call>b"],
    ),
    "a call within a thought": (
        "hermes",
        "<think>" + HERMES + "{}}</tool_call></think>" + HERMES + "{}}</tool_call>",
        [Thought(HERMES + "{}}</tool_call>"), Call("look", "{}")],
    ),
    "a thought within a call": (
        "hermes",
        "<tool_call><think>why</think>" + HERMES + '{"a": "<think>"}}</tool_call>',
        ["<tool_call>", Thought("why"), Call("look", '{"a": "<think>"}')],
    ),
    "a call in a section that is none": (
        "hermes",
        "<tool_call>what? " + HERMES + "{}}</tool_call>",
        ["<tool_call>what? ", Call("look", "{}")],
    ),
    "what follows a call in its section": (
        "hermes",
        HERMES + "{}} and</tool_call> so",
        [Call("look", "{}"), "} and</tool_call> so"],
    ),
    "broken arguments": (
        "hermes",
        HERMES + '{"a": 1, b}}</tool_call>' + HERMES + "{}}</tool_call>",
        [Call("look", '{"a": 1, ', None, False), "}}</tool_call>", Call("look", "{}")],
    ),
    "cut off in arguments": ("hermes", HERMES + r'{"a": "b\u00', [Call("look", '{"a": "b', None, False)]),
    "cut off behind arguments": ("hermes", HERMES + '{"a": 1}', [Call("look", '{"a": 1}')]),
    "cut off before arguments": ("hermes", HERMES, [HERMES]),
    "cut off in the call of nobody's tool": (
        "hermes",
        HERMES.replace("look", "other") + '{"a": 1',
        [HERMES.replace("look", "other") + '{"a": 1'],
    ),
    "an id that comes again": (
        "kimi",
        "<|tool_calls_section_begin|>"
        + "<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}<|tool_call_end|>" * 2
        + "<|tool_calls_section_end|>",
        [Call("look", "{}", "functions.look:0"), Call("look", "{}")],
    ),
    "text that may be null": (
        "qwen3_coder",
        "<tool_call><function=look><parameter=maybe>null</parameter><parameter=maybe>\nnullify\n</parameter>"
        "<parameter=at>null</parameter></function></tool_call>",
        [Call("look", '{"maybe": null, "maybe": "nullify", "at": "null"}')],
    ),
    "an object that is none": (
        "qwen3_coder",
        '<tool_call><function=look><parameter=how>{a: "</parameter></function></tool_call>',
        [Call("look", '{"how": "{a: \\""}')],
    ),
    "JSON of its own": ("llama3", '{"name": "Bob", "parameters": {}}', ['{"name": "Bob", "parameters": {}}']),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_models_may_come_up_with(case: str) -> None:
    name, text, expected = HOSTILE[case]
    assert parse(FORMS[name], [text]) == expected
    rng = random.Random(case)
    for pieces in [list(text), *(pieces_of(text, rng) for _ in range(20))]:
        assert parse(FORMS[name], pieces) == expected


def test_thousands_of_calls() -> None:
    text = written("hermes", [("look", {"times": n}) for n in range(2000)], random.Random(0))
    found = items_of(FORMS["hermes"], [text[start : start + 50] for start in range(0, len(text), 50)])
    assert [type(item) for item in found if not isinstance(item, Arguments)] == [CallBegun, CallDone] * 2000
    calls = put_together(found)
    assert [json.loads(call.arguments)["times"] for call in calls if isinstance(call, Call)] == [*range(2000)]


def test_what_a_parser_is_in_the_midst_of() -> None:
    parser = AnswerParser(AnswerForm(FORMATS["hermes"], TYPES, ThoughtFormat(), thinking=True))
    told = [(parser.thinking, parser.may_begin_mark)]
    for piece in ("why", "</th", "ink>", "\n\nSo <to", "p>", "<think>", "x"):
        parser.push(piece)
        told.append((parser.thinking, parser.may_begin_mark))
    thinking, marks = zip(*told, strict=True)
    assert thinking == (True, True, True, False, False, False, True, True)
    assert marks == (False, False, True, False, True, False, False, False)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_is_cut_off_anywhere(name: str) -> None:
    said = {"at": "<b> \n", "times": 7, "how": {"a": [None, "</parameter>"]}}
    text = written(name, [("look", said)], random.Random(1))
    whole = parse(FORMS[name], [text])
    begun = False
    for end in range(len(text)):
        found = parse(FORMS[name], [text[:end]])
        calls = [item for item in found if isinstance(item, Call)]
        begun = begun or bool(calls)
        assert found == calls if begun else "".join(map(str, found)) == text[:end]
        for call in calls:
            assert isinstance(whole[0], Call)
            assert whole[0].arguments.startswith(call.arguments)
            assert call.complete == (call.arguments == whole[0].arguments)
    assert begun
