"""How one tool call is read in each form: its name first, then its arguments as pieces of JSON while they come."""

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid_cache.api.text.incoming import Broken, Ended, Incoming, Pieces, Waiting, joined, marks_of
from hybrid_cache.api.text.json_pieces import JSON, PYTHON, goes_on, json_or_none, json_string, quoted_object, value

Types = Mapping[str, Mapping[str, object]]  # tool -> parameter -> its JSON schema; a tool without any is there, too
PYTHON_NAME = re.compile(r"[^\s()\[\]{},'\"=<>]+")
KEYWORD = re.compile(r"[^()\[\]{},'\"=]+")
KIMI_ID = re.compile(r"[^\s<]+")
_KIMI_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call whose arguments follow."""

    name: str
    id: str | None = None  # where the model gives one


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that has begun: JSON, as the model wrote it where it writes JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDone:
    """The end of a call. complete: its arguments are an object; else they are only the beginning of one"""

    complete: bool


CallItem = CallBegun | Arguments | CallDone
Calls = Generator[CallItem | None, None, None]
ReadCall = Callable[[Incoming, Types], Calls]


def call_of(tools: Types, name: str, call_id: str | None, arguments: Pieces) -> Calls:
    """A call to a tool that is there begins with its arguments; any other is held back until it is whole."""
    begun = False
    if name not in tools:
        arguments = _whole((yield from joined(arguments)))
    try:
        for piece in arguments:
            if piece and not begun:
                begun = True
                yield CallBegun(name, call_id)
            if piece is None or piece:
                yield None if piece is None else Arguments(piece)
    except Broken:
        if begun:
            yield CallDone(False)
        raise
    yield CallDone(True)


def _whole(text: str) -> Pieces:
    yield text


def json_call(text: Incoming, tools: Types) -> Calls:
    """An object with a name and arguments: these come while they are written if the name stands before them."""
    yield from text.literal("{")
    name, held, done, first = "", "", False, True
    while (yield from goes_on(text, "}", first=first))[1]:
        first = False
        key = yield from _string(text)
        yield from _around(text, ":")
        if key == "name" and not name:
            name = yield from _string(text)
        elif key not in ("arguments", "parameters") or held or done:
            yield from joined(value(text, JSON))
        elif not name:
            held = yield from joined(_arguments(text))
        else:
            done = True
            yield from call_of(tools, name, None, _arguments(text))
    if not (name or done):
        raise Broken
    if not done:
        yield from call_of(tools, name, None, _whole(held or "{}"))


def _string(text: Incoming) -> Waiting[str]:
    if (yield from text.char()) != '"':
        raise Broken
    return str(json.loads((yield from joined(json_string(text)))))


def _around(text: Incoming, mark: str) -> Waiting[None]:
    """A mark with space around it."""
    yield from text.spaces()
    yield from text.literal(mark)
    yield from text.spaces()


def _arguments(text: Incoming) -> Pieces:
    at = yield from text.char()
    if at == "{":
        yield from value(text, JSON)
    elif at == '"':
        yield from quoted_object(text)
    else:
        yield from text.literal("null")
        yield "{}"


def kimi_call(begin: str, argument: str, end: str) -> ReadCall:
    """An id, which holds the name, and arguments in JSON."""

    def read(text: Incoming, tools: Types) -> Calls:
        yield from _around(text, begin)
        call_id = yield from text.word(KIMI_ID)
        yield from _around(text, argument)
        if (yield from text.char()) != "{":
            raise Broken
        name = _KIMI_NAME.fullmatch(call_id)
        yield from call_of(tools, name[1] if name else call_id, call_id, value(text, JSON))
        yield from text.spaces()
        yield from text.literal(end)

    return read


def python_call(text: Incoming, tools: Types) -> Calls:
    """A function with keyword arguments, as Python has them."""
    name = yield from text.word(PYTHON_NAME)
    yield from _around(text, "(")
    yield from call_of(tools, name, None, _keywords(text))


def _keywords(text: Incoming) -> Pieces:
    before = "{"
    while (yield from text.char()) != ")":
        key = yield from text.word(KEYWORD)
        yield from text.literal("=")
        yield from text.spaces()
        yield f"{before}{_quoted(key.strip())}: "
        before = ", "
        yield from value(text, PYTHON)
        yield from text.spaces()
        if (yield from text.char()) != ")":
            yield from _around(text, ",")
    text.take()
    yield "{}" if before == "{" else "}"


def _quoted(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Tags:
    """Functions in tags, and in them parameters in tags, whose text is a value of a type that the schema allows."""

    function: str  # before its name
    function_end: str
    parameter: str
    parameter_end: str
    close: str  # behind either name
    layout: str = ""  # at either end of a value, not of it

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.layout + self.parameter_end, self.parameter_end)

    def read(self, text: Incoming, tools: Types) -> Calls:
        """See `ReadCall`."""
        yield from text.literal(self.function)
        name = yield from self._name(text)
        yield from call_of(tools, name, None, self._parameters(text, tools.get(name, {})))

    def _name(self, text: Incoming) -> Waiting[str]:
        name = yield from text.word(NAMES[self.close])
        yield from text.literal(self.close)
        return name.strip()

    def _parameters(self, text: Incoming, schemas: Mapping[str, object]) -> Pieces:
        before = "{"
        while True:
            yield from text.spaces()
            if (yield from text.literal(self.parameter, self.function_end)) == self.function_end:
                break
            name = yield from self._name(text)
            yield f"{before}{_quoted(name)}: "
            before = ", "
            if (yield from text.at(self.layout)):
                text.take(len(self.layout))
            kinds = kinds_of(schemas.get(name))
            yield from self._text(text, "null" in kinds) if "string" in kinds else self._typed(text)
        yield "{}" if before == "{" else "}"

    def _text(self, text: Incoming, nullable: bool) -> Pieces:
        """Text as it is, which comes while it is written."""
        for end in self.ends if nullable else ():
            if (yield from text.at(f"null{end}")):
                text.take(len(f"null{end}"))
                yield "null"
                return
        yield '"'
        for piece in text.until(marks_of(*self.ends)):
            yield piece and _quoted(piece)[1:-1]
        text.take_mark(marks_of(*self.ends))
        yield '"'

    def _typed(self, text: Incoming) -> Pieces:
        """JSON, within which a mark ends nothing; what is no JSON is text."""
        with text.recorded() as said:
            yield from text.spaces()
            if (yield from text.char()) in JSON.brackets:
                yield from _as_far_as(value(text, JSON))
            yield from joined(text.until(marks_of(*self.ends)))
            whole = "".join(said)
        if text.take_mark(marks_of(*self.ends)) == self.parameter_end:
            whole = whole.removesuffix(self.layout)  # which may have been read as space
        yield json_or_none(whole) or _quoted(whole)


NAMES = {">": re.compile(r"[^>\n]+"), '">': re.compile(r'[^"\n]+')}


def _as_far_as(pieces: Pieces) -> Waiting[None]:
    """Reads what is well-formed. Raises Ended."""
    try:
        yield from joined(pieces)
    except Ended:
        raise
    except Broken:
        return


def kinds_of(schema: object, depth: int = 4) -> frozenset[str]:
    """Types of JSON that a schema allows, as far as it says so."""
    if not isinstance(schema, dict) or not depth:
        return frozenset()
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    said = frozenset(kind for kind in kinds if isinstance(kind, str))
    if (values := values_of(schema)) is not None:
        found = frozenset("string" if isinstance(each, str) else "null" if each is None else "other" for each in values)
        return found - ({"string", "null"} - said if said else frozenset())
    if named:
        return said
    return frozenset(kind for branch in branches_of(schema) for kind in kinds_of(branch, depth - 1))


def values_of(schema: Mapping[str, object]) -> Sequence[object] | None:
    """The only ones that a schema allows, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def branches_of(schema: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Schemas of which a value has to be of one."""
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        yield from (each for each in (branches if isinstance(branches, list) else ()) if isinstance(each, dict))
