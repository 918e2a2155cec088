"""Schemas of the arguments of tools: what of them is needed, and what their references stand for."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from hybrid_cache.errors import RequestError

Schema = Mapping[str, object]
MOST_HOPS = 16  # from reference to reference
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum"})
_NOTES = frozenset(
    {"title", "description", "default", "example", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
)
_BESIDE = _NOTES | {"$defs", "definitions", "$schema", "$id"}  # may stand beside a reference without a meaning
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if")
_DEFINED = re.compile(r"#/(\$defs|definitions)/([^/]+)(?:/.*)?", re.DOTALL)


def parameters_of(function: Schema) -> Schema:
    """The schema of the arguments, an object, without what is only for people.

    One that lists them, and does not say that there may be others, means no others. Raises RequestError.
    """
    schema = function.get("parameters")
    if not isinstance(schema, dict) or not schema:
        return {"type": "object"}
    schema = object_schema(plain(schema))
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError(f"`required` is {required!r}, must be a list of names", param="tools")
    properties = schema.get("properties")
    listed = isinstance(properties, dict) and properties.keys() >= set(required)
    return {**schema, "additionalProperties": False} if listed and schema.keys().isdisjoint(_OPEN) else schema


def object_schema(schema: Schema) -> Schema:
    """The same of an object. Raises RequestError for one that allows none."""
    kinds = schema.get("type", "object")
    if kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
        return {**schema, "type": "object"}
    raise RequestError(f"the parameters of a tool have the type {kinds!r}, must be an object", param="tools")


def plain(schema: Any, place: str = "") -> Any:
    """A schema, or a part of one, without notes, and for another document: what it refers to is found under `place`,
    a JSON pointer. LiteLLM writes references without their `#`.
    """
    if isinstance(schema, list):
        return [plain(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _plain_value(key, value, place) for key, value in schema.items() if key not in _NOTES}


def _plain_value(key: str, value: Any, place: str) -> Any:
    if key in _VALUES:
        return value
    if key in _BY_NAME and isinstance(value, dict):
        return {name: plain(each, place) for name, each in value.items()}
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith(("#/", "/"))):
        return f"#{place}{value.removeprefix('#')}"
    return plain(value, place)


def pointed(whole: object, reference: str) -> object:
    """What a reference stands for. Raises LookupError if there is nothing."""
    if reference != "#" and not reference.startswith(("#/", "/")):
        raise LookupError(reference)
    found = whole
    for step in map(_unescaped, reference.removeprefix("#").split("/")[1:]):
        if isinstance(found, dict):
            found = found[step]
        elif isinstance(found, list) and step.isdecimal():
            found = found[int(step)]
        else:
            raise LookupError(reference)
    return found


def _unescaped(step: str) -> str:
    return unquote(step).replace("~1", "/").replace("~0", "~")


def resolved(schema: object, whole: object) -> object:
    """What a schema refers to that is nothing but a reference; else, and where that is nothing, the schema itself."""
    found = schema
    for _ in range(MOST_HOPS):
        reference = found.get("$ref") if isinstance(found, dict) and found.keys() - {"$ref"} <= _BESIDE else None
        if not isinstance(reference, str):
            return found
        try:
            found = pointed(whole, reference)
        except LookupError:
            return schema
    return schema


def arguments_of(parameters: object) -> object:
    """The schema that lists the arguments: another part of the parameters where these are a reference."""
    if isinstance(parameters, dict) and parameters.get("type") == "object":
        return resolved({key: value for key, value in parameters.items() if key != "type"}, parameters)
    return resolved(parameters, parameters)


def properties_of(parameters: object) -> dict[str, Schema]:
    """Parameter -> its schema, as far as the schema of the arguments says."""
    schema = arguments_of(parameters)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    found = ((name, resolved(each, parameters)) for name, each in properties.items())
    return {name: each for name, each in found if isinstance(each, dict)}


def part_of(schema: Schema, whole: Schema) -> Schema:
    """The schema of one argument as a document, with what it refers to."""
    reached: dict[str, dict[str, object]] = {}
    todo: list[object] = [schema]
    while todo:
        for reference in _references(todo.pop()):
            defined = _DEFINED.fullmatch(reference)
            if defined is None:
                part, arguments = plain([schema, whole], "/$defs/arguments")
                return {**part, "$defs": {"arguments": arguments}}
            section, name = defined[1], _unescaped(defined[2])
            definitions = whole.get(section)
            if isinstance(definitions, dict) and name in definitions and name not in reached.setdefault(section, {}):
                reached[section][name] = definitions[name]
                todo.append(definitions[name])
    return {**schema, **reached}


def _references(schema: object) -> Iterator[str]:
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                yield reference
            todo += (value for key, value in node.items() if key not in _VALUES)


def size_of(schema: object) -> int:
    """Characters."""
    return len(json.dumps(schema))
