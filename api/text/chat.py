"""Messages to a prompt: tokens, and the positions where another conversation may diverge.

The tokens of a message must not depend on what follows it, or a longer conversation would not find the shorter one in
the cache. So the end of each message is found in the rendered text (where the rendering of the messages up to there
ends, if that is a prefix of the whole), the text is split at these ends, and the pieces are tokenised one by one.

    <|im_start|>user Hi<|im_end|> | <|im_start|>assistant Hello!<|im_end|> | <|im_start|>assistant
    piece 0                       | piece 1                                | generation prompt

As in Hugging Face's own code, special tokens that a client writes into a message are special tokens.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock

import numpy as np

from hybrid_cache.api.text.boundaries import check_length, limited
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.template import RESERVED, ChatTemplate, Clock
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.choreography.assembly import Piece, joined
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt

DENSE_MESSAGES = 256  # beyond these, a conversation is split after every `SPARSE` messages only
SPARSE = 64
MAX_REMEMBERED = 1 << 14
PROBE = "x"
# Unicode noncharacters, never part of a text. One that the text does not hold marks places in it.
MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as tokens: a piece for each message, and one for the opening of the answer.

    Messages whose end the rendering does not show share a piece with those after them.
    """

    pieces: tuple[Piece, ...]
    messages: tuple[int | None, ...]  # of each piece, the index of the message that it is; None for several
    opening: Piece  # without tokens if there is none

    @property
    def prompt(self) -> Prompt:
        return limited(joined([*self.pieces, self.opening]))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place at which rendered text is split."""

    position: int  # characters before it
    boundary: Boundary | None = None  # its position still to be filled in; None splits only
    messages: int | None = None  # how many messages end here or before, if one ends here


@dataclass(frozen=True, slots=True)
class _End:
    """Where the rendering of the first messages of a conversation ends, and a digest of it."""

    length: int
    digest: bytes


class ChatEncoder:
    """Renders and tokenises conversations with one model's template. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate]) -> None:
        """`templates` by name; "tool_use" is taken when there are tools, "default" otherwise."""
        self._tokenizer = tokenizer
        self._templates = templates
        self.source = templates["default"].source if "default" in templates else None
        # By digest of the messages, and whether the opening of an answer follows. None: cannot be rendered.
        self._ends: OrderedDict[tuple[bytes, bool], _End | None] = OrderedDict()
        self._lock = Lock()
        self._answer_end: tuple[int, ...] | None = None

    def encode(self, messages: Sequence[TemplateMessage], rendering: Rendering, max_tokens: int) -> Prompt:
        """-> the prompt. Raises as `conversation`."""
        return self.conversation(messages, rendering, max_tokens).prompt

    def conversation(self, messages: Sequence[TemplateMessage], rendering: Rendering, max_tokens: int) -> Conversation:
        """Raises RequestError, and ContextTooLong for more than `max_tokens` tokens."""
        template, clock = self._template(rendering), Clock()
        text = self.render(messages, rendering, clock)
        self._tokenizer.check_size(text, max_tokens, "messages")
        # Checked before the ends are sought, which takes one rendering for each message that is new.
        # A token is rarely more than 16 characters; where it is, the engine still counts.
        if len(text) > 16 * max_tokens:
            check_length(len(self._tokenizer.encode(text)), max_tokens)
        cuts = self._message_cuts(template, messages, rendering, text, clock)
        cuts += self._part_cuts(template, messages, rendering, text, clock)
        made = self._tokenise(text, cuts, len(messages))
        check_length(sum(len(piece.tokens) for piece in (*made.pieces, made.opening)), max_tokens)
        return made

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

    def render(self, messages: Sequence[TemplateMessage], rendering: Rendering, clock: Clock | None = None) -> str:
        """The text of a whole conversation, with the opening of the answer if `rendering` asks for it."""
        template, clock = self._template(rendering), clock or Clock()
        text = self._render(template, messages, rendering, clock, opening=rendering.add_generation_prompt)
        return _cut_after_final(text, messages[-1]) if rendering.continue_final_message else text

    def takes_argument_text(self, rendering: Rendering) -> bool:
        """Whether tool-call arguments reach the template as JSON text, not as an object."""
        return self._template(rendering).takes_argument_text

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
        template: ChatTemplate,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        clock: Clock,
        *,
        opening: bool = False,
    ) -> str:
        return self._fill(template, [m.for_template() for m in messages], rendering, clock, opening)

    @staticmethod
    def _fill(
        template: ChatTemplate,
        messages: Sequence[Mapping[str, object]],
        rendering: Rendering,
        clock: Clock,
        opening: bool,
    ) -> str:
        tools = list(rendering.tools) if rendering.tools else None
        variables = {**rendering.kwargs, "tools": tools, "add_generation_prompt": opening}
        return template.render(messages, variables, clock)

    def _message_cuts(
        self,
        template: ChatTemplate,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        text: str,
        clock: Clock,
    ) -> list[_Cut]:
        """Cuts in `text`, which is rendered from `messages`, where the first i of them end.

        Also where the opening of an answer ends that a later turn has as a message: its prompt ended there.

        A conversation that grows has had most of its ends found before: they are remembered by the digest of the
        messages, and checked against the text.
        """
        closed = len(messages) - (1 if rendering.continue_final_message else 0)
        keys = _prefix_keys(template, messages, rendering, clock)
        seen, position, cuts = blake2b(digest_size=16), 0, []
        for count, opening in _wanted_ends(messages, closed):
            end = self._end(template, messages[:count], rendering, clock, (keys[count - 1], opening))
            if end is None or not position <= end.length <= len(text):
                continue
            ahead = seen.copy()
            ahead.update(text[position : end.length].encode("utf-8", "surrogatepass"))
            if ahead.digest() == end.digest:
                seen, position = ahead, end.length
                cuts.append(
                    _Cut(position) if opening else _Cut(position, Boundary(0, role=messages[count - 1].role), count)
                )
        return cuts

    def _end(
        self,
        template: ChatTemplate,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        clock: Clock,
        key: tuple[bytes, bool],
    ) -> _End | None:
        with self._lock:
            if key in self._ends:
                self._ends.move_to_end(key)
                return self._ends[key]
        try:
            text = self._render(template, messages, rendering, clock, opening=key[1])
            data = text.encode("utf-8", "surrogatepass")
            end = _End(len(text), blake2b(data, digest_size=16).digest())
        except RequestError:  # some templates want the user to speak last
            end = None
        with self._lock:
            self._ends[key] = end
            while len(self._ends) > MAX_REMEMBERED:
                self._ends.popitem(last=False)
        return end

    def _part_cuts(
        self,
        template: ChatTemplate,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        text: str,
        clock: Clock,
    ) -> list[_Cut]:
        """Cuts at the ends of marked parts, and between the parts of one message."""
        parts = [part for m in messages for part in m.marks]
        mark = next((c for c in MARKS if c not in text), None)
        if not parts or mark is None:
            return []
        best: list[str] = []
        same = -1  # characters up to which the marked text is right
        for tight in (False, True):
            marked = [m.for_template(mark, tight=tight) for m in messages]
            try:
                pieces = self._fill(template, marked, rendering, clock, rendering.add_generation_prompt).split(mark)
            except RequestError:
                continue
            right = _common_length("".join(pieces), text)
            # Other numbers of pieces: the template repeats, drops or reads the text of a message.
            if len(pieces) == len(parts) + 1 and right > same:
                best, same = pieces, right
            if right == len(text):
                break
        return list(_cuts_after(best, same, parts, rendering.default_ttl_s))

    def _tokenise(self, text: str, cuts: Iterable[_Cut], num_messages: int) -> Conversation:
        """The tokens between the cuts, in pieces that end where messages do; what ends in a piece is in it."""
        pieces, names, done = list[Piece](), list[int | None](), 0  # `done` messages are in them
        tokens, boundaries, position = list[int](), list[Boundary](), 0  # of the next piece
        for cut in sorted(cuts, key=lambda c: (c.position, c.messages is not None)):
            tokens += self._tokenizer.encode(text[position : cut.position])
            position = cut.position
            if cut.boundary is not None:
                boundaries.append(replace(cut.boundary, position=len(tokens)))
            if cut.messages is not None and tokens:
                pieces.append(_piece(tokens, boundaries))
                names.append(done if done == cut.messages - 1 else None)
                tokens, boundaries, done = [], [], cut.messages
        tokens += self._tokenizer.encode(text[position:])
        rest = _piece(tokens, boundaries)
        if done == num_messages or not tokens:
            return Conversation(tuple(pieces), tuple(names), rest)
        return Conversation((*pieces, rest), (*names, None), _piece([], []))


def _piece(tokens: Sequence[int], boundaries: Sequence[Boundary]) -> Piece:
    return Piece(np.asarray(tokens, dtype=np.int32), tuple(boundaries))


def _cuts_after(
    pieces: Sequence[str], same: int, parts: Sequence[TextPart], default_ttl_s: float | None
) -> Iterator[_Cut]:
    position = 0
    for part, piece in zip(parts, pieces, strict=False):
        position += len(piece)
        if position > same:
            return
        ttl = part.ttl_s if part.ttl_s is not None else default_ttl_s
        yield _Cut(position, Boundary(0, BoundaryKind.EXPLICIT, ttl) if part.marked else None)


def _wanted_ends(messages: Sequence[TemplateMessage], closed: int) -> Iterator[tuple[int, bool]]:
    """Which ends are sought, in the order in which they are in the text: (messages before it, after an opening)."""
    for count in range(1, len(messages) + 1):
        if count > DENSE_MESSAGES and count % SPARSE:
            continue
        if count <= closed:
            yield count, False
        if count < len(messages) and messages[count].role == "assistant":
            yield count, True


def _prefix_keys(
    template: ChatTemplate, messages: Sequence[TemplateMessage], rendering: Rendering, clock: Clock
) -> list[bytes]:
    """A digest for each prefix of the messages, of everything that its rendering may depend on."""
    head = [template.name, sorted(clock.printed), rendering.tools, sorted(rendering.kwargs.items())]
    seen, keys = blake2b(_canonical(head), digest_size=16), []
    for message in messages:
        seen.update(_canonical(message.for_template()))
        keys.append(seen.digest())
    return keys


def _canonical(value: object) -> bytes:
    return json.dumps(value, default=str).encode() + b"\0"


def _cut_after_final(text: str, message: TemplateMessage) -> str:
    """Drops what the template writes after the content of the last message, so that the answer continues it."""
    content = (message.content() or "").strip()
    place = text.rfind(content) if content else -1
    if place < 0:
        raise RequestError(
            "continue_final_message needs a last message whose text the chat template shows as it is",
            param="continue_final_message",
        )
    return text[: place + len(content)]


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
