"""Characters that mark places in rendered text, and those that a client wrote.

What a client wrote may look like a special token, such as the one that ends a message, by itself or together with what
a template writes around it. So the characters of which special tokens are made are replaced by stand-ins wherever a
client wrote them: one for one, so that templates can measure, cut and join text as ever. In the rendered text they
become what they were, and what holds one of them is no special token.

Marks and stand-ins are Unicode noncharacters, which no text holds; one that a client sends all the same is quoted.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PART = "\ufdd0"  # the end of a part of a message
LOOP = "\ufdd1"  # where the template begins a message, or is done with a loop over them
QUOTE = "\ufdd2"  # the next character is the client's, and no mark
MADE_OF = "<>|[]{}()#@$*=~^%&!\\`:;\uff5c\u2581\xab\xbb\u3010\u3011"  # at most 29
STAND_INS = {character: chr(0xFDD3 + i) for i, character in enumerate(MADE_OF)}

_CHARACTERS = {stand_in: character for character, stand_in in STAND_INS.items()}
_MARK = re.compile("[\ufdd0-\ufdef]")
_PLACE = re.compile(f"{QUOTE}(.)|[\ufdd0-\ufdef]", re.DOTALL)
_ALL = str.maketrans(STAND_INS)


@dataclass(frozen=True, slots=True)
class MarkedText:
    """Text without marks, and where they were, in characters before them."""

    text: str
    parts: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()  # characters that had a stand-in, or were quoted


def read_marks(raw: str) -> MarkedText:
    """Takes the marks out of text."""
    if not _MARK.search(raw):
        return MarkedText(raw)
    places: dict[str, list[int]] = {PART: [], LOOP: [], QUOTE: []}
    pieces, length, done = list[str](), 0, 0
    for found in _PLACE.finditer(raw):
        mark = found[0][0]
        pieces += (raw[done : found.start()], found[1] or _CHARACTERS.get(mark, ""))
        length += found.start() - done
        places[mark if mark in places else QUOTE].append(length)
        length += len(pieces[-1])
        done = found.end()
    pieces.append(raw[done:])
    return MarkedText("".join(pieces), *(tuple(places[mark]) for mark in (PART, LOOP, QUOTE)))


def shown(value: object) -> str:
    """A list or an object as Python prints it, in which all is the client's."""
    return _MARK.sub(rf"{QUOTE}\g<0>", repr(_plain(value))).translate(_ALL)


def _plain(value: object) -> object:
    if isinstance(value, str):
        return read_marks(value).text
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return [_plain(item) for item in value] if isinstance(value, list) else value


class Quoting:
    """Makes what clients write safe to render."""

    def __init__(self, tokens: Iterable[str], *, wherever: bool = True) -> None:
        """tokens: those that are text where a client writes them
        wherever: also if a template makes them of several things; else only where they are whole
        """
        tokens = sorted(filter(None, tokens), key=len, reverse=True)
        made_of = {character for token in tokens for character in token if character in STAND_INS}
        plain = [token for token in tokens if not wherever or made_of.isdisjoint(token)]
        self._tokens = _any_of(tokens)
        self._whole = _any_of(plain)
        self._characters = _any_of(made_of) if wherever else None

    def text(self, text: str) -> str:
        text = _MARK.sub(rf"{QUOTE}\g<0>", text)
        if self._whole is not None:
            text = self._whole.sub(lambda found: _whole(found[0]), text)
        return self._characters.sub(lambda found: STAND_INS[found[0]], text) if self._characters else text

    def value(self, value: object) -> object:
        """The same for all text in JSON, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.value(item) for item in value]
        return value

    def num_tokens(self, text: str) -> int:
        """How many tokens a text without clients' characters holds."""
        return len(self._tokens.findall(text)) if self._tokens else 0

    def literals(self, text: str, clients: Sequence[int]) -> list[tuple[int, int]]:
        """Spans of rendered text that look like tokens, and hold characters of a client."""
        if self._tokens is None or not clients:
            return []
        spans = [found.span() for found in self._tokens.finditer(text)]
        return [
            (start, end)
            for start, end in spans
            if (i := bisect_left(clients, start)) < len(clients) and clients[i] < end
        ]


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = list(map(re.escape, texts))
    return re.compile("|".join(alternatives)) if alternatives else None


def _whole(token: str) -> str:
    """A token in which some character is marked as the client's."""
    replaced = token.translate(_ALL)
    return replaced if replaced != token else QUOTE + token
