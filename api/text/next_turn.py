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
from hybrid_cache.api.text.messages import Talk, TemplateMessage, TextPart, arguments_object, tool_call
from hybrid_cache.api.text.whole_calls import ToolCall, WholeCalls
from hybrid_cache.tokens import Prompt

THOUGHTS = "reasoning_content"


@dataclass(slots=True)
class Said:
    """An answer as it grows."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    _whole: WholeCalls = field(default_factory=WholeCalls)

    def take(self, event: Part | ToolCall) -> None:
        for part in self._whole.take(event):
            match part:
                case Text():
                    self.texts.append(part.text)
                case Thought():
                    self.thoughts.append(part.text)
                case ToolCall():
                    self.calls.append(part)


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
        yield [*messages, replace(answer, fields={**answer.fields, THOUGHTS: "".join(said.thoughts)})]
    if not said.thoughts or not any(THOUGHTS in message.fields for message in messages):
        yield [*messages, answer]


def _answer(chat: ChatEncoder, talk: Talk, said: Said) -> TemplateMessage:
    as_text = chat.takes_argument_text(talk.rendering)
    calls = [tool_call(call.id, call.name, _arguments(call.arguments, as_text, talk.objects)) for call in said.calls]
    text = "".join(said.texts)
    fields: dict[str, object] = {"tool_calls": calls} if calls else {}
    return TemplateMessage("assistant", None if calls and not text else (TextPart(text),), fields)


def _arguments(arguments: str, as_text: bool, objects: bool) -> object:
    """As a later request gives them to the template."""
    if as_text and not objects:
        return arguments
    value = arguments_object(arguments)
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
    if not said.calls:
        return TemplateMessage("user", (TextPart(text),))
    call = said.calls[0]
    return TemplateMessage("tool", (TextPart(text),), {"tool_call_id": call.id, "name": call.name})


def _cut(prompt: Prompt, num_tokens: int) -> Prompt:
    within = tuple(boundary for boundary in prompt.boundaries if boundary.position <= num_tokens)
    return Prompt(prompt.tokens[:num_tokens], within)
