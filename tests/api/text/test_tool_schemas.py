"""Schemas of tools in grammars of calls: kept to as a whole, or refused with the keyword that is not."""

import asyncio
import json
import random
import threading
import time
from typing import Any

import jsonschema_rs
import pytest

from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.grammars import Grammar, Grammars, Source
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.api.text.tool_formats import FORMATS
from hybrid_cache.api.text.tool_grammars import call_source
from hybrid_cache.api.text.tool_schemas import plain, properties_of
from hybrid_cache.errors import RequestError
from tests.api.servers import new_engine
from tests.api.small_text import NUM_TOKENS, small_text
from tests.api.text.reading import Call, parse
from tests.api.text.test_grammars import follow, walk

TAGGED = ["qwen3_coder", "minimax_m2"]
SINGLE = [*TAGGED, "lfm2"]  # forms in which parameters are written one by one
ALL = [*SINGLE, "hermes"]
OBJECT: dict[str, Any] = {"type": "object"}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = small_text().tokenizer
    return Grammars(tokenizer, NUM_TOKENS, [tokenizer.id_of("<|im_end|>") or 0])


def of(schema: Any, **more: Any) -> dict[str, Any]:
    return {**OBJECT, "properties": {"a": schema}, "required": ["a"], "additionalProperties": False, **more}


def source(name: str, schema: Any) -> Source:
    function = {"name": "f", "parameters": schema}
    return call_source(FORMATS[name], [function], small_text().tokenizer, only=None, parallel=False)


def calls(name: str, schema: Any, grammar: Grammar, count: int = 5) -> list[Any]:
    """Arguments of calls that a model makes, each of which its reader finds to be one that is whole."""
    form, found = AnswerForm(FORMATS[name], {"f": properties_of(schema)}), []
    for seed in range(count):
        said = walk(grammar, random.Random(seed), 600)
        if said is not None:
            [call] = parse(form, [said])
            assert isinstance(call, Call), said
            assert call.complete
            found.append(json.loads(call.arguments))
    return found


NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
DEFS = {"$defs": {"e": {"title": "E", "enum": ["x", "5"]}, "n": of(NUMBER)}}
SHORT = {"type": "string", "maxLength": 5}
KEPT: dict[str, Any] = {
    "no type": {"properties": {"a": NUMBER}, "required": ["a"]},
    "object or null": {**of(NUMBER), "type": ["object", "null"]},
    "reference": {"$ref": "#/$defs/n", **DEFS},
    "reference of a text": of({"description": "an e", "$ref": "#/$defs/e"}, **DEFS),
    "reference beside": of({"type": "string", "$ref": "#/$defs/e"}, **DEFS),
    "reference or null": of({"anyOf": [{"$ref": "#/$defs/e"}, {"type": "null"}]}, **DEFS),
    "constants": of({**SHORT, "oneOf": [{"const": "x"}, {"const": "y"}, {"const": "too long"}]}),
    "branches": of({"type": "string", "anyOf": [{"enum": ["x"]}, {"pattern": "^[a-c]{2}$"}]}),
    "once": of({"type": "string", "oneOf": [{"enum": ["x", "y"]}, {"enum": ["y", "z"]}]}),
    "all of": of({"type": "string", "allOf": [{"maxLength": 4}, {"minLength": 3}, {"enum": ["a", "bbb", "ccccc"]}]}),
    "pattern and length": of({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}),
    "length beside": of({"anyOf": [{"type": "string"}, {"type": "null"}], "maxLength": 3}),
    "listed and length": of({"enum": ["a", "bbbb", None], "maxLength": 2}),
    "listed null": of({"type": ["string", "null"], "enum": ["null", "x"]}),
    "numbers only": of({"type": ["string", "integer"], "enum": [1, 2]}),
    "slash": of({"type": "string", "pattern": "^\\/api\\/[a-z]{1,3}/$"}),
    "dollar": of({"type": "string", "pattern": "^[0-2]{1,2}\\$"}),
    "backslash": of({"type": "string", "pattern": "^a\\\\$"}),
    "nothing": of({"type": "string", "pattern": "^$"}),
    "constant with $ref": of({"const": {"$ref": "/x", "description": "y"}}),
    "property $ref": {**OBJECT, "properties": {"$ref": NUMBER, "title": NUMBER}, "required": ["$ref", "title"]},
    "false": {**OBJECT, "properties": {"a": False, "b": NUMBER}, "required": ["b"]},
}


@pytest.mark.parametrize("name", ALL)
def test_calls_are_as_the_whole_schema_says(grammars: Grammars, name: str) -> None:
    for case, schema in KEPT.items():
        if "oneOf" in str(schema) and name not in TAGGED:
            continue  # as JSON these are refused where they overlap
        found = calls(name, schema, grammars.compile(source(name, schema)))
        assert found, case
        for arguments in found:
            assert isinstance(arguments, dict), case
            jsonschema_rs.validator_for(schema).validate(arguments)


TAG = "</parameter>"
REFUSED: dict[str, tuple[list[str], Any, str]] = {
    "array": (ALL, {"type": "array"}, "'array'"),
    "names": (ALL, {**OBJECT, "properties": {}, "required": [{}]}, r"\[\{\}\]"),
    "type": (ALL, of({"type": 5}), "type"),
    "types": (ALL, of({"type": True}), "type"),
    "no values": (ALL, of({"type": "string", "enum": []}), "nsatisfiable"),
    "tag": (TAGGED, of({"enum": ["x</parameter>y"]}), "'x</parameter>y'"),
    "tag behind": (TAGGED, of({"$ref": "#/$defs/t"}, **{"$defs": {"t": {"const": TAG}}}), f"'{TAG}'"),
    "not": (TAGGED, of({"type": "string", "maxLength": 1, "not": {"const": "x"}}), "`not`"),
    "one of": (TAGGED, of({"oneOf": [SHORT, {"type": "string", "minLength": 2}]}), "`oneOf`"),
    "pattern": (TAGGED, of({"type": "string", "enum": ["a"], "pattern": "b"}), "`pattern`"),
    "contradiction": (TAGGED, of({"type": "string", "minLength": 5, "maxLength": 2}), "allows no text"),
    "itself": (TAGGED, of({"type": "string", "$ref": "#/$defs/t"}, **{"$defs": {"t": {"$ref": "#/$defs/t"}}}), "deep"),
    "unknown": (TAGGED, of({"type": "string", "$ref": "#/$defs/u"}), "'#/\\$defs/u'"),
    "escape": (TAGGED, of({"type": "string", "pattern": "a\\"}), "backslash"),
    "allOf": (SINGLE, of(NUMBER, allOf=[{"required": ["b"]}]), "`allOf`"),
    "anyOf": (SINGLE, of(NUMBER, anyOf=[{"required": ["b"]}]), "`anyOf`"),
    "not at all": (SINGLE, of(NUMBER, **{"not": {}}), "`not`"),
    "dependent": (SINGLE, of(NUMBER, dependentRequired={"a": ["b"]}), "`dependentRequired`"),
    "by pattern": (SINGLE, of(NUMBER, patternProperties={"b": {}}), "`patternProperties`"),
    "least": (SINGLE, of(NUMBER, minProperties=2), "`minProperties`"),
    "most": (SINGLE, of(NUMBER, maxProperties=0), "`maxProperties`"),
    "required": (SINGLE, of(NUMBER, required=["a", "b"]), "'b'"),
    "false": (SINGLE, of(False), "'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_kept_to_is_refused(grammars: Grammars, case: str) -> None:
    names, schema, named = REFUSED[case]
    for name in names:
        with pytest.raises(RequestError, match=named) as found:
            grammars.compile(source(name, schema))
        assert found.value.param == "tools"


@pytest.mark.parametrize("name", TAGGED)
def test_a_text_holds_anything_but_the_tag_that_ends_it(grammars: Grammars, name: str) -> None:
    head = {"qwen3_coder": "\n<function=f>\n<parameter=a>\n", "minimax_m2": '\n<invoke name="f">\n<parameter name="a">'}
    begin = FORMATS[name].begin + head[name]
    for text in ({"type": "string"}, {"type": "string", "pattern": "^(.|\n)*$"}):
        grammar = grammars.compile(source(name, of(text)))
        said = begin + "if a < b:\n  </b>"
        assert follow(grammar, said) == said + "..."
        assert len(follow(grammar, said + "</parameter> and more")) < len(said + "</parameter> and")
    nullable = {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}
    grammar = grammars.compile(source(name, of(nullable, **{"$defs": {"t": {"type": "string"}}})))
    assert follow(grammar, begin + '"a < b') in (begin + '"a', begin + '"a ')


def test_a_recursive_schema(grammars: Grammars) -> None:
    node = of({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    for name in SINGLE:
        for arguments in calls(name, schema, grammars.compile(source(name, schema))):
            jsonschema_rs.validator_for(schema).validate(arguments)
            assert "a" in arguments


def test_what_is_for_people_is_left_out_and_values_stay() -> None:
    schema = {"title": "T", "properties": {"title": {"description": "D", "enum": [{"$ref": "/x", "title": 1}]}}}
    assert plain(schema) == {"properties": {"title": {"enum": [{"$ref": "/x", "title": 1}]}}}
    assert plain({"$ref": "/$defs/x", "items": {"$ref": "#"}}, "/p") == {
        "$ref": "#/p/$defs/x",
        "items": {"$ref": "#/p"},
    }


@pytest.mark.parametrize("name", SINGLE)
def test_many_references_take_what_they_refer_to(name: str) -> None:
    properties: dict[str, Any] = {f"a{i}": {"$ref": "#/$defs/x"} for i in range(1000)}
    schema = {**OBJECT, "properties": properties, "$defs": {"x": {"$ref": "#/$defs/y"}, "y": NUMBER}}
    begin = time.process_time()
    with pytest.raises(RequestError, match=r"rules for calls.* [0-9]+ characters or more, at most 131072"):
        source(name, schema)
    properties = dict(list(properties.items())[:200])
    found = source(name, {**schema, "properties": properties, "$defs": {**schema["$defs"], "z": {"enum": ["z" * 900]}}})
    assert len(found.text) < 120_000
    for reference in ("#", "#/properties/a0"):
        whole = {**schema, "properties": {f"a{i}": {"items": {"$ref": reference}} for i in range(300)}}
        with pytest.raises(RequestError, match="at most 131072"):
            source(name, whole)
    assert time.process_time() - begin < 2


def test_parameters_that_are_too_long_are_refused_before_anything_is_made() -> None:
    with pytest.raises(RequestError, match=r"parameters of all tools together take [0-9]{6,} characters"):
        source("qwen3_coder", of({"enum": ["x" * 1000] * 140}))


@pytest.mark.parametrize("kind", [5, True, {"a": 1}, [5, {}]], ids=str)
def test_a_type_that_is_none_is_no_fault_of_a_reader(kind: Any) -> None:
    said = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    [call] = parse(AnswerForm(FORMATS["qwen3_coder"], {"f": properties_of(of({"type": kind}))}), [said])
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == {"a": 1}


@pytest.mark.parametrize(("pattern", "text"), [("a\\/b", "a/b"), ("[/]", "/"), ("a\\\\/b", "a\\/b"), ("", "")])
def test_a_pattern_behind_a_thought(grammars: Grammars, pattern: str, text: str) -> None:
    grammar = grammars.compile(Source("regex", pattern, "p").after_thought("</think>"))
    assert follow(grammar, f"hm</think>{text}") == f"hm</think>{text}"


def test_grammars_are_made_beside_the_event_loop(sum_text: TextModel) -> None:
    """Where nothing is asked for, nothing is made."""
    text, seen = TextEngine.of(new_engine(), sum_text), list[int]()

    def made() -> Source:
        seen.append(threading.get_ident())
        return Source("regex", "a", "p")

    assert asyncio.run(text.grammar(made, AnswerForm(), "", 0)) is not None
    assert asyncio.run(text.grammar(None, AnswerForm(), "", 0)) is None
    assert len(seen) == 1
    assert seen[0] != threading.get_ident()
