"""Every keyword of JSON Schema is kept to, or refused with an error that names it; none is passed over."""

import json
from typing import Any

import pytest

from hybrid_cache.api.text.grammars import Grammars, Source, json_source
from hybrid_cache.errors import RequestError
from tests.api.small_text import NUM_TOKENS, small_text

END = "<|im_end|>"
OBJECT: dict[str, Any] = {"type": "object"}

# Keyword -> a schema, what is of it, what is not.
KEPT: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "type": ({"type": "integer"}, ["7", "-1"], ['"a"', "1.5", "null"]),
    "type, several": ({"type": ["integer", "null"]}, ["7", "null"], ['"a"']),
    "enum": ({"enum": ["a", 1, None]}, ['"a"', "1", "null"], ["2", '"b"']),
    "enum and type": ({"type": "integer", "enum": ["a", 1]}, ["1"], ['"a"']),
    "const": ({"const": {"a": [1]}}, ['{"a":[1]}'], ['{"a":[2]}']),
    "minimum": ({"minimum": 3}, ["3", "10", '"a"'], ["2"]),
    "maximum": ({"type": "number", "maximum": 3}, ["3", "-1.5"], ["3.5"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3"]),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, ["2"], ["3"]),
    "exclusiveMinimum of draft 4": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, ["6", "0"], ["7"]),
    "multipleOf of a fraction": ({"type": "number", "multipleOf": 0.01}, ["0.25"], ["0.255"]),
    "minLength": ({"minLength": 2}, ['"ab"', "1"], ['"a"']),
    "maxLength": ({"type": "string", "maxLength": 1}, ['"a"', '"\u00e9"'], ['"ab"']),
    "pattern": ({"type": "string", "pattern": "b+$"}, ['"ab"', '"bb"'], ['"ba"']),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-20"'], ['"2024-02-99"', '"a"']),
    "items": ({"type": "array", "items": {"type": "integer"}}, ["[1,2]", "[]"], ['["a"]']),
    "items of draft 7": ({"type": "array", "items": [{"type": "integer"}]}, ['[1,"a"]'], ['["a"]']),
    "additionalItems": (
        {"type": "array", "items": [{"type": "integer"}], "additionalItems": False},
        ["[1]"],
        ["[1,2]"],
    ),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}]}, ['[1,"a"]'], ['["a"]']),
    "minItems": ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[1]"], ["[1,2]"]),
    "properties": ({**OBJECT, "properties": {"a": {"type": "integer"}}}, ['{"a":1}', '{"b":"x"}'], ['{"a":"x"}']),
    "properties that never come": ({**OBJECT, "properties": {"a": False}}, ['{"b":1}'], ['{"a":1}']),
    "required": ({**OBJECT, "required": ["a"]}, ['{"a":1}'], ["{}", '{"b":1}']),
    "additionalProperties": (
        {**OBJECT, "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        ['{"a":"x","b":1}'],
        ['{"b":"x"}'],
    ),
    "names by number": (
        {**OBJECT, "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
        ['{"b":1}'],
        [r'{"\u0061":1}'],
    ),
    "patternProperties": (
        {**OBJECT, "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
        ['{"ab":1}'],
        ['{"ab":"x"}', '{"b":1}'],
    ),
    "minProperties": ({**OBJECT, "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "minProperties of required names": (
        {**OBJECT, "properties": {"a": {}}, "required": ["a", "b"], "minProperties": 2},
        ['{"a":1,"b":1}', '{"a":1,"b":1,"c":1}'],
        ['{"a":1}', '{"a":1,"c":1}'],
    ),
    "maxProperties": ({**OBJECT, "maxProperties": 1}, ['{"a":1}'], ['{"a":1,"b":1}']),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, ["3"], ["2", '"a"']),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}], "minimum": 3}, ["3", "null"], ["2", '"a"']),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, ["3", "null"], ['"a"']),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, ["3"], ['"a"']),
    "definitions": ({"$ref": "#/definitions/a", "definitions": {"a": {"type": "integer"}}}, ["3"], ['"a"']),
    "$anchor": ({"$ref": "#b", "$defs": {"a": {"$anchor": "b", "type": "integer"}}}, ["3"], ['"a"']),
    "$id": ({"$id": "http://x/y", "$ref": "z", "$defs": {"a": {"$id": "z", "type": "integer"}}}, ["3"], ['"a"']),
    "separators of the client's": ({"type": "array", "x-guidance": {"item_separator": ";"}}, ["[1,2]"], ["[1;2]"]),
}

# Keyword that the error has to name -> a schema.
REFUSED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "minContains": {"type": "array", "contains": {"const": 1}, "minContains": 2},
    "maxContains": {"type": "array", "contains": {"const": 1}, "maxContains": 2},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": {**OBJECT, "properties": {"a": {}}, "unevaluatedProperties": False},
    "propertyNames": {**OBJECT, "propertyNames": {"pattern": "^a"}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["b"]}},
    "dependencies": {**OBJECT, "dependencies": {"a": ["b"]}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "then": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "else": {"type": "integer", "else": {"minimum": 3}},
    "not": {"not": {"type": "integer"}},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "patternProperty": {**OBJECT, "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}},
    "minProperties": {**OBJECT, "minProperties": 2},
    "divisibleBy": {"type": "integer", "divisibleBy": 2},
    "disallow": {"disallow": "integer"},
    "extends": {"extends": {"type": "integer"}},
    "$dynamicRef": {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "type": "integer"}}},
    "$recursiveRef": {"$recursiveRef": "#"},
    "idn-email": {"type": "string", "format": "idn-email"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b"},
    "http://example.com/a": {"$ref": "http://example.com/a"},
}

UNSEEN = ({"not": {"const": 1}}, {"minProperties": 2}, {"extends": {}})
PLACES: dict[str, Any] = {
    "property": lambda inner: {**OBJECT, "properties": {"not": {"type": "integer"}, "a": inner}},
    "item": lambda inner: {"type": "array", "items": inner},
    "anyOf": lambda inner: {"anyOf": [{"type": "integer"}, inner]},
    "$defs": lambda inner: {"$ref": "#/$defs/a", "$defs": {"a": inner}},
    "elsewhere": lambda inner: {"$ref": "#/here/0", "here": [inner]},
    "x-guidance": lambda inner: {**inner, "x-guidance": {"lenient": True, "coerce_one_of": True}},
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = small_text().tokenizer
    return Grammars(tokenizer, NUM_TOKENS, [tokenizer.id_of(END) or 0])


def accepts(grammars: Grammars, source: Source, text: str) -> bool:
    walk, end = grammars.compile(source).start(), small_text().tokenizer.id_of(END)
    for token in small_text().tokenizer.encode(text + END):
        if walk.done:
            return token == end
        if not walk.mask()[token // 32] >> token % 32 & 1:
            return False
        walk.note(token)
    return True


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("keyword", KEPT)
def test_a_keyword_is_kept_to(grammars: Grammars, keyword: str, thinks: bool) -> None:
    schema, good, bad = KEPT[keyword]
    source, before = json_source(schema, "p"), ""
    if thinks:
        source, before = source.after_thought("</think>"), "hm</think>"
    for text in good:
        assert accepts(grammars, source, before + text), text
    for text in bad:
        assert not accepts(grammars, source, before + text), text


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_is_refused_by_name(grammars: Grammars, keyword: str) -> None:
    with pytest.raises(RequestError) as found:
        grammars.compile(json_source(REFUSED[keyword], "response_format"))
    assert keyword in str(found.value)
    assert found.value.param == "response_format"


@pytest.mark.parametrize("inner", UNSEEN, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_a_keyword_is_refused_wherever_it_stands(grammars: Grammars, place: str, inner: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as found:
        grammars.compile(json_source(json.dumps(PLACES[place](inner)), "p"))
    assert next(iter(inner)) in str(found.value)


def test_what_only_looks_like_a_keyword_is_none(grammars: Grammars) -> None:
    named = {**OBJECT, "properties": {"not": {"type": "integer"}, "extends": {}}, "default": {"disallow": 1}}
    values = {"enum": [{"minProperties": 5}], "title": "not", "examples": [{"uniqueItems": True}]}
    assert accepts(grammars, json_source(named, "p"), '{"not":1}')
    assert accepts(grammars, json_source(values, "p"), '{"minProperties":5}')


LOOP: dict[str, Any] = {**OBJECT, "properties": {"x": {"$ref": "#"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"const": "a\x01b"}, "const has the control character"),
        ({"enum": ["x", {"a": ["\x1b[0m"]}]}, "enum has the control character"),
        ({"const": 2**53 + 1}, "const has 9007199254740993"),
        ({"enum": [{"a": -(2**60)}]}, "enum has -1152921504606846976"),
        ({"type": "integer", "minimum": 2**64}, "minimum is 18446744073709551616"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}, "maximum is 1e-07"),
        ({**OBJECT, "properties": {f"p{i}": {} for i in range(500)}}, "500 may be left out"),
        (LOOP, "no value is of this schema"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no value is of this schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "no value is of this schema"),
        ({"anyOf": [LOOP, LOOP], "$defs": {}}, "no value is of this schema"),
        (False, "must be"),
    ],
    ids=str,
)
def test_what_could_not_be_kept_to_is_refused(grammars: Grammars, schema: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why if schema is not False else "."):
        grammars.compile(json_source(schema, "p"))


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"const": "a\tb\n"},
        {"enum": [2**53, -(2**53), True, 1e-9]},
        {"properties": LOOP["properties"], "required": ["x"]},
        {**OBJECT, "properties": {"x": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["x"]},
        {**OBJECT, "properties": {"x": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": ["object", "null"], "properties": {"l": {"$ref": "#"}}}}},
    ],
    ids=str,
)
def test_what_can_be_kept_to_is_not(grammars: Grammars, schema: Any) -> None:
    grammars.compile(json_source(schema, "p"))
