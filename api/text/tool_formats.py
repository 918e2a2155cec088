"""How families of models write tool calls and thoughts: a record for each, found from the chat template.

The forms are those that the families' published templates and model cards show.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hybrid_cache.errors import ConfigError

Types = Mapping[str, Mapping[str, object]]  # tool -> parameter -> its JSON schema
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_INVOKE = re.compile(r'\s*<invoke name="([^"\n]+)">(.*?)</invoke>', re.DOTALL)
_NAMED = re.compile(r'\s*<parameter name="([^"\n]+)">(.*?)</parameter>', re.DOTALL)
_KIMI = re.compile(
    r"\s*<\|tool_call_begin\|>\s*([^\s<]+?)\s*<\|tool_call_argument_begin\|>"
    r"((?:\"(?:[^\"\\]|\\.)*\"|[^\"])*?)<\|tool_call_end\|>",  # but not within a string
    re.DOTALL,
)
_KIMI_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str  # JSON, as the model wrote it where it writes JSON: the next turn renders to the same tokens
    id: str | None = None  # where the model gives one


Calls = list[ParsedCall] | None  # None: this is no well-formed call


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A section of calls: `begin`, what `read` takes, `end`."""

    name: str
    begin: str  # empty: the answer itself, where it begins with a brace
    end: str  # empty: the end of the answer
    read: Callable[[str, Types], Calls]
    inner: tuple[str, ...] = ()  # other marks that may be tokens without text

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.begin, self.end, *self.inner)))


def json_calls(text: str, types: Types) -> Calls:
    """Objects with a name and arguments: one, several one after the other, or a list of them."""
    decoder, place, calls = json.JSONDecoder(), 0, list[ParsedCall]()
    text = text.strip()
    try:
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            if isinstance(value, list):
                calls += _of_list(text, place, end, value)
            else:
                calls.append(_json_call(value, text[place:end]))
            place = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n,;"))
    except (ValueError, RecursionError):
        return None
    return calls or None


def _of_list(text: str, start: int, end: int, values: list[object]) -> Iterator[ParsedCall]:
    """The same for a list, each with its own text. Raises ValueError."""
    decoder, place = json.JSONDecoder(), start + 1
    for value in values:
        place += len(text[place:end]) - len(text[place:end].lstrip(" \t\r\n,"))
        _, stop = decoder.raw_decode(text, place)
        yield _json_call(value, text[place:stop])
        place = stop


def _json_call(call: object, text: str) -> ParsedCall:
    """Raises ValueError unless it has a name."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("no call")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        return ParsedCall(call["name"], arguments)
    for match in _ARGUMENTS.finditer(text):
        value, end = json.JSONDecoder().raw_decode(text, match.end())
        if value == arguments:
            return ParsedCall(call["name"], text[match.end() : end])
    return ParsedCall(call["name"], json.dumps(arguments, ensure_ascii=False))


def _tagged(function: re.Pattern[str], parameter: re.Pattern[str]) -> Callable[[str, Types], Calls]:
    """Functions in tags, and in them parameters in tags, whose text is a value of the type that the schema names."""

    def read(text: str, types: Types) -> Calls:
        calls = list[ParsedCall]()
        for name, body in _whole(function, text):
            of_tool = types.get(name.strip(), {})
            values = {key.strip(): _typed(value, of_tool.get(key.strip())) for key, value in _whole(parameter, body)}
            calls.append(ParsedCall(name.strip(), json.dumps(values, ensure_ascii=False)))
        return calls or None

    def checked(text: str, types: Types) -> Calls:
        try:
            return read(text, types)
        except ValueError:
            return None

    return checked


def _whole(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """All matches, one after the other. Raises ValueError if there is anything else."""
    place = 0
    while text[place:].strip():
        match = pattern.match(text, place)
        if match is None:
            raise ValueError("no call")
        yield match[1], match[2]
        place = match.end()


def _typed(text: str, schema: object) -> object:
    """A parameter's value from its text, of which a line break at either end is layout."""
    text = text.removeprefix("\n").removesuffix("\n")
    kinds = schema.get("type") if isinstance(schema, dict) else None
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def python_calls(text: str, types: Types) -> Calls:
    """A list of calls with keyword arguments, as Python has them."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(call) for call in calls] or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_call(call: ast.expr) -> ParsedCall:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("no call")
    values = {str(keyword.arg): _python_value(keyword.value) for keyword in call.keywords}
    return ParsedCall(ast.unparse(call.func), json.dumps(values, ensure_ascii=False))


def _python_value(node: ast.expr) -> object:
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_python_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return {str(ast.literal_eval(k or node)): _python_value(v) for k, v in zip(keys, values, strict=True)}
    value: object = ast.literal_eval(node)
    if isinstance(value, bytes | complex | set) or value is Ellipsis:
        raise ValueError("no JSON")
    return value


def kimi_calls(text: str, types: Types) -> Calls:
    """An id, which holds the name, and arguments in JSON."""
    try:
        found = [(call_id, arguments.strip()) for call_id, arguments in _whole(_KIMI, text)]
        for _, arguments in found:
            json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    names = (_KIMI_ID.fullmatch(call_id) for call_id, _ in found)
    return [
        ParsedCall(name[1] if name else i, arguments, i) for name, (i, arguments) in zip(names, found, strict=True)
    ] or None


FORMATS = {
    each.name: each
    for each in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>", json_calls),  # Qwen, Granite-4, Falcon-H1
        ToolFormat("qwen3_coder", "<tool_call>", "</tool_call>", _tagged(_FUNCTION, _PARAMETER)),  # and Nemotron-3
        ToolFormat("jamba", "<tool_calls>", "</tool_calls>", json_calls),  # and MiniMax-M1
        ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>", json_calls),
        ToolFormat("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", python_calls),
        ToolFormat("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", _tagged(_INVOKE, _NAMED)),
        ToolFormat(
            "kimi",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            kimi_calls,
            ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
        ToolFormat("llama3", "", "", json_calls, ("<|python_tag|>",)),
    )
}
DEFAULT = FORMATS["hermes"]
_SHOWN_BY = (  # what a template has in it, the most telling first
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("<TOOLCALL>", "nemotron"),
    ("<tool_calls>", "jamba"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3"),
    ("<|start_header_id|>", "llama3"),
)


def format_of(sources: Iterable[str], forced: str | None = None) -> ToolFormat:
    """What a model writes calls in, by its chat templates. Raises ConfigError for a forced one that is unknown."""
    if forced is not None:
        if forced not in FORMATS:
            raise ConfigError(f"tool_parser is {forced!r}, must be one of {', '.join(FORMATS)}")
        return FORMATS[forced]
    text = "\n".join(sources)
    return next((FORMATS[name] for mark, name in _SHOWN_BY if mark in text), DEFAULT)


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """What stands around the thoughts of an answer."""

    begin: str = "<think>"
    end: str = "</think>"


def thoughts_of(sources: Iterable[str]) -> ThoughtFormat | None:
    """None for a model whose template knows of no thoughts."""
    known = ThoughtFormat()
    return known if any(known.end in source or known.begin in source for source in sources) else None
