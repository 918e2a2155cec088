"""Grammars of tool calls, from the records that they are read by: an answer that has to call a tool cannot fail to."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from hybrid_cache.api.text.call_readers import KEYWORD, KIMI_ID, NAMES, PYTHON_NAME, Tags, kinds_of
from hybrid_cache.api.text.grammar_trial import STRICT
from hybrid_cache.api.text.grammars import MAX_SOURCE, Source, check_schema
from hybrid_cache.api.text.text_values import TextSchemas
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.api.text.tool_formats import MINIMAX, QWEN, ThoughtFormat, ToolFormat
from hybrid_cache.api.text.tool_schemas import arguments_of, object_schema, parameters_of, part_of, resolved, size_of
from hybrid_cache.errors import RequestError

ONE_LINE = {**STRICT, "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EMPTY, ANY = '""', r"/(.|\n)*/"
Tool = Mapping[str, object]  # the definition of a function
_REFUSED = (
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "const", "enum", "patternProperties", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef"),
)


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
    rules = _rules(tools, chosen, lambda mark: _mark(mark, tokenizer), parallel)
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

    rules = [f"start: calls | {rest}", *_rules(tools, functions, mark, parallel)]
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


def _rules(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> list[str]:
    """Rule `calls`, and those that it needs. Raises RequestError as soon as they are too long, before more is made."""
    found, size = list[str](), 0
    try:
        _check_size(
            sum(size_of(parameters_of(function)) for function in functions), "the parameters of all tools together"
        )
        for rule in _GRAMMARS[tools.name](tools, functions, mark, parallel):
            found.append(rule)
            size += len(rule)
            _check_size(size)
    except RecursionError:
        raise RequestError("the schema of a tool is nested too deeply", param="tools") from None
    return found


def _check_size(size: int, what: str = "the rules for calls, with all that parameters refer to,") -> None:
    if size > MAX_SOURCE:
        raise RequestError(f"{what} take {size} characters or more, at most {MAX_SOURCE}", param="tools")


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    """A mark as a terminal: a token where it is one, else its text."""
    token = tokenizer.id_of(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"


def _named(function: Tool, names: re.Pattern[str]) -> str:
    """The name of a tool. names: those that can be read in this form. Raises RequestError for any other."""
    name = str(function["name"])
    if not _fits(name, names):
        raise RequestError(f"{name!r} cannot be called in this model's form of calls", param="tools")
    return name


def _fits(name: str, names: re.Pattern[str]) -> bool:
    return names.fullmatch(name) is not None and name == name.strip()


class _Arguments:
    """The parameters of a tool, for forms in which they are written one by one.

    each: name, schema, and whether it is required, in the order of the schema. One whose name cannot be read in this
    form is never written.
    """

    def __init__(self, function: Tool, names: re.Pattern[str]) -> None:
        """Raises RequestError for what could not be kept to."""
        self._whole = parameters_of(function)
        schema = object_schema(_mapping(arguments_of(self._whole)))
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise RequestError("`properties` must be an object, and `required` a list", param="tools")
        _check_kept_to(schema, properties, required)
        missing = next((key for key in required if not _fits(key, names)), None)
        if missing is not None:
            raise RequestError(
                f"the parameter {missing!r} cannot be written in this model's form of calls", param="tools"
            )
        items, needed = properties.items(), frozenset(required)
        self.each = [(key, value, key in needed) for key, value in items if _fits(key, names) and value is not False]
        self._texts = TextSchemas(self._whole)

    def json_rule(self, name: str, schema: object, *, without: str = "") -> str:
        """A value that is written as JSON. without: a text that it is not to hold if it is a text"""
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise RequestError(f"the schema of a parameter is {schema!r}, must be an object", param="tools")
        part = part_of(schema, self._whole)
        if without and not schema.get("type"):
            defined = {key: part[key] for key in ("$defs", "definitions") if key in part}
            rest = {key: value for key, value in part.items() if key not in defined}
            part = {"allOf": [rest, {"pattern": f"^[^{without[0]}]*$"}], **defined}
        return _json_rule(name, part)

    def text_rules(self, name: str, schema: object, end: str, tail: str) -> Iterator[str]:
        """A value that is written as it is where it may be text, and as JSON else, and `tail`, which has the mark
        `end`.
        """
        found = resolved(schema, self._whole)
        if isinstance(found, dict) and "string" in kinds_of(found):
            yield f"{name}: {name.upper()}"
            yield self._texts.terminal(name.upper(), found, end, tail)
        else:
            yield f"{name}: {name}j {_literal(tail)}"
            yield self.json_rule(f"{name}j", schema, without=end)


def _mapping(schema: object) -> Tool:
    return schema if isinstance(schema, dict) else {"type": repr(schema)}


def _check_kept_to(schema: Tool, properties: Tool, required: Sequence[object]) -> None:
    """Raises RequestError for a schema of which a call with single parameters would not keep to all."""
    least, most = schema.get("minProperties", 0), schema.get("maxProperties", len(properties))
    refused = [key for key in _REFUSED if key in schema]
    if not isinstance(least, int) or least > len(set(map(str, required))):
        refused.append("minProperties")
    if not isinstance(most, int) or most < len(properties):
        refused.append("maxProperties")
    if refused:
        raise RequestError(
            f"`{refused[0]}` is not supported for the parameters of a tool in this model's form of calls", param="tools"
        )
    unknown = next(
        (name for name in required if not isinstance(name, str) or properties.get(name, False) is False), None
    )
    if unknown is not None:
        raise RequestError(f"`required` names {unknown!r}, which is no parameter that may be there", param="tools")


def _json_rule(name: str, schema: Tool) -> str:
    """JSON in one line: the next turn renders arguments in the same way. Raises RequestError."""
    rule = f"{name}: %json {json.dumps({**schema, 'x-guidance': ONE_LINE})}"
    _check_size(len(rule))
    check_schema(schema, "tools")
    return rule


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
        yield _json_rule(f"arguments{i}", parameters_of(function))


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
        yield _json_rule(f"arguments{i}", parameters_of(function))


def _tagged_parameters(tags: Tags) -> Rules:
    """Functions and parameters in tags, in the order of the schema."""

    def rules(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
        yield f'calls: {mark(tools.begin)} "\\n" {_repeated("one", parallel)} {mark(tools.end)}'
        yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
        for i, function in enumerate(functions):
            arguments = _Arguments(function, NAMES[tags.close])
            parts = [f"p{i}x{j}{'' if needed else '?'}" for j, (_, _, needed) in enumerate(arguments.each)]
            opening = _literal(tags.function, _named(function, NAMES[tags.close]), tags.close, "\n")
            yield f"call{i}: {opening} {' '.join(parts)} {_literal(tags.function_end, chr(10))}"
            for j, (key, value, _) in enumerate(arguments.each):
                yield f"p{i}x{j}: {_literal(tags.parameter, key, tags.close, tags.layout)} v{i}x{j}"
                tail = f"{tags.layout}{tags.parameter_end}\n"
                yield from arguments.text_rules(f"v{i}x{j}", value, tags.parameter_end, tail)

    return rules


def _python(tools: ToolFormat, functions: Sequence[Tool], mark: Marked, parallel: bool) -> Iterator[str]:
    """LFM2: calls with keyword arguments in the order of the schema, whose values are written as in JSON."""
    yield f'calls: {mark(tools.begin)} "[" {_repeated("one", parallel, _literal(", "))} "]" {mark(tools.end)}'
    yield "one: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        arguments = _Arguments(function, KEYWORD)
        yield f'call{i}: {_literal(_named(function, PYTHON_NAME), "(")} a{i} ")"'
        yield from _keywords(i, [needed for _, _, needed in arguments.each])
        for j, (key, value, _) in enumerate(arguments.each):
            yield f"p{i}x{j}: {_literal(key, '=')} v{i}x{j}"
            yield arguments.json_rule(f"v{i}x{j}", value)


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
