"""Grammars of tool calls, from the records that they are read by: an answer that has to call a tool cannot fail to."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from hybrid_cache.api.text.grammars import Source
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.api.text.tool_formats import ToolFormat
from hybrid_cache.errors import RequestError

ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Tool = Mapping[str, object]  # the definition of a function


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
    schema = function.get("parameters")
    return schema if isinstance(schema, dict) and schema else {"type": "object"}


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


def _properties(function: Tool) -> list[tuple[str, Mapping[str, object], bool]]:
    """Name, schema, and whether it is required, of each parameter in the order of the schema."""
    schema = _parameters(function)
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    items = properties.items() if isinstance(properties, dict) else ()
    return [(key, value if isinstance(value, dict) else {}, key in needed) for key, value in items]


def _one_object(functions: Sequence[Tool], arguments: str) -> dict[str, object]:
    """A schema of a call as an object."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, arguments: _parameters(function)},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


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
    yield _json_rule("calls", {"type": "array", "items": _one_object(functions, "arguments"), "minItems": 1, **most})


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
        yield _json_rule(f"arguments{i}", _parameters(function))


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
