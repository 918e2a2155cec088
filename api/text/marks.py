"""Characters that mark places in rendered text.

They are Unicode noncharacters, which no text holds; one that a client sends all the same is quoted, and comes back as
it was. What a client wrote may look like a special token, such as the one that ends a message: between marks it is
text, and is tokenised as text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PART = "\ufdd0"  # the end of a part of a message
LOOP = "\ufdd1"  # where the template begins a message, or is done with a loop over them
LITERAL, END_OF_LITERAL = "\ufdd2", "\ufdd3"  # around what a client wrote and what is no special token
QUOTE = "\ufdd4"  # the next character is no mark
MARKS = PART + LOOP + LITERAL + END_OF_LITERAL + QUOTE

_MARK = re.compile(f"[{MARKS}]")
_PLACE = re.compile(f"{QUOTE}(.)|[{MARKS}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MarkedText:
    """Text without marks, and where they were, in characters before them."""

    text: str
    parts: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()
    literals: tuple[tuple[int, int], ...] = ()  # spans


def read_marks(raw: str) -> MarkedText:
    """Takes the marks out of text."""
    if not _MARK.search(raw):
        return MarkedText(raw)
    places: dict[str, list[int]] = {mark: [] for mark in MARKS}
    literals = list[tuple[int, int]]()
    pieces, length, done, opened = list[str](), 0, 0, -1
    for found in _PLACE.finditer(raw):
        pieces.append(raw[done : found.start()] + (found[1] or ""))
        length += len(pieces[-1])
        done = found.end()
        mark = found[0][0]
        places[mark].append(length)
        if mark == LITERAL:
            opened = length
        elif mark == END_OF_LITERAL and opened >= 0:  # else the template has cut the rest out
            literals.append((opened, length))
            opened = -1
    pieces.append(raw[done:])
    return MarkedText("".join(pieces), tuple(places[PART]), tuple(places[LOOP]), tuple(literals))


class Quoting:
    """Makes what clients write safe to render: it holds neither marks nor special tokens."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        """special_tokens: those that are text where a client writes them; none to leave them what they are"""
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def text(self, text: str) -> str:
        text = _MARK.sub(rf"{QUOTE}\g<0>", text)
        return self._special.sub(rf"{LITERAL}\g<0>{END_OF_LITERAL}", text) if self._special else text

    def value(self, value: object) -> object:
        """The same for all text in JSON, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.value(item) for item in value]
        return value
