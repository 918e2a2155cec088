"""Grammars of tool calls, from the records that they are read by: an answer that has to call a tool cannot fail to."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybrid_cache.api.text.call_readers import (
    KEYWORD,
    KIMI_ID,
    NAMES,
    PYTHON_NAME,
    Tags,
    branches_of,
    kinds_of,
    values_of,
)
from hybrid_cache.api.text.grammar_trial import STRICT
from hybrid_cache.api.text.grammars import Source, check_schema
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.api.text.tool_formats import MINIMAX, QWEN, ThoughtFormat, ToolFormat
from hybrid_cache.errors import RequestError

ONE_LINE = {**STRICT, "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EMPTY, ANY = '""', r"/(.|\n)*/"
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
    rules = _GRAMMARS[tools.name](tools, chosen, lambda mark: _mark(mark, tokenizer), parallel)
    return Source("lark", "\n".join(["start: calls", *rules]), "tools")


def open_source(
    tools: ToolFormat,
    functions: Sequence[Tool],
    tokenizer: Tokenizer,
    thoughts: ThoughtFormat | None,
    *,
    parallel: bool,
    answer: Source | None = None,
) -> Source:
    """An answer that may call, and whose calls are as their tools say: text and thoughts, then at most one call, or
    several if `parallel`. answer: what it is if it calls nothing; None for any text

    A model that has begun a call cannot say anything else. Raises RequestError for a tool that cannot be called.
    """
    around = ["", ""] if thoughts is None else [thoughts.begin, thoughts.end]
    thinks = all(tokenizer.id_of(each) is not None for each in around)
    before, rest = "musings", "musings form"
    if answer is None:
        before, rest = "head", "head" if tools.begin else "other"

    def mark(text: str) -> str:
        if text != tools.begin:
            return _mark(text, tokenizer)
        return "opening" if before == "head" and tokenizer.id_of(text) is None else f"{before} {_mark(text, tokenizer)}"

    rules = [f"start: calls | {rest}", *_GRAMMARS[tools.name](tools, functions, mark, parallel)]
    if answer is not None:
        rules += [answer.as_rule("form"), f"musings: {'musing*' if thinks else EMPTY}"]
    elif tools.begin:
        rules += [f"head: {'(TEXT musing)* ' if thinks else ''}TEXT"]
        rules += [f"opening[suffix={json.dumps(tools.begin)}]: {ANY}"]
    else:
        rules += [r"other: /([^{<\s](.|\n)*)?/"]
    if thinks:
        rules += [f"musing: {_mark(around[0], tokenizer)} TEXT {_mark(around[1], tokenizer)}"]
    return Source("lark", "\n".join([*rules, f"TEXT: {ANY}"]), "tools")


Marked = Callable[[str], str]
Rules = Callable[[ToolFormat, Sequence[Tool], Marked, bool], Iterator[str]]


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
    """A value that is written as it is where it may be text, and as JSON else."""
    if "string" not in kinds_of(schema):
        return _json_rule(name, schema)
    return f"{name}: " + " | ".join(_texts(schema))


def _texts(schema: Mapping[str, object]) -> Iterator[str]:
    """What a value may be that is read as text, or as null."""
    kinds, values = kinds_of(schema), values_of(schema)
    if values is not None:
        yield from (json.dumps("null" if each is None else each) for each in values if isinstance(each, str | None))
    elif "type" not in schema:
        for branch in branches_of(schema):
            yield from _texts(branch)
    else:
        if "null" in kinds:
            yield json.dumps("null")
        if "string" in kinds:
            yield _text(schema)


def _text(schema: Mapping[str, object]) -> str:
    if isinstance(pattern := schema.get("pattern"), str):
        return f"/{pattern.removeprefix('^').removesuffix('$').replace('/', chr(92) + '/')}/"
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"/[^<]{{{low},{high}}}/"


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


def _named(function: Tool, names: re.Pattern[str]) -> str:
    """The name of a tool. names: those that can be read in this form. Raises RequestError for any other."""
    name = str(function["name"])
    if not _fits(name, names):
        raise RequestError(f"{name!r} cannot be called in this model's form of calls", param="tools")
    return name


def _fits(name: str, names: re.Pattern[str]) -> bool:
    return names.fullmatch(name) is not None and name == name.strip()


def _properties(function: Tool, names: re.Pattern[str]) -> list[tuple[str, Mapping[str, object], bool]]:
    """Name, schema, and whether it is required, of each parameter in the order of the schema.

    One whose name cannot be read in this form is never written; if it is required, this raises RequestError.
    """
    schema = _parameters(function)
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    items = properties.items() if isinstance(properties, dict) else ()
    found = [(key, _part(function, value) if isinstance(value, dict) else {}, key in needed) for key, value in items]
    missing = next((key for key, _, needs in found if needs and not _fits(key, names)), None)
    if missing is not None:
        raise RequestError(f"the parameter {missing!r} cannot be written in this model's form of calls", param="tools")
    return [each for each in found if _fits(each[0], names)]


def _json_rule(name: str, schema: Mapping[str, object]) -> str:
    """JSON in one line: the next turn renders arguments in the same way. Raises RequestError."""
    check_schema(schema, "tools")
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': ONE_LINE})}"


def _repeated(rule: str, parallel: bool, between: str = "") -> str:
    return f"{rule} ({between} {rule})*" if parallel else rule


def _literal(*parts: str) -> str:
    return json.dumps("".join(parts))


def _objects(functions: Sequence[Tool], arguments: str) -> Iterator[str]:
    """Rule `call`: a call as an object. arguments: their key"""
    yield "call: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        head = _literal('{"name": ', json.dumps(function["name"]), f', "{arguments}": ')
        yield f'call{i}: {head} arguments{i} "}}"'
        yield _json_rule(f"arguments{i}", _moved(_parameters(function), ""))


def _tagged_objects(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Hermes: each call in tags of its own."""
    yield "calls: " + _repeated("one", parallel, '"\\n"')
    yield f'one: {mark(tools.begin)} "\\n" call "\\n" {mark(tools.end)}'
    yield from _objects(functions, "arguments")


def _tagged_list(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Jamba, Nemotron: all calls in one list."""
    yield f'calls: {mark(tools.begin)} "[" {_repeated("call", parallel, _literal(", "))} "]" {mark(tools.end)}'
    yield from _objects(functions, "arguments")


def _bare_object(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """Llama-3: the answer is a call."""
    yield "calls: " + _repeated("call", parallel, _literal("; "))
    yield from _objects(functions, "parameters")


def _kimi(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    begin, argument, end = tools.inner
    yield f"calls: {mark(tools.begin)} {_repeated('one', parallel)} {mark(tools.end)}"
    yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        name = _literal("functions.", _named(function, KIMI_ID), ":")
        yield f"call{i}: {mark(begin)} {name} /[0-9]{{1,3}}/ {mark(argument)} arguments{i} {mark(end)}"
        yield _json_rule(f"arguments{i}", _moved(_parameters(function), ""))


def _tagged_parameters(tags: Tags) -> Rules:
    """Functions and parameters in tags, in the order of the schema."""

    def rules(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
        yield f'calls: {mark(tools.begin)} "\\n" {_repeated("one", parallel)} {mark(tools.end)}'
        yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
        for i, function in enumerate(functions):
            properties = _properties(function, NAMES[tags.close])
            parts = [f"p{i}x{j}{'' if needed else '?'}" for j, (_, _, needed) in enumerate(properties)]
            opening = _literal(tags.function, _named(function, NAMES[tags.close]), tags.close, "\n")
            yield f"call{i}: {opening} {' '.join(parts)} {_literal(tags.function_end, chr(10))}"
            for j, (key, value, _) in enumerate(properties):
                head = _literal(tags.parameter, key, tags.close, tags.layout)
                yield f"p{i}x{j}: {head} v{i}x{j} {_literal(tags.layout, tags.parameter_end, chr(10))}"
                yield _text_rule(f"v{i}x{j}", value)

    return rules


def _python(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """LFM2: calls with keyword arguments in the order of the schema, whose values are written as in JSON."""
    yield f'calls: {mark(tools.begin)} "[" {_repeated("one", parallel, _literal(", "))} "]" {mark(tools.end)}'
    yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        properties = _properties(function, KEYWORD)
        yield f'call{i}: {_literal(_named(function, PYTHON_NAME), "(")} a{i} ")"'
        yield from _keywords(i, [needed for _, _, needed in properties])
        for j, (key, value, _) in enumerate(properties):
            yield f"p{i}x{j}: {_literal(key, '=')} v{i}x{j}"
            yield _json_rule(f"v{i}x{j}", value)


def _keywords(i: int, needed: Sequence[bool]) -> Iterator[str]:
    """Rule `a{i}`: parameters with commas between them. Rule `r{i}x{j}`: those from the j-th on, behind others."""
    first = next((j for j, needs in enumerate(needed) if needs), len(needed))  # of those that have to be there
    begins = [f"p{i}x{j} r{i}x{j + 1}" for j in range(min(first + 1, len(needed)))]
    yield f"a{i}: " + " | ".join([*begins, *(['""'] if first == len(needed) else [])])
    for j, needs in enumerate(needed):
        yield f'r{i}x{j}: (", " p{i}x{j}){"" if needs else "?"} r{i}x{j + 1}'
    yield f'r{i}x{len(needed)}: ""'


_GRAMMARS: Mapping[str, Rules] = {
    "hermes": _tagged_objects,
    "qwen3_coder": _tagged_parameters(QWEN),
    "jamba": _tagged_list,
    "nemotron": _tagged_list,
    "lfm2": _python,
    "minimax_m2": _tagged_parameters(MINIMAX),
    "kimi": _kimi,
    "llama3": _bare_object,
}
