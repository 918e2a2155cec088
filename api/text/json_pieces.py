"""Values as pieces of JSON while they come: JSON itself, and the literals of Python.

What is yielded is at any time the beginning of a JSON value that any client can load: scalars come whole, numbers are
such as a double can hold, surrogates in pairs, and control characters escaped. Space and spelling are otherwise as the
model has them.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass

from hybrid_cache.api.text.incoming import Broken, Incoming, Pieces, Waiting, joined

MOST_DEPTH = 128  # brackets within brackets
MOST_DIGITS = 400  # characters of a number
LOST = "\\ufffd"  # what stands for half a character
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_PYTHON_PLAIN = re.compile(r"[^\\'\"]+|['\"]")
_SCALAR = re.compile(r"[\w.+-]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_HEX = re.compile(r"[0-9a-fA-F]+")
_HIGH = re.compile(r"\\u[dD][89abAB]..")
_LOW = re.compile(r"\\u[dD][c-fC-F]..")
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_LISTS = {"(": "[", ")": "]"}  # a tuple is a list in JSON
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_ESCAPES = {"\n": "", "0": "\0", "a": "\a", "v": "\v", "'": "'", "/": "/"}
_LENGTHS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class Syntax:
    """How values are written."""

    brackets: str
    quotes: str
    string: Callable[[Incoming], Pieces]
    scalar: Callable[[str], str]  # a word as JSON. Raises ValueError


def value(text: Incoming, syntax: Syntax) -> Pieces:
    """One value. Raises Broken. A comma before a closing bracket is left out."""
    closers: list[str] = []  # of what is open
    while True:
        if opened := (yield from text.char()) in syntax.brackets:
            if len(closers) == MOST_DEPTH:
                raise Broken
            bracket = text.take()
            closers.append(_CLOSING[bracket])
            yield _LISTS.get(bracket, bracket)
        else:
            yield from _atom(text, syntax)
        more = False
        while closers and not more:
            said, more = yield from goes_on(text, closers[-1], first=opened)
            yield said
            if not more:
                closers.pop()
            opened = False
        if not closers:
            return
        if closers[-1] == "}":
            yield from _key(text, syntax)


def goes_on(text: Incoming, closer: str, *, first: bool) -> Waiting[tuple[str, bool]]:
    """What stands before the next item of what is open, or its end -> that, and whether there is another item."""
    said = yield from text.spaces()
    at = yield from text.char()
    if at == "," and not first:
        comma = text.take() + (yield from text.spaces())
        at = yield from text.char()
        if at != closer:
            return said + comma, True
    elif at != closer:
        if not first:
            raise Broken
        return said, True
    text.take()
    return said + _LISTS.get(closer, closer), False


def _key(text: Incoming, syntax: Syntax) -> Pieces:
    if (yield from text.char()) in syntax.quotes:
        yield from syntax.string(text)
    else:
        yield f'"{yield from _scalar(text, syntax)}"'
    yield (yield from text.spaces()) + (yield from text.literal(":")) + (yield from text.spaces())


def _atom(text: Incoming, syntax: Syntax) -> Pieces:
    if (yield from text.char()) in syntax.quotes:
        yield from syntax.string(text)
    else:
        yield (yield from _scalar(text, syntax))


def _scalar(text: Incoming, syntax: Syntax) -> Waiting[str]:
    word = yield from joined(text.run(_SCALAR))
    yield from text.char()  # that ends it
    try:
        return syntax.scalar(word)
    except ValueError:
        raise Broken from None


def json_string(text: Incoming) -> Pieces:
    """A string with its quotes; each piece is of whole characters."""
    yield text.take()
    yield from _paired(_json_characters(text))
    yield text.take()


def _json_characters(text: Incoming) -> Pieces:
    while (at := (yield from text.char())) != '"':
        if at == "\\":
            yield from _json_escape(text)
        elif at < " ":
            yield json.dumps(text.take())[1:-1]
        else:
            yield text.take_run(_PLAIN)


def _json_escape(text: Incoming) -> Pieces:
    kind = (yield from text.ahead(2))[1]
    if kind == "u":
        yield from _hexadecimal(text, 4)
    elif kind not in '"\\/bfnrt':
        raise Broken
    yield text.take(6 if kind == "u" else 2)


def _hexadecimal(text: Incoming, count: int) -> Waiting[int]:
    """The number of an escape, which stays."""
    digits = (yield from text.ahead(2 + count))[2:]
    if not _HEX.fullmatch(digits):
        raise Broken
    return int(digits, 16)


def _paired(pieces: Pieces) -> Pieces:
    """Escapes of surrogates that have no partner become U+FFFD; pairs come in one piece."""
    high = ""
    for piece in pieces:
        if piece is None:
            yield None
            continue
        low = _LOW.fullmatch(piece) is not None
        if high and not low:
            yield LOST
        if low:
            yield high + piece if high else LOST
        high = piece if _HIGH.fullmatch(piece) else ""
        if not high and not low:
            yield piece
    if high:
        yield LOST


def _json_scalar(word: str) -> str:
    if word in ("true", "false", "null"):
        return word
    if not _NUMBER.fullmatch(word):
        raise ValueError(word)
    number = float(word)
    if math.isinf(number) or len(word) > MOST_DIGITS:
        return repr(max(-sys.float_info.max, min(number, sys.float_info.max)))
    return word


def python_string(text: Incoming) -> Pieces:
    """A string of Python, with one quote or three at each end."""
    closing = text.take()
    if (yield from text.at(closing)):
        text.take()
        if not (yield from text.at(closing)):
            yield '""'
            return
        closing = text.take() * 3
    yield '"'
    yield from _paired(_python_characters(text, closing))
    text.take(len(closing))
    yield '"'


def _python_characters(text: Incoming, closing: str) -> Pieces:
    while not (yield from text.at(closing)):
        if (yield from text.char()) == "\\":
            yield from _python_escape(text)
        else:
            yield json.dumps(text.take_run(_PYTHON_PLAIN), ensure_ascii=False)[1:-1]


def _python_escape(text: Incoming) -> Pieces:
    """Those of JSON mean the same in Python; one that neither knows is the text that it is."""
    kind = (yield from text.ahead(2))[1]
    if kind in _LENGTHS:
        code = yield from _hexadecimal(text, _LENGTHS[kind])
        if code > 0x10FFFF:
            raise Broken
        text.take(2 + _LENGTHS[kind])
        yield json.dumps(chr(code))[1:-1]
    elif kind in '"\\bfnrt':
        yield text.take(2)
    else:
        escape = text.take(2)
        yield json.dumps(_PYTHON_ESCAPES.get(kind, escape), ensure_ascii=False)[1:-1]


def _python_scalar(word: str) -> str:
    if word in _CONSTANTS or word in _CONSTANTS.values():
        return _CONSTANTS.get(word, word)
    try:
        return _json_scalar(str(int(word, 0)))
    except ValueError:
        number = float(word)
        return _json_scalar(word if math.isinf(number) else json.dumps(number))


JSON = Syntax("{[", '"', json_string, _json_scalar)
PYTHON = Syntax("{[(", "\"'", python_string, _python_scalar)


def json_or_none(said: str) -> str | None:
    """A text as JSON, if it is that as a whole."""
    text = Incoming()
    text.feed(said.strip() + " ")  # which ends a number
    text.end()
    try:
        found = "".join(piece for piece in value(text, JSON) if piece)
    except Broken:
        return None
    return None if text.rest().strip() else found


def quoted_object(text: Incoming) -> Pieces:
    """An object that is written as JSON in a string of JSON, or nothing in one. Raises Broken behind the string."""
    inner = Incoming()
    reading = _object_alone(inner)
    broken = False
    for piece in json_string(text):
        if piece is None:
            yield None
        elif piece != '"' and not broken:
            inner.feed(json.loads(f'"{piece}"'))
            broken = yield from _certain(reading)
    inner.end()
    if broken or (yield from _certain(reading)):
        raise Broken


def _certain(reading: Pieces) -> Generator[str, None, bool]:
    """What a reader finds before it waits for more text -> whether it has broken."""
    try:
        for piece in reading:
            if piece is None:
                return False
            yield piece
    except Broken:
        return True
    return False


def _object_alone(text: Incoming) -> Pieces:
    """Its last brace comes when nothing follows: what has come is no object before it is certain to be one."""
    yield from text.spaces()
    at = yield from text.peek()
    if at not in ("{", ""):
        raise Broken
    if not at:
        yield "{}"
        return
    last = ""
    for piece in value(text, JSON):
        if piece is None:
            yield None
            continue
        said = last + piece
        last = "}" if said.endswith("}") else ""
        yield said.removesuffix("}")
    yield from text.spaces()
    if (yield from text.peek()):
        raise Broken
    yield last
