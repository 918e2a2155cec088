"""How the next request of a conversation will begin, once an answer is known.

Templates write a turn in another way when others follow: thoughts leave the history, calls and texts get other spaces.
So the answer is rendered as a later request will have it, before a message that nobody has sent yet.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from hybrid_cache.api.text.chat import PROBES, ChatEncoder
from hybrid_cache.api.text.generation import Part, Text, Thought
from hybrid_cache.api.text.marks import Quoting
from hybrid_cache.api.text.messages import Talk, TemplateMessage, TextPart, arguments_object, begun_object, tool_call
from hybrid_cache.api.text.whole_calls import ToolCall, WholeCalls
from hybrid_cache.tokens import Prompt

THOUGHTS = "reasoning_content"


@dataclass(slots=True)
class Said:
    """An answer as it grows: texts and thoughts, in blocks with something else between them, and calls."""

    calls: list[ToolCall] = field(default_factory=list)
    _texts: list[list[str]] = field(default_factory=list)  # the parts of each block
    _thoughts: list[list[str]] = field(default_factory=list)
    _whole: WholeCalls = field(default_factory=WholeCalls)
    _open: list[list[str]] | None = None  # the one whose last block goes on

    @property
    def texts(self) -> list[str]:
        return ["".join(parts) for parts in self._texts]

    @property
    def thoughts(self) -> list[str]:
        return ["".join(parts) for parts in self._thoughts]

    @property
    def size(self) -> int:
        """In characters."""
        arguments = sum(len(call.arguments) for call in self.calls)
        return arguments + sum(map(len, self.texts)) + sum(map(len, self.thoughts))

    def take(self, event: Part | ToolCall) -> None:
        for part in self._whole.take(event):
            match part:
                case Text() if part.text:
                    self._add(self._texts, part.text)
                case Thought() if part.text:
                    self._add(self._thoughts, part.text)
                case ToolCall():
                    self.calls.append(part)
                    self._open = None

    def _add(self, blocks: list[list[str]], text: str) -> None:
        if self._open is not blocks:
            blocks.append([])
            self._open = blocks
        blocks[-1].append(text)


def beginnings(chat: ChatEncoder, talk: Talk, said: Said, max_tokens: int) -> list[Prompt]:
    """What the next prompt begins with: up to the end of the answer, with the ends of the messages in it.

    Two of them where the template keeps thoughts, and nobody knows yet whether the client does.
    Raises RequestError where a template cannot render it, and ContextTooLong for more than `max_tokens` tokens.
    """
    found: list[Prompt] = []
    for messages in _histories(chat, talk, said):
        prompt = _beginning(chat, Talk(messages, talk.rendering.answered()), said, max_tokens)
        if not any(np.array_equal(prompt.tokens, other.tokens) for other in found):
            found.append(prompt)
    return found


def _histories(chat: ChatEncoder, talk: Talk, said: Said) -> Iterator[list[TemplateMessage]]:
    """The messages, and the answer: with its thoughts, and without them if the client has never sent any."""
    answer = _answer(chat, talk, said)
    messages = [*talk.messages]
    if talk.rendering.continue_final_message:
        begun = messages.pop()
        answer = replace(
            answer, parts=(TextPart(_text(begun) + _text(answer)),), fields={**begun.fields, **answer.fields}
        )
    if said.thoughts:
        thoughts = ("\n" if talk.sent_back.blocks else "").join(said.thoughts)
        yield [*messages, replace(answer, fields={**answer.fields, THOUGHTS: thoughts})]
    if not said.thoughts or not any(THOUGHTS in message.fields for message in messages):
        yield [*messages, answer]


def _answer(chat: ChatEncoder, talk: Talk, said: Said) -> TemplateMessage:
    as_text, back = chat.takes_argument_text(talk.rendering), talk.sent_back
    told = [call for call in said.calls if call.complete or not back.whole]
    calls = [tool_call(call.id, call.name, _arguments(call.arguments, as_text, back.objects)) for call in told]
    texts = said.texts if back.blocks else ["".join(said.texts)]
    fields: dict[str, object] = {"tool_calls": calls} if calls else {}
    parts = None if calls and not any(texts) else tuple(map(TextPart, texts or [""]))
    return TemplateMessage("assistant", parts, fields)


def _arguments(arguments: str, as_text: bool, objects: bool) -> object:
    """As a later request gives them to the template."""
    if not objects:
        return arguments if as_text else arguments_object(arguments)
    value = begun_object(arguments)
    return json.dumps(value, ensure_ascii=False) if as_text else value


def _text(message: TemplateMessage) -> str:
    return message.content(Quoting(())) or ""


def _beginning(chat: ChatEncoder, talk: Talk, said: Said, max_tokens: int) -> Prompt:
    """The tokens before the next message, whatever that is."""
    prompts = []
    for probe in PROBES:
        made = chat.conversation([*talk.messages, _following(said, probe)], talk.rendering, max_tokens)
        prompts.append(made.prompt)
        if (known := made.num_tokens(len(talk.messages))) is not None:
            return _cut(made.prompt, known)
    ours, theirs = (prompt.tokens for prompt in prompts)
    shorter = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    return _cut(prompts[0], int(differs[0]) if len(differs) else shorter)


def _following(said: Said, text: str) -> TemplateMessage:
    """After calls their results follow, after an answer a question."""
    call = next((call for call in said.calls if call.complete), None)
    if call is None:
        return TemplateMessage("user", (TextPart(text),))
    return TemplateMessage("tool", (TextPart(text),), {"tool_call_id": call.id, "name": call.name})


def _cut(prompt: Prompt, num_tokens: int) -> Prompt:
    within = tuple(boundary for boundary in prompt.boundaries if boundary.position <= num_tokens)
    return Prompt(prompt.tokens[:num_tokens], within)
