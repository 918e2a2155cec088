"""What an answer consists of, found as its text comes: text, thoughts and tool calls, in linear time."""

from collections.abc import Generator
from dataclasses import dataclass, field

from hybrid_cache.api.text.call_readers import Arguments, CallBegun, CallDone, CallItem, Calls, Types
from hybrid_cache.api.text.incoming import Broken, Ended, Incoming, Waiting, marks_of
from hybrid_cache.api.text.tool_formats import PYTHON_TAG, ThoughtFormat, ToolFormat


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


Item = str | Thought | CallItem
Items = Generator[Item | None, None, None]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an answer is read. tools: None where calls are text; thinking: it begins within a thought"""

    tools: ToolFormat | None = None
    types: Types = field(default_factory=dict)  # of all tools of the request
    thoughts: ThoughtFormat | None = None
    thinking: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them, which may be tokens that otherwise have no text."""
        of_thoughts = (self.thoughts.begin, self.thoughts.end) if self.thoughts else ()
        return (*of_thoughts, *(self.tools.marks if self.tools else ()))


class AnswerParser:
    """Text in, items out.

    A call to a tool of the request begins with its arguments, and these come as they are written; any other is held
    back until it is whole. What has begun stays a call: where it breaks off, at the end of the answer or at a character
    that does not belong there, it ends with the arguments so far, which are then the beginning of an object and never
    one; a part of them that is not whole is lost. What else is no call stays text, from the mark or the call before it,
    and text goes on where the form broke. Only if the answer ends within a section in which a call was made, the rest
    of that section is dropped.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._text = Incoming()
        self._marks = marks_of(form.thoughts.begin if form.thoughts else "", form.tools.begin if form.tools else "")
        self.thinking = form.thinking and form.thoughts is not None  # the text so far ends within a thought
        self._called = False
        self._ids: set[str] = set()
        self._reading = self._answer()

    @property
    def may_begin_mark(self) -> bool:
        """Whether the text so far ends with what may be the beginning of a mark."""
        return self._text.unread

    def push(self, text: str) -> list[Item]:
        """Takes text -> what is now certain, in order; neighbours of one kind are one item."""
        self._text.feed(text)
        return self._certain()

    def finish(self) -> list[Item]:
        """What was held back."""
        self._text.end()
        return self._certain()

    def _certain(self) -> list[Item]:
        found: list[Item] = []
        parts: list[str] = []  # of the last item
        for item in self._reading:
            if item is None:
                break
            if parts and type(item) is not type(found[-1]):
                found[-1], parts = _of_parts(found[-1], parts), []
            if isinstance(item, CallBegun | CallDone):
                found.append(item)
                continue
            if not parts:
                found.append(item)
            parts.append(item if isinstance(item, str) else item.text)
        if parts:
            found[-1] = _of_parts(found[-1], parts)
        return found

    def _answer(self) -> Items:
        if self.thinking and self._form.thoughts is not None:
            yield from self._thought(self._form.thoughts.end)
        if self._form.tools is not None and not self._form.tools.begin:
            yield from self._bare(self._form.tools)
        while mark := (yield from self._said()):
            if self._form.thoughts is not None and mark == self._form.thoughts.begin:
                yield from self._thought(self._form.thoughts.end)
            elif self._form.tools is not None:
                yield from self._section(mark, self._form.tools)

    def _said(self) -> Generator[str | None, None, str]:
        """Text up to a mark -> that. Space around calls is layout."""
        space = (yield from self._text.spaces()) if self._called else ""
        for piece in self._text.before(self._marks):
            yield piece and space + piece
            space = "" if piece else space
        return self._text.take_mark(self._marks)

    def _thought(self, end: str) -> Items:
        """Line breaks around it are layout."""
        self.thinking = True
        yield from self._line_breaks()
        for piece in self._text.before(marks_of(end)):
            yield None if piece is None else Thought(piece)
        self._text.take_mark(marks_of(end))
        self.thinking = False
        yield from self._line_breaks()

    def _line_breaks(self) -> Waiting[None]:
        while (yield from self._text.peek()) == "\n":
            self._text.take()

    def _bare(self, tools: ToolFormat) -> Items:
        """An answer that begins with a brace, with the mark of code before it or not, may be calls to its end."""
        with self._text.recorded() as read:
            yield from self._text.spaces()
            try:
                if (yield from self._text.at(PYTHON_TAG)):
                    self._text.take(len(PYTHON_TAG))
                    yield from self._text.spaces()
            except Ended:
                pass
            is_call = (yield from self._text.peek()) == "{"
            before = "".join(read)
        if is_call:
            yield from self._section(before, tools)
        elif before:
            yield before

    def _section(self, mark: str, tools: ToolFormat) -> Items:
        """What a mark opens: calls, or text with the mark."""
        made = False
        with self._text.recorded() as read:
            try:
                for item in self._calls(tools):
                    if item is not None:
                        read.clear()
                        mark, made, self._called = "", True, True
                    yield self._with_own_id(item)
            except Broken as why:
                if isinstance(why, Ended):
                    self._text.rest()
                rest = mark + "".join(read)
                if rest and not (made and isinstance(why, Ended)):
                    yield rest

    def _with_own_id(self, item: CallItem | None) -> CallItem | None:
        """Clients tell calls apart by their ids: one that a call before it has is no id."""
        if not isinstance(item, CallBegun) or item.id is None:
            return item
        repeated = item.id in self._ids
        self._ids.add(item.id)
        return CallBegun(item.name) if repeated else item

    def _calls(self, tools: ToolFormat) -> Calls:
        """All calls of a section, and its end. Raises Broken."""
        made = False
        while True:
            while (at := (yield from self._text.peek())) and at in tools.between:
                self._text.take()
            if (yield from self._text.at(tools.end)) if tools.end else not at:
                break
            for item in tools.read(self._text, self._form.types):
                if not tools.begin and isinstance(item, CallBegun) and item.name not in self._form.types:
                    raise Broken  # the answer is JSON of its own
                yield item
            made = True
        self._text.take(len(tools.end))
        if not made:
            raise Broken


def _of_parts(item: Item, parts: list[str]) -> Item:
    text = "".join(parts)
    return text if isinstance(item, str) else Thought(text) if isinstance(item, Thought) else Arguments(text)
