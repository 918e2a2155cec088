"""What an answer consists of, found as its text comes: text, thoughts and tool calls, in linear time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid_cache.api.text.tool_formats import ParsedCall, ThoughtFormat, ToolFormat, Types

MOST_MARKS_WITHIN = 64  # end marks in one section: each has all of it read again
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


Item = str | Thought | ParsedCall


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an answer is read. tools: None where calls are text; thinking: it begins within a thought"""

    tools: ToolFormat | None = None
    types: Types = field(default_factory=dict)
    thoughts: ThoughtFormat | None = None
    thinking: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them, which may be tokens that otherwise have no text."""
        of_thoughts = (self.thoughts.begin, self.thoughts.end) if self.thoughts else ()
        return (*of_thoughts, *(self.tools.marks if self.tools else ()))


class MarkFinder:
    """Looks for marks in text that comes in pieces. Holds back what may be the beginning of one."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(filter(None, marks))
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Takes text -> what comes before the first mark or is certain to be none, the mark, what follows it."""
        text, self.held = self.held + text, ""
        found = [(place, mark) for mark in self._marks if (place := text.find(mark)) >= 0]
        if found:
            place, mark = min(found, key=lambda each: (each[0], -len(each[1])))
            return text[:place], mark, text[place + len(mark) :]
        keep = max((_beginning(text, mark) for mark in self._marks), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None, ""


def ends_in_string(text: str) -> bool:
    """Whether a string of JSON is open where a text ends."""
    return '"' in _STRING.sub("", text)


def _beginning(text: str, mark: str) -> int:
    """How many of the last characters of a text may be the first of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class AnswerParser:
    """Text in, items out. A section that is no well-formed call, or is never closed, stays text."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._section: list[str] | None = None  # of calls, while it is open
        self._thinking = form.thinking and form.thoughts is not None
        self._layout = ""  # characters that are dropped before the next text
        self._called = False
        self._marks_within = 0  # that turned out to stand in a string of the section
        self._finder = self._new_finder()
        bare = form.tools is not None and not form.tools.begin
        self._undecided: list[str] | None = [] if bare else None  # the answer may be a call as a whole

    def push(self, text: str) -> list[Item]:
        """Takes text -> what is now certain, in order."""
        if self._undecided is not None:
            text = self._decide(text)
        found: list[Item] = []
        while True:
            before, mark, text = self._finder.push(text)
            self._take(before, found)
            if mark is None:
                return found
            self._turn(mark, found)

    def finish(self) -> list[Item]:
        """What was held back."""
        found: list[Item] = []
        if self._undecided is not None:
            self._take("".join(self._undecided), found)
        held, self._finder.held = self._finder.held, ""
        self._take(held, found)
        if self._section is None:
            return found
        text, tools = "".join(self._section), self._form.tools
        self._section = None
        assert tools is not None
        calls = tools.read(text, self._form.types) if not tools.end else None
        return [*found, *calls] if calls else [*found, tools.begin + text]

    def _decide(self, text: str) -> str:
        """An answer that begins with a brace, with the mark of code before it or not, may be a call to its end.

        -> what is now certain
        """
        assert self._undecided is not None
        self._undecided.append(text)
        whole = "".join(self._undecided).lstrip()
        bare = whole.removeprefix("<|python_tag|>").lstrip()
        if not bare or (whole.startswith("<|") and _beginning(whole, "<|python_tag|>") == len(whole)):
            return ""
        self._undecided = None
        if bare.startswith("{"):
            self._section, self._finder = [], MarkFinder(())
            return bare
        return whole

    def _new_finder(self) -> MarkFinder:
        form = self._form
        if self._thinking:
            assert form.thoughts is not None
            return MarkFinder((form.thoughts.end,))
        if self._section is not None:
            assert form.tools is not None
            return MarkFinder((form.tools.end,))
        return MarkFinder((form.thoughts.begin if form.thoughts else "", form.tools.begin if form.tools else ""))

    def _turn(self, mark: str, found: list[Item]) -> None:
        """A mark has come: another section begins."""
        form = self._form
        if form.thoughts is not None and mark in (form.thoughts.begin, form.thoughts.end):
            self._thinking, self._layout = mark == form.thoughts.begin, "\n"
        elif self._section is None:
            self._section = []
        else:
            assert form.tools is not None
            text = "".join(self._section)
            calls = form.tools.read(text, form.types)
            if calls is None and self._marks_within < MOST_MARKS_WITHIN and ends_in_string(text):
                self._section, self._marks_within = [text + mark], self._marks_within + 1
                return
            self._section, self._marks_within = None, 0
            self._called = self._called or calls is not None
            if calls is None:
                self._say(form.tools.begin + text + form.tools.end, found)
            else:
                found += calls
        self._finder = self._new_finder()

    def _take(self, text: str, found: list[Item]) -> None:
        if not text:
            return
        if self._section is not None:
            self._section.append(text)
            return
        text = text.lstrip(self._layout) if self._layout else text
        if not text:
            return
        self._layout = ""
        if self._thinking:
            found.append(Thought(text))
        else:
            self._say(text, found)

    def _say(self, text: str, found: list[Item]) -> None:
        """Space around calls is layout, not an answer."""
        if not (self._called and text.isspace()):
            found.append(text)
