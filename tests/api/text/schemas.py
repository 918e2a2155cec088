"""Random JSON schemas of the shapes that the public JSON Schema test suite has, in our own words."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = ["a", "b c", "\u00fc", 'd"', "e/f", "$ref", "", "type"]
TEXTS = ["", "a", "ab", "\u20ac\n", 'q"', "null", "\\"]
VALUES = st.sampled_from([*TEXTS, 0, 1, -7, 2.5, 10**9, True, None, [], [1, "a"], {}, {"a": {"b": [None]}}])
PATTERNS = ["^[a-c]{1,4}x?$", "^\\d+$", "b", "^(yes|no)", "[xyz]$", "^$|^\\w-\\w$"]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri"]
KINDS = ["string", "integer", "number", "boolean", "null", "array", "object"]


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(0, 3))
    lengths = {"minLength": low, "maxLength": low + draw(st.integers(0, 8))}
    rule = draw(st.sampled_from(["length", "length", "pattern", "format", "both"]))
    pattern = {"pattern": draw(st.sampled_from(PATTERNS))}
    return {
        "length": lengths,
        "pattern": pattern,
        "format": {"format": draw(st.sampled_from(FORMATS))},
        "both": {**pattern, "maxLength": lengths["maxLength"]},
    }[rule] | draw(st.sampled_from([{"type": "string"}, {"type": ["string", "null"]}]))


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    kind, low = draw(st.sampled_from(["integer", "number"])), draw(st.integers(-60, 60))
    high = low + draw(st.integers(1, 90))
    if kind == "number" and draw(st.booleans()):
        low, high = low / 4, high / 4
    names = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum"), ("minimum",), ()]))
    steps = (
        {}
        if draw(st.booleans())
        else {"multipleOf": draw(st.sampled_from([1, 2, 5, 7] if kind == "integer" else [0.5, 0.01]))}
    )
    return {"type": kind, **dict(zip(names, (low, high), strict=False)), **steps}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    low = draw(st.integers(0, 2))
    sizes = {"minItems": low, "maxItems": low + draw(st.integers(0, 3))}
    first = draw(st.lists(inner, min_size=1, max_size=2))
    shape = draw(st.sampled_from(["items", "items", "prefix", "closed"]))
    return {"type": "array"} | {
        "items": {"items": first[0], **sizes},
        "prefix": {"prefixItems": first, "items": draw(inner), "maxItems": len(first) + 1},
        "closed": {"prefixItems": first, "items": False, "minItems": draw(st.integers(0, len(first)))},
    }[shape]


@st.composite
def arrays_of_draft_7(draw: st.DrawFn) -> Schema:
    first, rest = draw(st.lists(leaves(), min_size=1, max_size=2)), draw(st.sampled_from([False, {"type": "null"}]))
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return {**draft, "type": "array", "items": first, "additionalItems": rest, "maxItems": len(first) + 1}


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    properties = {name: draw(inner) for name in names}
    required = [name for name in names if draw(st.integers(0, 2))]
    others: Schema = draw(
        st.sampled_from(
            [
                {"additionalProperties": False},
                {"additionalProperties": False},
                {"additionalProperties": {"type": "integer"}},
                {"patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
                {},
            ]
        )
    )
    if draw(st.integers(0, 5)) == 0:
        return {"type": "object", "additionalProperties": draw(inner), "minProperties": 1, "maxProperties": 2}
    return {"type": "object", "properties": properties, "required": required, **others}


@st.composite
def combined(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    kinds = draw(st.lists(st.sampled_from(KINDS[:5]), min_size=2, max_size=3, unique=True))
    shape = draw(st.sampled_from(["anyOf", "oneOf", "allOf", "both", "$ref", "list", "tree"]))
    some = draw(inner)
    bounded = {"type": "integer", "minimum": draw(st.integers(-9, 9))}
    return {
        "anyOf": {"anyOf": [some, draw(inner)]},
        "oneOf": {"oneOf": [{"const": f"{kind}!"} if kind == "string" else {"type": kind} for kind in kinds]},
        "allOf": {"allOf": [bounded, {"maximum": 40}, {"multipleOf": 3}]},
        "both": {
            "allOf": [
                {"type": "object", "properties": {"a": some}, "required": ["a"]},
                {"properties": {"b": {"type": "integer"}}, "required": ["b"], "maxProperties": 3},
            ]
        },
        "$ref": {"$defs": {"it": some}, "type": "array", "items": {"$ref": "#/$defs/it"}, "maxItems": 2},
        "list": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        },
        "tree": {
            "definitions": {"t": {"type": "array", "items": {"$ref": "#/definitions/t"}, "maxItems": 2}},
            "$ref": "#/definitions/t",
        },
    }[shape]


def leaves() -> st.SearchStrategy[Schema]:
    values = st.lists(VALUES, min_size=1, max_size=4)
    return st.one_of(
        strings(),
        numbers(),
        st.sampled_from(KINDS[:5]).map(lambda kind: {"type": kind}),
        values.map(lambda some: {"enum": some}),
        values.map(lambda some: {"enum": [*some, "a", 1], "type": ["string", "integer"]}),
        VALUES.map(lambda value: {"const": value}),
    )


def schemas() -> st.SearchStrategy[Schema]:
    """References to `#` and definitions are meant for the whole of a schema, so these do not lie within others."""

    def larger(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
        return st.one_of(
            arrays(inner), objects(inner), st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
        )

    nested = st.recursive(leaves(), larger, max_leaves=8)
    return st.one_of(nested, arrays(nested), objects(nested), objects(nested), combined(nested), arrays_of_draft_7())


def some_schemas(count: int, seed: int = 0) -> list[Schema]:
    """The same each time."""
    found: list[Schema] = []

    def take(schema: Schema) -> None:
        found.append(schema)

    run: Callable[[], None] = settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )(given(schemas())(take))
    seeded(seed)(run)()
    return found[:count]
