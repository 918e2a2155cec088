"""Text that comes in pieces, and is read as if it were there: a reader is a generator that waits where text is missing.

A reader yields None to wait for more text, and what it has found otherwise. How the text was cut into pieces changes
neither what is found nor where a reader stops.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]  # returns T
Pieces = Generator[str | None, None, None]
_SPACE = re.compile(r"[ \t\r\n]+")


class Broken(Exception):
    """What comes is not of the form; the text is read up to there."""


class Ended(Broken):
    """All text has come, and the form is not complete."""


class Marks:
    """Strings that are looked for; the longest of several at one place."""

    def __init__(self, *marks: str) -> None:
        self._marks = sorted(filter(None, marks), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self._marks)) or "(?!)")

    def begun(self, text: str, place: int) -> int:
        """How many of the last characters of `text[place:]` may be the first of a mark."""
        return max((_beginning(text, place, mark) for mark in self._marks), default=0)


@lru_cache(64)
def marks_of(*marks: str) -> Marks:
    return Marks(*marks)


def _beginning(text: str, place: int, mark: str) -> int:
    most = min(len(mark) - 1, len(text) - place)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)


class Incoming:
    """Each character is looked at a bounded number of times: reading takes linear time, however small the pieces."""

    def __init__(self) -> None:
        self._text = ""
        self._place = 0  # what is before it has been read
        self._ended = False
        self._records: list[list[str]] = []

    def feed(self, text: str) -> None:
        self._text, self._place = self._text[self._place :] + text, 0

    def end(self) -> None:
        """No more text will come."""
        self._ended = True

    @property
    def unread(self) -> bool:
        """Whether there is text that waits for more."""
        return self._place < len(self._text)

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """Collects all that is read meanwhile."""
        record: list[str] = []
        self._records.append(record)
        try:
            yield record
        finally:
            self._records = [other for other in self._records if other is not record]

    def take(self, count: int = 1) -> str:
        """Reads characters that are known to be there."""
        piece = self._text[self._place : self._place + count]
        self._place += count
        for record in self._records:
            record.append(piece)
        return piece

    def take_run(self, pattern: re.Pattern[str]) -> str:
        """What matches of the text that is there; may be empty."""
        match = pattern.match(self._text, self._place)
        return self.take(match.end() - self._place) if match else ""

    def take_mark(self, marks: Marks) -> str:
        """The mark that `before` or `until` has come to; empty at the end of the text."""
        return self.take_run(marks.pattern)

    def rest(self) -> str:
        """All that is there."""
        return self.take(len(self._text) - self._place)

    def peek(self) -> Waiting[str]:
        """The next character, which stays; empty at the end of the text."""
        while self._place == len(self._text):
            if self._ended:
                return ""
            yield None
        return self._text[self._place]

    def char(self) -> Waiting[str]:
        """The next character, which stays. Raises Ended."""
        return (yield from self.peek()) or self._raise_ended()

    def ahead(self, count: int) -> Waiting[str]:
        """The next few characters, which stay. Raises Ended."""
        while len(self._text) - self._place < count:
            if self._ended:
                self._raise_ended()
            yield None
        return self._text[self._place : self._place + count]

    def at(self, mark: str) -> Waiting[bool]:
        """Whether a mark comes next; it stays. Raises Ended if the text ends before that is certain."""
        while True:
            if self._text.startswith(mark, self._place):
                return True
            if not mark.startswith(self._text[self._place : self._place + len(mark)]):
                return False
            if self._ended:
                self._raise_ended()
            yield None

    def literal(self, *options: str) -> Waiting[str]:
        """Reads one of some strings. Raises Broken."""
        for option in options:
            if (yield from self.at(option)):
                return self.take(len(option))
        raise Broken

    def run(self, pattern: re.Pattern[str]) -> Pieces:
        """All that follows of what a pattern matches, which is a class of characters."""
        while (yield from self.peek()) and (piece := self.take_run(pattern)):
            yield piece

    def word(self, pattern: re.Pattern[str]) -> Waiting[str]:
        """The same as one string. Raises Broken where it is empty."""
        if not (found := (yield from joined(self.run(pattern)))):
            raise Broken
        return found

    def spaces(self) -> Waiting[str]:
        return joined(self.run(_SPACE))

    def before(self, marks: Marks) -> Pieces:
        """All that stands before the first of the marks, or before the end of the text."""
        try:
            yield from self.until(marks)
        except Ended:
            if self.unread:
                yield self.rest()

    def until(self, marks: Marks) -> Pieces:
        """All that stands before the first of the marks. Raises Ended if none comes."""
        while not (found := marks.pattern.search(self._text, self._place)):
            if count := len(self._text) - self._place - marks.begun(self._text, self._place):
                yield self.take(count)
            if self._ended:
                raise Ended
            yield None
        if count := found.start() - self._place:
            yield self.take(count)

    def _raise_ended(self) -> str:
        raise Ended


def joined(pieces: Pieces) -> Waiting[str]:
    """What pieces are together."""
    found: list[str] = []
    for piece in pieces:
        if piece is None:
            yield None
        else:
            found.append(piece)
    return "".join(found)
