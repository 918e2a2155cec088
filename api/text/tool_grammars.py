"""Grammars of tool calls, from the records that they are read by: an answer that has to call a tool cannot fail to."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybrid_cache.api.text.grammars import Source
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.api.text.tool_formats import ToolFormat
from hybrid_cache.errors import RequestError

ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Tool = Mapping[str, object]  # the definition of a function
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if")


def call_source(
    tools: ToolFormat, functions: Sequence[Tool], tokenizer: Tokenizer, *, only: str | None, parallel: bool
) -> Source:
    """An answer that is one call, or several if `parallel`. only: the name of the tool; None for any

    Raises RequestError for a tool that is not there.
    """
    chosen = [function for function in functions if only is None or function.get("name") == only]
    if not chosen:
        why = (
            "asks for a call, and there are no tools" if only is None else f"names {only!r}, which is none of the tools"
        )
        raise RequestError(f"tool_choice {why}", param="tool_choice")
    rules = list(_GRAMMARS[tools.name](tools, chosen, lambda mark: _mark(mark, tokenizer), parallel))
    return Source("lark", "\n".join(rules), "tools")


Marked = Callable[[str], str]


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    """A mark as a terminal: a token where it is one, else its text."""
    token = tokenizer.id_of(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"


def _parameters(function: Tool) -> Mapping[str, object]:
    """The schema of the arguments. One that lists them, and does not say that there may be others, means no others."""
    schema = function.get("parameters")
    if not isinstance(schema, dict) or not schema:
        return {"type": "object"}
    return {**schema, "additionalProperties": False} if _lists_all(schema) else schema


def _lists_all(schema: Mapping[str, object]) -> bool:
    """Nothing else in the schema lets in, or asks for, an argument that is not among its properties."""
    properties, required = schema.get("properties"), schema.get("required", [])
    listed = isinstance(properties, dict) and isinstance(required, list) and set(required) <= properties.keys()
    return listed and schema.keys().isdisjoint(_OPEN)


def _text_rule(name: str, schema: Mapping[str, object]) -> str:
    """A value that is written as it is where it is text, and as JSON else."""
    if schema.get("type") != "string":
        return _json_rule(name, schema)
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return f"{name}: " + " | ".join(json.dumps(str(value)) for value in values)
    if isinstance(pattern := schema.get("pattern"), str):
        return f"{name}: /{pattern.removeprefix('^').removesuffix('$').replace('/', chr(92) + '/')}/"
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"{name}: /[^<]{{{low},{high}}}/"


def _moved(schema: Any, place: str) -> Any:
    """A schema, or a part of one, for another document: what it refers to is found under `place`, a JSON pointer.

    LiteLLM writes references without their `#`.
    """
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    match schema.get("$ref"):
        case str(pointer) if pointer == "#" or pointer.startswith(("#/", "/")):
            moved["$ref"] = f"#{place}{pointer.removeprefix('#')}"
    return moved


def _part(function: Tool, schema: Mapping[str, object]) -> Mapping[str, object]:
    """The schema of one argument as a document, with all that it refers to."""
    if '"$ref"' not in json.dumps(schema):
        return schema
    part, whole = _moved([schema, _parameters(function)], "/$defs/arguments")
    return {**part, "$defs": {"arguments": whole}}


def _properties(function: Tool) -> list[tuple[str, Mapping[str, object], bool]]:
    """Name, schema, and whether it is required, of each parameter in the order of the schema."""
    schema = _parameters(function)
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    items = properties.items() if isinstance(properties, dict) else ()
    return [(key, _part(function, value) if isinstance(value, dict) else {}, key in needed) for key, value in items]


def _one_object(functions: Sequence[Tool], arguments: str, place: str = "") -> dict[str, object]:
    """A schema of a call as an object. place: where in a document, as a JSON pointer"""
    if len(functions) > 1:
        return {"anyOf": [_one_object([each], arguments, f"{place}/anyOf/{i}") for i, each in enumerate(functions)]}
    parameters = _moved(_parameters(functions[0]), f"{place}/properties/{arguments}")
    return {
        "type": "object",
        "properties": {"name": {"const": functions[0]["name"]}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def _json_rule(name: str, schema: Mapping[str, object]) -> str:
    """JSON in one line: the next turn renders arguments in the same way."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': ONE_LINE})}"


def _repeated(rule: str, parallel: bool, between: str = "") -> str:
    return f"{rule} ({between} {rule})*" if parallel else rule


def _tagged_objects(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Hermes: each call in tags of its own."""
    yield "start: " + _repeated("one", parallel, '"\\n"')
    yield f'one: {mark(tools.begin)} "\\n" call "\\n" {mark(tools.end)}'
    yield _json_rule("call", _one_object(functions, "arguments"))


def _tagged_list(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Jamba, Nemotron: all calls in one list."""
    yield f"start: {mark(tools.begin)} calls {mark(tools.end)}"
    most = {} if parallel else {"maxItems": 1}
    yield _json_rule(
        "calls", {"type": "array", "items": _one_object(functions, "arguments", "/items"), "minItems": 1, **most}
    )


def _bare_object(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Llama-3: the answer is a call."""
    yield "start: " + _repeated("call", parallel, '"; "')
    yield _json_rule("call", _one_object(functions, "parameters"))


def _kimi(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    begin, argument, end = tools.inner
    yield f"start: {mark(tools.begin)} {_repeated('one', parallel)} {mark(tools.end)}"
    yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        name = json.dumps(f"functions.{function['name']}:")
        yield f"call{i}: {mark(begin)} {name} /[0-9]{{1,3}}/ {mark(argument)} arguments{i} {mark(end)}"
        yield _json_rule(f"arguments{i}", _moved(_parameters(function), ""))


def _tagged_parameters(head: str, foot: str, parameter: str, close: str) -> Callable[..., Iterator[str]]:
    """Functions and parameters in tags: those that are required, then others, in the order of the schema."""

    def rules(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
        yield f'start: {mark(tools.begin)} "\\n" {_repeated("one", parallel)} {mark(tools.end)}'
        yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
        for i, function in enumerate(functions):
            properties = _properties(function)
            parts = [f"p{i}x{j}{'' if needed else '?'}" for j, (_, _, needed) in enumerate(properties)]
            opening = json.dumps(head.format(function["name"]) + "\n")
            yield f"call{i}: {opening} {' '.join(parts)} {json.dumps(foot + chr(10))}"
            for j, (key, value, _) in enumerate(properties):
                yield f"p{i}x{j}: {json.dumps(parameter.format(key))} v{i}x{j} {json.dumps(close + chr(10))}"
                yield _text_rule(f"v{i}x{j}", value)

    return rules


def _python(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """LFM2: calls with keyword arguments, those that are required, whose values are written as in JSON."""
    yield f'start: {mark(tools.begin)} "[" {_repeated("one", parallel, chr(34) + ", " + chr(34))} "]" {mark(tools.end)}'
    yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        required = [(key, value) for key, value, needed in _properties(function) if needed]
        arguments = ' ", " '.join(f"{json.dumps(key + '=')} v{i}x{j}" for j, (key, _) in enumerate(required))
        yield f'call{i}: {json.dumps(str(function["name"]) + "(")} {arguments} ")"'
        for j, (_, value) in enumerate(required):
            yield _json_rule(f"v{i}x{j}", value)


_GRAMMARS: Mapping[str, Callable[[ToolFormat, Sequence[Tool], Marked, bool], Iterator[str]]] = {
    "hermes": _tagged_objects,
    "qwen3_coder": _tagged_parameters("<function={}>", "</function>", "<parameter={}>\n", "\n</parameter>"),
    "jamba": _tagged_list,
    "nemotron": _tagged_list,
    "lfm2": _python,
    "minimax_m2": _tagged_parameters('<invoke name="{}">', "</invoke>", '<parameter name="{}">', "</parameter>"),
    "kimi": _kimi,
    "llama3": _bare_object,
}
