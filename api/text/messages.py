"""What a client sends to be answered, as templates see it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic_core import from_json

from hybrid_cache.api.text.marks import PART, Quoting

PART_SEPARATOR = "\n"
MESSAGE_SIZE = 64  # in characters: what a message costs beside its text


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message; `marked` if the client set a cache breakpoint at its end."""

    text: str
    marked: bool = False
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A cache breakpoint, and how many seconds it is to be kept at least."""

    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class TemplateMessage:
    """What the client sent. `parts` is None for an assistant's message that only calls tools."""

    role: str
    parts: tuple[TextPart, ...] | None
    fields: Mapping[str, object] = field(default_factory=dict)  # name, tool_calls, tool_call_id ...
    mark: Mark | None = None  # at its very end

    def marked_at_end(self, mark: Mark | None) -> "TemplateMessage":
        """The same, with a mark at its end if there is one."""
        return self if mark is None else replace(self, mark=mark)

    def content(self, quoting: Quoting, *, marked: bool = False, tight: bool = False) -> str | None:
        """The text as templates see it, if `marked` with a mark at the end of each part that has one or that another
        follows.

        `tight` puts the last mark before the spaces that a template may trim.
        """
        if self.parts is None:
            return None
        texts = [quoting.text(part.text) for part in self.parts]
        if marked and texts:
            last = texts.pop()
            texts = [text + PART for text in texts]
            bare = last.rstrip() if tight else last
            texts.append(bare + PART + last[len(bare) :] if self.parts[-1].marked else last)
        return PART_SEPARATOR.join(texts)

    def for_template(self, quoting: Quoting, *, marked: bool = False, tight: bool = False) -> dict[str, object]:
        role = "system" if self.role == "developer" else self.role
        fields = {name: quoting.value(value) for name, value in self.fields.items()}
        return {"role": role, "content": self.content(quoting, marked=marked, tight=tight), **fields}

    @property
    def marks(self) -> list[TextPart]:
        """The parts whose ends are marked."""
        parts = self.parts or ()
        return [p for i, p in enumerate(parts) if p.marked or i < len(parts) - 1]


def tool_call(call_id: str, name: str, arguments: object) -> dict[str, object]:
    """A call as templates see it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_object(arguments: str) -> object:
    """Arguments in JSON as the object that most templates expect: they quote a string. Itself if it is no JSON."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def begun_object(arguments: str) -> dict[str, object]:
    """The object that JSON is, or that it begins where a call broke off, as clients of streams read it. Maybe empty."""
    try:
        value = from_json(arguments, allow_partial=True)
    except (ValueError, TypeError):  # nothing yet, or half of an escape
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a conversation is to be rendered."""

    tools: Sequence[Mapping[str, object]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: Mapping[str, object] = field(default_factory=dict)
    default_ttl_s: float | None = None  # for marked parts without a lifetime of their own
    tools_mark: Mark | None = None  # at the end of the tools, and of the system message that they stand in

    def answered(self) -> "Rendering":
        """The same, for a later request, whose last message has come to an end."""
        return replace(self, add_generation_prompt=True, continue_final_message=False)

    def continuing(self) -> "Rendering":
        """The same, for an answer that continues the last message."""
        return replace(self, add_generation_prompt=False, continue_final_message=True)


@dataclass(frozen=True, slots=True)
class SentBack:
    """How a later request has an answer, by its dialect."""

    objects: bool = False  # arguments of calls are objects, not the text that the model wrote
    blocks: bool = False  # texts, and thoughts, with something between them come apart
    whole: bool = False  # calls that broke off are left out


@dataclass(frozen=True, slots=True)
class Talk:
    """What was said so far, as a request has it."""

    messages: Sequence[TemplateMessage]
    rendering: Rendering
    sent_back: SentBack = SentBack()

    @property
    def size(self) -> int:
        """How much there is to render, in characters."""
        texts = sum(len(part.text) for message in self.messages for part in message.parts or ())
        return texts + MESSAGE_SIZE * len(self.messages)
