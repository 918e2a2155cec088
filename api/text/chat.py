"""Messages to a prompt: tokens, and the positions where another conversation may diverge.

The tokens of a message must not depend on what follows it, or a longer conversation would not find the shorter one in
the cache. So the end of each message is found in the rendered text, the text is split at these ends, and the pieces are
tokenised one by one.

    <|im_start|>user Hi<|im_end|> | <|im_start|>assistant Hello!<|im_end|> | <|im_start|>assistant
    piece 0                       | piece 1                                | generation prompt

What a client writes is text: special tokens come from the template alone, see `marks`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from hybrid_cache.api.text.boundaries import check_length, limited
from hybrid_cache.api.text.left_out import left_out
from hybrid_cache.api.text.marks import Quoting
from hybrid_cache.api.text.messages import Rendering, Talk, TemplateMessage, TextPart
from hybrid_cache.api.text.orders import other_orders
from hybrid_cache.api.text.rendered_ends import RenderedEnds
from hybrid_cache.api.text.template import RESERVED, ChatTemplate, Clock, Rendered, TemplateRefusal
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.choreography.assembly import Piece, joined
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt

NAME, TOOLS, CALLS = "name", "tools", "tool_calls"
PROBE = "x"
PROBES = ("x", "y")  # a text begins like one of them at most


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as tokens: a piece for each message, and one for the opening of the answer.

    Messages whose end the rendering does not show share a piece with those after them.
    """

    talk: Talk
    pieces: tuple[Piece, ...]
    messages: tuple[int | None, ...]  # of each piece, the index of the message that it is; None for several
    opening: Piece  # without tokens if there is none
    rearranged: tuple[str, ...] = ()  # what was done to the messages, in `orders`
    unread: tuple[str, ...] = ()  # what the template does not know, of tools

    @property
    def prompt(self) -> Prompt:
        return replace(limited(joined([*self.pieces, self.opening])), ends=tuple(self._ends()))

    def _ends(self) -> Iterator[int]:
        """Messages that share a piece end where it ends."""
        end = num_ended = 0
        for piece, message in zip(self.pieces, self.messages, strict=True):
            for _ in range(num_ended, message or num_ended):
                yield end
            end += len(piece.tokens)
            if message is not None:
                yield end
                num_ended = message + 1
        if self.messages and self.messages[-1] is None:
            yield end

    def num_tokens(self, count: int) -> int | None:
        """Tokens of the first `count` messages; None where their end cannot be seen."""
        total = 0
        for piece, message in zip(self.pieces, self.messages, strict=True):
            total += len(piece.tokens)
            if message == count - 1:
                return total
        return None


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place at which rendered text is split."""

    position: int  # characters before it
    boundary: Boundary | None = None  # its position still to be filled in; None splits only
    messages: int | None = None  # how many messages end here or before, if one ends here


class ChatEncoder:
    """Renders and tokenises conversations with one model's template. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate], *, special_tokens_in_content: bool = False
    ) -> None:
        """`templates` by name; "tool_use" is taken when there are tools, "default" otherwise.

        special_tokens_in_content: special tokens that clients write into messages are special tokens, and tags are tags
        """
        self._tokenizer = tokenizer
        self._templates = templates
        tokens = [] if special_tokens_in_content else [*tokenizer.special_tokens, *tokenizer.tags]
        self._quotes = bool(tokens)
        self._quoting = Quoting(tokens)
        # Answers may think and call tools in tags, and templates look for these.
        looked_for = " ".join(text for template in templates.values() for text in template.looks_for)
        special = () if special_tokens_in_content else tokenizer.special_tokens
        self._quoting_answers = Quoting([t for t in special if t not in looked_for], wherever=False)
        self._ends = RenderedEnds()
        self.source = templates["default"].source if "default" in templates else None
        self._answer_end: tuple[int, ...] | None = None

    def encode(self, messages: Sequence[TemplateMessage], rendering: Rendering, max_tokens: int) -> Prompt:
        """-> the prompt. Raises as `conversation`."""
        return self.conversation(messages, rendering, max_tokens).prompt

    def conversation(self, messages: Sequence[TemplateMessage], rendering: Rendering, max_tokens: int) -> Conversation:
        """Raises RequestError, and ContextTooLong for more than `max_tokens` tokens."""
        sent = sum(len(part.text) for message in messages for part in message.parts or ())
        self._tokenizer.check_characters(sent, max_tokens, "messages")
        clock = Clock()
        rendered = self._whole(messages, rendering, clock)
        self._tokenizer.check_fits(rendered.text, max_tokens, "messages")
        self._check_shown(messages, rendering, rendered.text, clock)
        cuts = [*self._message_cuts(messages, rendering, rendered, clock)]
        cuts += self._tools_cut(messages, rendering, rendered.text, clock)
        cuts += self._part_cuts(messages, rendering, rendered.text, clock)
        made = self._tokenise(rendered, cuts, Talk(messages, rendering))
        check_length(sum(len(piece.tokens) for piece in (*made.pieces, made.opening)), max_tokens)
        return replace(made, unread=tuple(self._unread(messages, rendering)))

    def rearranged(self, messages: Sequence[TemplateMessage], rendering: Rendering, max_tokens: int) -> Conversation:
        """The same as `conversation`; where the template refuses the order of the messages, in one that it takes."""
        try:
            return self.conversation(messages, rendering, max_tokens)
        except TemplateRefusal:
            for done, others in other_orders(messages):
                with suppress(TemplateRefusal):
                    made = self.conversation(others, rendering, max_tokens)
                    lost = {m.fields.get(NAME) for m in messages} - {m.fields.get(NAME) for m in others}
                    unread = made.unread + ((f"messages.{NAME}",) if lost else ())
                    return replace(made, rearranged=done, unread=unread)
            raise

    def answer_end(self) -> tuple[int, ...] | None:
        """The tokens that end an answer in the rendering of a longer conversation; None where there are none."""
        if self._answer_end is None:
            said = [TemplateMessage("user", (TextPart(PROBE),)), TemplateMessage("assistant", (TextPart(PROBE),))]
            try:
                text = self.render(said, Rendering(add_generation_prompt=False))
            except RequestError:
                text = ""
            self._answer_end = tuple(self._tokenizer.encode(text[text.rfind(PROBE) + len(PROBE) :])) if text else ()
        return self._answer_end or None

    def render(self, messages: Sequence[TemplateMessage], rendering: Rendering) -> str:
        """The text of a whole conversation, with the opening of the answer if `rendering` asks for it."""
        return self._whole(messages, rendering, Clock()).text

    def tokens(self, messages: Sequence[TemplateMessage], rendering: Rendering, after: str = "") -> list[int]:
        """Tokens of the text of a conversation, without those of a text that it may begin with."""
        rendered = self._whole(messages, rendering, Clock())
        start = len(after) if rendered.text.startswith(after) else 0
        literals = deque(span for span in self._literals(rendered) if span[0] >= start)
        return self._tokens(rendered.text, start, len(rendered.text), literals)

    def reads(self, variable: str) -> bool:
        """Whether one of the templates looks at a variable."""
        return any(variable in template.variables for template in self._templates.values())

    def takes_argument_text(self, rendering: Rendering) -> bool:
        """Whether tool-call arguments reach the template as JSON text, not as an object."""
        return self._template(rendering).takes_argument_text

    def _whole(self, messages: Sequence[TemplateMessage], rendering: Rendering, clock: Clock) -> Rendered:
        rendered = self._render(messages, rendering, clock, opening=rendering.add_generation_prompt)
        if not rendering.continue_final_message:
            return rendered
        end = self._end_of_final(messages, rendering, rendered.text, clock)
        return replace(rendered, text=rendered.text[:end])

    def _unread(self, messages: Sequence[TemplateMessage], rendering: Rendering) -> Iterator[str]:
        template = self._template(rendering)
        if rendering.tools and TOOLS not in template.variables:
            yield TOOLS
        if any(m.fields.get(NAME) for m in messages if m.role != "tool") and not self._shows_names(messages, rendering):
            yield f"messages.{NAME}"
        if CALLS not in template.source and any(message.fields.get(CALLS) for message in messages):
            yield f"messages.{CALLS}"

    def _shows_names(self, messages: Sequence[TemplateMessage], rendering: Rendering) -> bool:
        """Whether the names of those who speak have any effect."""
        clock = Clock()

        def named(other: str) -> str:
            sent = [replace(m, fields={**m.fields, NAME: other}) if m.fields.get(NAME) else m for m in messages]
            return self._render(sent, rendering, clock, opening=False).text

        try:
            return named(PROBES[0]) != named(PROBES[1])
        except RequestError:
            return True

    def _check_shown(self, messages: Sequence[TemplateMessage], rendering: Rendering, text: str, clock: Clock) -> None:
        """Raises TemplateRefusal if the template leaves out what somebody says."""

        def render(others: Sequence[TemplateMessage]) -> str | None:
            try:
                return self._render(others, rendering, clock, opening=rendering.add_generation_prompt).text
            except TemplateRefusal:
                return None

        role = left_out(messages, text, render)
        if role is not None:
            raise TemplateRefusal(
                f"the chat template leaves out what a message with role '{role}' says", param="messages"
            )

    def _end_of_final(self, messages: Sequence[TemplateMessage], rendering: Rendering, text: str, clock: Clock) -> int:
        """Where the content of the last message ends, so that the answer continues it. Raises RequestError."""
        content = messages[-1].content(Quoting(())) or ""
        marked = [*messages[:-1], replace(messages[-1], parts=(TextPart(content, marked=True),))]
        if content.strip():
            opening = rendering.add_generation_prompt
            rendered = self._render(marked, rendering, clock, opening=opening, marked=True, tight=True)
            if rendered.parts and rendered.text == text:
                return rendered.parts[-1]
        raise RequestError(
            "continue_final_message needs a last message whose text the chat template shows as it is",
            param="continue_final_message",
        )

    def _quoting_for(self, message: TemplateMessage) -> Quoting:
        return self._quoting_answers if message.role == "assistant" else self._quoting

    def _template(self, rendering: Rendering) -> ChatTemplate:
        wanted = "tool_use" if rendering.tools and "tool_use" in self._templates else "default"
        if wanted not in self._templates:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        taken = RESERVED.intersection(rendering.kwargs)
        if taken:
            raise RequestError(f"chat_template_kwargs may not set {sorted(taken)[0]}", param="chat_template_kwargs")
        return self._templates[wanted]

    def _render(
        self,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        clock: Clock,
        *,
        opening: bool,
        marked: bool = False,
        tight: bool = False,
    ) -> Rendered:
        """opening: of the answer, at the end   marked, tight: as in `TemplateMessage.content`"""
        template, quoted = self._template(rendering), self._quoting.value
        sent = [m.for_template(self._quoting_for(m), marked=marked, tight=tight) for m in messages]
        tools = [quoted(tool) for tool in rendering.tools] if rendering.tools else None
        variables = {name: quoted(value) for name, value in rendering.kwargs.items()}
        return template.render(sent, {**variables, "tools": tools, "add_generation_prompt": opening}, clock)

    def _message_cuts(
        self, messages: Sequence[TemplateMessage], rendering: Rendering, rendered: Rendered, clock: Clock
    ) -> Iterator[_Cut]:
        """Cuts where the first i messages end.

        Also where the opening of an answer ends that a later turn has as a message: its prompt ended there.
        """
        closed = len(messages) - (1 if rendering.continue_final_message else 0)
        position, opening = 0, None
        for count, end in self._message_ends(messages, rendering, rendered, clock):
            if not position <= end <= len(rendered.text):
                continue
            position = end
            if count <= closed:
                message = messages[count - 1]
                mark = message.mark or (rendering.tools_mark if count == 1 and _is_system(message) else None)
                kind = BoundaryKind.EXPLICIT if mark else BoundaryKind.MESSAGE_END
                yield _Cut(end, Boundary(0, kind, mark.ttl_s if mark else None, role=message.role), count)
            if count < len(messages) and messages[count].role == "assistant":
                opening = self._opening(rendering, clock) if opening is None else opening
                if opening and rendered.text.startswith(opening, end):
                    yield _Cut(end + len(opening))

    def _tools_cut(
        self, messages: Sequence[TemplateMessage], rendering: Rendering, text: str, clock: Clock
    ) -> Iterator[_Cut]:
        """A marked cut behind tools that no system message is rendered with: where the first message's text begins."""
        if rendering.tools_mark is None or _is_system(messages[0]):
            return
        ends = []
        for probe in PROBES:
            try:
                other = self._render([TemplateMessage("user", (TextPart(probe),))], rendering, clock, opening=False)
            except RequestError:
                return
            ends.append(_common_length(other.text, text))
        if min(ends):
            yield _Cut(min(ends), Boundary(0, BoundaryKind.EXPLICIT, rendering.tools_mark.ttl_s))

    def _message_ends(
        self, messages: Sequence[TemplateMessage], rendering: Rendering, rendered: Rendered, clock: Clock
    ) -> Iterator[tuple[int, int]]:
        """(count, where the first `count` messages end) in order, for all counts for which it can be seen."""

        def before(count: int) -> str:
            return self._render(messages[:count], rendering, clock, opening=False).text

        template = self._template(rendering)
        if not template.shows_ends or rendered.end is None:
            head = [template.name, sorted(clock.printed), rendering.tools, sorted(rendering.kwargs.items())]
            bodies = (message.for_template(self._quoting_for(message)) for message in messages)
            yield from self._ends.find(rendered.text, before, head, bodies, len(messages))
            return
        first = 1
        if _is_system(messages[0]):  # often not where the others are
            first = 2
            try:
                text = before(1)
            except RequestError:  # some templates want a user to speak
                text = ""
            if text and rendered.text.startswith(text):
                yield 1, len(text)
        for count in range(first, len(messages) + 1):
            end = rendered.end_of(count)
            if end is not None:
                yield count, end

    def _opening(self, rendering: Rendering, clock: Clock) -> str:
        """What a template writes to open an answer; empty if that cannot be seen."""
        asked = [TemplateMessage("user", (TextPart(PROBE),))]
        try:
            closed, opened = (self._render(asked, rendering, clock, opening=o).text for o in (False, True))
        except RequestError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _part_cuts(
        self, messages: Sequence[TemplateMessage], rendering: Rendering, text: str, clock: Clock
    ) -> list[_Cut]:
        """Cuts at the ends of marked parts, and between the parts of one message."""
        parts = [part for m in messages for part in m.marks]
        if not parts:
            return []
        best: Sequence[int] = ()
        same = -1  # characters up to which the marked text is right
        for tight in (False, True):
            opening = rendering.add_generation_prompt
            try:
                marked = self._render(messages, rendering, clock, opening=opening, marked=True, tight=tight)
            except RequestError:
                continue
            right = _common_length(marked.text, text)
            # Other numbers of marks: the template repeats, drops or reads the text of a message.
            if len(marked.parts) == len(parts) and right > same:
                best, same = marked.parts, right
            if right == len(text):
                break
        return list(_cuts_after(best, same, parts, rendering.default_ttl_s))

    def _tokenise(self, rendered: Rendered, cuts: Iterable[_Cut], talk: Talk) -> Conversation:
        """The tokens between the cuts, in pieces that end where messages do; what ends in a piece is in it."""
        pieces, names, done = list[Piece](), list[int | None](), 0  # `done` messages are in them
        tokens, boundaries, position = list[int](), list[Boundary](), 0  # of the next piece
        literals = deque(self._literals(rendered))
        for cut in sorted(cuts, key=lambda c: (c.position, c.messages is not None)):
            tokens += self._tokens(rendered.text, position, cut.position, literals)
            position = cut.position
            if cut.boundary is not None:
                boundaries.append(replace(cut.boundary, position=len(tokens)))
            if cut.messages is not None and tokens:
                pieces.append(_piece(tokens, boundaries))
                names.append(done if done == cut.messages - 1 else None)
                tokens, boundaries, done = [], [], cut.messages
        tokens += self._tokens(rendered.text, position, len(rendered.text), literals)
        rest = _piece(tokens, boundaries)
        if done == len(talk.messages) or not tokens:
            return Conversation(talk, tuple(pieces), tuple(names), rest)
        return Conversation(talk, (*pieces, rest), (*names, None), _piece([], []))

    def _literals(self, rendered: Rendered) -> list[tuple[int, int]]:
        """Spans that look like special tokens, and are text of a client."""
        return self._quoting.literals(rendered.text, rendered.clients)

    def _tokens(self, text: str, start: int, end: int, literals: deque[tuple[int, int]]) -> list[int]:
        """Tokens of text[start:end]. Takes the literal spans that are in it."""
        tokens: list[int] = []
        while literals and literals[0][0] < end:
            begin, stop = literals.popleft()
            if stop > end:  # a cut within the span
                literals.appendleft((end, stop))
            tokens += self._encode(text[start:begin])
            tokens += self._tokenizer.encode_literal(text[begin : min(stop, end)])
            start = min(stop, end)
        return tokens + self._encode(text[start:end])

    def _encode(self, text: str) -> list[int]:
        """Tokens of text in which special tokens are those of the template. Raises RequestError if there are more."""
        tokens = self._tokenizer.encode(text) if text else []
        if self._quotes and self._tokenizer.folds:
            found, written = self._tokenizer.num_structure_tokens(tokens), self._quoting.num_tokens(text)
            if found > written:
                raise RequestError(
                    "a message holds what this model's tokenizer takes for a special token", param="messages"
                )
        return tokens


def _is_system(message: TemplateMessage) -> bool:
    return message.role in ("system", "developer")


def _piece(tokens: Sequence[int], boundaries: Sequence[Boundary]) -> Piece:
    return Piece(np.asarray(tokens, dtype=np.int32), tuple(boundaries))


def _cuts_after(
    places: Sequence[int], same: int, parts: Sequence[TextPart], default_ttl_s: float | None
) -> Iterator[_Cut]:
    for part, position in zip(parts, places, strict=False):
        if position > same:
            return
        ttl = part.ttl_s if part.ttl_s is not None else default_ttl_s
        yield _Cut(position, Boundary(0, BoundaryKind.EXPLICIT, ttl) if part.marked else None)


def _common_length(a: str, b: str) -> int:
    """Number of leading characters that a and b share."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
