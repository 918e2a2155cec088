"""How each family writes tool calls and thoughts, however the text comes."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.api.text.answer_parser import AnswerForm, Thought
from hybrid_cache.api.text.tool_formats import FORMATS, ThoughtFormat, format_of, thoughts_of
from hybrid_cache.errors import ConfigError
from tests.api.text.reading import Call, parse, pieces_of

TYPES = {"look": {"at": {"type": "string"}, "times": {"type": "integer"}, "how": {"type": ["object", "null"]}}}
TEMPLATES = Path(__file__).parent / "templates"
ARGUMENTS = {"at": "5", "times": 2, "how": {"fast": True, "none": None}}
AS_JSON = json.dumps(ARGUMENTS)
OBJECT = f'{{"name": "look", "arguments": {AS_JSON}}}'
TAGGED = (
    "\n<function=look>\n<parameter=at>\n5\n</parameter>\n<parameter=times>\n2\n</parameter>\n"
    '<parameter=how>\n{"fast": true, "none": null}\n</parameter>\n</function>\n'
)
INVOKED = (
    '\n<invoke name="look">\n<parameter name="at">5</parameter>\n<parameter name="times">2</parameter>\n'
    '<parameter name="how">{"fast": true, "none": null}</parameter>\n</invoke>\n'
)
KIMI = "<|tool_call_begin|>functions.look:N<|tool_call_argument_begin|>" + AS_JSON + "<|tool_call_end|>"
PYTHON = "look(at='5', times=2, how={'fast': true, \"none\": None})"
# format -> what a model says, in which two calls stand
SAID = {
    "hermes": f"Sure.<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{OBJECT}\n</tool_call>",
    "qwen3_coder": f"Sure.<tool_call>{TAGGED}</tool_call>\n<tool_call>{TAGGED}</tool_call>",
    "jamba": f"Sure.<tool_calls>[\n {OBJECT},\n {OBJECT}\n]</tool_calls>",
    "nemotron": f"Sure.<TOOLCALL>[{OBJECT}, {OBJECT}]</TOOLCALL>",
    "lfm2": f"Sure.<|tool_call_start|>[{PYTHON}, {PYTHON}]<|tool_call_end|>",
    "minimax_m2": f"Sure.<minimax:tool_call>{INVOKED}{INVOKED}</minimax:tool_call>",
    "kimi": "Sure.<|tool_calls_section_begin|>"
    + KIMI.replace("N", "0")
    + KIMI.replace("N", "1")
    + "<|tool_calls_section_end|>",
    "llama3": f" {OBJECT}; {OBJECT}",
}


def form(name: str, **more: object) -> AnswerForm:
    return AnswerForm(FORMATS[name], TYPES, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_two_calls(name: str) -> None:
    found = parse(form(name), [SAID[name]])
    calls = [item for item in found if isinstance(item, Call)]
    assert [item for item in found if isinstance(item, str)] == ([] if name == "llama3" else ["Sure."])
    assert [call.name for call in calls] == ["look", "look"]
    assert [json.loads(call.arguments) for call in calls] == [ARGUMENTS, ARGUMENTS]
    assert [call.id for call in calls] == (["functions.look:0", "functions.look:1"] if name == "kimi" else [None, None])


@pytest.mark.parametrize("name", FORMATS)
def test_the_pieces_in_which_text_comes_do_not_matter(name: str) -> None:
    rng, thinking = random.Random(name), ThoughtFormat()
    for text in (SAID[name], "<think>\nwhy\n</think>\n\n" + SAID[name], SAID[name][:-9], "a < b <tool" + SAID[name]):
        of = form(name, thoughts=thinking)
        expected = parse(of, [text])
        for _ in range(200):
            pieces = pieces_of(text, rng)
            assert parse(of, pieces) == expected, pieces


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "llama3"])
@pytest.mark.parametrize(
    "body", ["", "look", "[look(1)]", "{}", "[1]", '{"name": 1}', "<function=look>", "look(", "[" * 9999]
)
def test_what_is_no_call_stays_text(name: str, body: str) -> None:
    tools = FORMATS[name]
    text = f"a {tools.begin}{body}{tools.end} b"
    assert parse(form(name), [text]) == [text]
    assert parse(form(name), [text[:-4]]) == [text[:-4]]


@pytest.mark.parametrize("name", FORMATS)
def test_marks_within_strings_end_nothing(name: str) -> None:
    tools = FORMATS[name]
    if name == "llama3":  # there are none
        return
    if name in ("qwen3_coder", "minimax_m2"):  # text is written as it is there, but objects are JSON
        how = {"fast": "</parameter></function></invoke>" + tools.end}
        found = parse(form(name), [SAID[name].replace('{"fast": true, "none": null}', json.dumps(how))])
        calls = [json.loads(call.arguments) for call in found if isinstance(call, Call)]
        assert calls == [{**ARGUMENTS, "how": how}] * 2, found
        return
    said = {"at": "".join(tools.marks) * 2 + '\\"'}
    written = json.dumps(said)
    text = SAID[name].replace(AS_JSON, written).replace(PYTHON, f"look(at={json.dumps(said['at'])})")
    found = parse(form(name), [text])
    assert [json.loads(call.arguments) for call in found if isinstance(call, Call)] == [said, said], found


def test_an_answer_with_a_brace_that_is_no_call_stays_text() -> None:
    for text in ('{"a": 1}', "{ and so on", "  ", "<|python", "<|python_tag|>print(1)"):
        assert parse(form("llama3"), [text]) == [text]
    assert parse(form("llama3"), [f"<|python_tag|>{OBJECT}"]) == [Call("look", AS_JSON)]


def test_thoughts_come_before_the_answer_and_between_calls() -> None:
    thoughts = ThoughtFormat()
    of = AnswerForm(thoughts=thoughts)
    assert parse(of, ["<think>\nwhy\n</think>\n\nSo."]) == [Thought("why\n"), "So."]
    assert parse(of, ["So."]) == ["So."]
    assert parse(of, ["<think>\n\n</think>\n\nSo."]) == ["So."]
    assert parse(of, ["<think>never ends"]) == [Thought("never ends")]
    inside = AnswerForm(thoughts=thoughts, thinking=True)
    assert parse(inside, ["why</thi", "nk>So."]) == [Thought("why"), "So."]
    assert parse(inside, ["why"]) == [Thought("why")]
    mixed = parse(form("hermes", thoughts=thoughts), ["<think>a</think>" + SAID["hermes"] + "<think>b</think>c"])
    assert [type(item).__name__ for item in mixed] == ["Thought", "str", "Call", "Call", "Thought", "str"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("falcon_h1", "hermes"),
        ("granite4", "hermes"),
        ("qwen3_next", "hermes"),
        ("jamba", "jamba"),
        ("kimi_linear", "kimi"),
        ("lfm2", "lfm2"),
        ("llama3", "llama3"),
        ("nemotron_h", "nemotron"),
        ("gemma", "hermes"),
    ],
)
def test_the_template_shows_the_format(template: str, expected: str) -> None:
    source = (TEMPLATES / f"{template}.jinja").read_text()
    assert format_of([source]).name == expected
    assert format_of([source], "jamba").name == "jamba"
    assert (thoughts_of([source]) is not None) == (template in ("qwen3_next", "lfm2", "nemotron_h"))


def test_a_format_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="tool_parser is 'none', must be one of hermes"):
        format_of([], "none")


@settings(deadline=None)
@given(st.text(alphabet="<>|tool_cal[](){}\"'=functio/parmesk: \n", max_size=200), st.sampled_from(sorted(FORMATS)))
def test_any_text_is_parsed_and_none_is_lost(text: str, name: str) -> None:
    tools = FORMATS[name]
    found = parse(form(name), [tools.begin + text + tools.end])
    if all(isinstance(item, str) for item in found):
        said = "".join(str(item) for item in found)
        assert said == (tools.begin + text + tools.end) or name == "llama3"
