"""Chat templates: text of conversations, and where their messages are in it."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import loopcontrols as LoopControls

from hybrid_cache.api.text.marks import read_marks
from hybrid_cache.api.text.sandbox import ALLOWANCE, MAX_RENDERED, Allowance, GenerationBlock, Sandbox, TooMuch
from hybrid_cache.api.text.text_work import still_wanted
from hybrid_cache.errors import ModelError, RequestError

Message = Mapping[str, object]

# What a request may not set by way of chat_template_kwargs.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})

_TALK: list[Message] = [
    {"role": role, "content": f"{role[0]}{i}"} for i, role in enumerate(("system", *("user", "assistant") * 2, "user"))
]


MAX_FORM = 256  # characters that say how a time is to be shown


class TooCostly(RequestError):
    """A conversation that a template takes too long to render, or too much memory."""


class TemplateRefusal(RequestError):
    """Messages that a template does not render, such as for the order of their roles."""


class Clock:
    """The time of one request: however often its messages are rendered, they show the same time."""

    def __init__(self) -> None:
        self._now = datetime.datetime.now()
        self.printed: set[str] = set()  # what templates have shown of it

    def strftime(self, form: str) -> str:
        if len(form) > MAX_FORM:
            raise TemplateError(f"a form of {len(form)} characters for a time, at most {MAX_FORM}")
        text = self._now.strftime(form)
        self.printed.add(text)
        return text


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation, with places in it as the number of characters before them."""

    text: str
    starts: Mapping[int, int]  # of messages by their index, where the template loops over them in their order
    end: int | None  # of the last message
    parts: tuple[int, ...]  # where marked parts end
    clients: tuple[int, ...]  # characters that a client wrote, of those that special tokens are made of

    def end_of(self, count: int) -> int | None:
        """Where the first `count` messages end; None where that cannot be seen."""
        return self.starts.get(count, None if count <= max(self.starts, default=0) else self.end)


class ChatTemplate:
    """A compiled template, in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError for a template that does not compile, or that takes too much for a few words."""
        try:
            self._template = Sandbox().from_string(source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as e:
            raise ModelError(f"the chat template does not compile: {e}") from e
        self._special_tokens = dict(special_tokens)
        self.source = source
        tree = Environment(extensions=[LoopControls, GenerationBlock]).parse(source)
        self.looks_for = _texts_looked_for(tree)
        # That it reads. In the sandbox, as this computes what is constant.
        self.variables = frozenset(meta.find_undeclared_variables(Sandbox().parse(source)))
        self.name = blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        try:
            self.takes_argument_text = self._shows_argument_text()
            # Whether `Rendered.end_of` is where the rendering of so many messages ends, beyond a first system message.
            self.shows_ends = all(self._shows_ends_of(talk) for talk in (_TALK[1:2], _TALK[1:4], _TALK[1:], _TALK))
        except TooCostly as e:
            raise ModelError(str(e)) from e

    def render(self, messages: Sequence[Message], variables: Mapping[str, object], clock: Clock) -> Rendered:
        """The text of a conversation. Raises RequestError for what the template refuses, for too much text or work.

        messages, variables: without marks of their own, see `marks.Quoting`
        """
        allowance = Allowance(messages, still_wanted)
        context = {**self._special_tokens, **variables, "messages": messages, "strftime_now": clock.strftime}
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate({**context, ALLOWANCE: allowance}):
                length += len(part)
                if length > MAX_RENDERED:
                    raise TooMuch(f"more than {MAX_RENDERED} characters")
                parts.append(part)
        except RequestError:
            raise
        except TooMuch as e:
            raise TooCostly(f"the chat template takes too much for these messages: {e}", param="messages") from e
        except Exception as e:  # whatever a template can raise, it raises because of these messages
            raise TemplateRefusal(f"the chat template cannot render these messages: {e}", param="messages") from e
        return _rendered("".join(parts), allowance.loops)

    def _shows_argument_text(self) -> bool:
        """Whether the arguments of a tool call may be JSON text; many templates want the object and quote a string."""
        probe = '{"probe":[1]}'  # an object would be written with spaces
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": probe}}
        messages: list[Message] = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        rendered = self._tried(messages, opening=False)
        return rendered is not None and probe in rendered.text

    def _shows_ends_of(self, messages: Sequence[Message]) -> bool:
        whole = self._tried(messages, opening=True)
        for count in range(1 + (messages[0]["role"] == "system"), len(messages) + 1):
            part = self._tried(messages[:count], opening=False)
            if whole is None or part is None:  # some templates want the user to speak last
                continue
            if not whole.text.startswith(part.text) or whole.end_of(count) != len(part.text):
                return False
        return True

    def _tried(self, messages: Sequence[Message], *, opening: bool) -> Rendered | None:
        try:
            return self.render(messages, {"tools": None, "add_generation_prompt": opening}, Clock())
        except TooCostly:
            raise
        except RequestError:
            return None


def _texts_looked_for(tree: nodes.Template) -> tuple[str, ...]:
    """Texts that a template compares others with, or takes them apart at."""
    found = [call.args for call in tree.find_all(nodes.Call)] + [call.args for call in tree.find_all(nodes.Filter)]
    found += [[compare.expr, *(operand.expr for operand in compare.ops)] for compare in tree.find_all(nodes.Compare)]
    values = [value for values in found for value in values]
    return tuple(value.value for value in values if isinstance(value, nodes.Const) and isinstance(value.value, str))


def _rendered(raw: str, loops: Sequence[int | None]) -> Rendered:
    """loops: for each mark of a loop the message that begins there, None at the end of a loop"""
    marked = read_marks(raw)
    if len(marked.loops) != len(loops):  # the template has cut or repeated some
        return Rendered(marked.text, {}, None, marked.parts, marked.clients)
    starts: dict[int, int] = {}
    end: int | None = None
    for index, position in zip(loops, marked.loops, strict=True):
        if index is not None:
            starts.pop(index, None)  # the last loop is the one that writes them
            starts[index], end = position, None
        elif end is None:
            end = position
    if [*starts] != sorted(starts) or [*starts.values()] != sorted(starts.values()):
        starts, end = {}, None
    return Rendered(marked.text, starts, end, marked.parts, marked.clients)
