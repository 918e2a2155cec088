"""An agent's conversation: what the model says in each turn, as its chat template has it, and what comes back."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.generation import Text, Thought
from hybrid_cache.api.text.messages import (
    Rendering,
    Talk,
    TemplateMessage,
    TextPart,
    arguments_object,
    tool_call,
)
from hybrid_cache.api.text.next_turn import THOUGHTS, Said
from hybrid_cache.api.text.tool_formats import ThoughtFormat
from hybrid_cache.api.text.whole_calls import ToolCall
from hybrid_cache.bench.serving.scenarios import ENGLISH
from hybrid_cache.errors import RequestError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks at {what}.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
                "required": ["path", "lines"],
            },
        },
    }
    for name, what in (("read_file", "a file"), ("search", "all files"), ("run_tests", "what fails"))
]
CYCLE = (1, 2, 1, 0)  # calls of each turn, over and over; a turn without any is an answer, and a question follows it


@dataclass(frozen=True, slots=True)
class Sizes:
    """In words."""

    system: int = 700
    result: int = 120
    answer: int = 60
    thought: int = 60


@dataclass(frozen=True, slots=True)
class Traits:
    """What a chat template can show."""

    system: bool  # a system message
    tools: bool
    parallel: bool  # several calls in a turn

    @classmethod
    def of(cls, chat: ChatEncoder) -> "Traits":
        def shown(*messages: TemplateMessage) -> str:
            """Empty where the template refuses these."""
            try:
                return chat.render(messages, Rendering(tools=TOOLS, add_generation_prompt=False))
            except RequestError:
                return ""

        def called(count: int) -> str:
            calls = [tool_call(f"call0000{i}", "read_file", {"path": "p", "lines": i}) for i in range(count)]
            return shown(asked, TemplateMessage("assistant", None, {"tool_calls": calls}))

        asked = _message("user", "u")
        return cls(
            system="zz" in shown(_message("system", "zz"), asked),
            tools="read_file" in shown(asked) and bool(called(1)),
            parallel=bool(called(2)),
        )


class Script:
    """The same conversation for the same seed."""

    def __init__(self, seed: int, sizes: Sizes, traits: Traits) -> None:
        self._random = random.Random(seed)
        self._sizes = sizes
        self._traits = traits

    def opening(self) -> list[TemplateMessage]:
        """What the first turn answers."""
        about = self._words(self._sizes.system)
        question = self._words(self._sizes.answer)
        if not self._traits.system:
            return [_message("user", f"{about}\n\n{question}")]
        return [_message("system", about), _message("user", question)]

    def said(self, turn: int) -> Said:
        """What the model says in a turn, with JSON in other spaces than templates write."""
        said = Said()
        said.take(Thought(0, self._words(self._sizes.thought), None))
        num_calls = CYCLE[turn % len(CYCLE)] if self._traits.tools else 0
        for i in range(num_calls if self._traits.parallel else min(num_calls, 1)):
            name = str(TOOLS[i]["function"]["name"])  # type: ignore[index]
            arguments = f'{{"path":"{self._words(3)}", "lines":  {self._random.randrange(1000)}}}'
            said.take(ToolCall(0, name, arguments, None, f"call{turn:04}{i}"))
        if not num_calls:
            said.take(Text(0, self._words(self._sizes.answer), None))
        return said

    def following(self, said: Said) -> list[TemplateMessage]:
        """What is sent after that: results, or a question."""
        if not said.calls:
            return [_message("user", self._words(self._sizes.answer))]
        fields = ({"tool_call_id": call.id, "name": call.name} for call in said.calls)
        return [TemplateMessage("tool", (TextPart(self._words(self._sizes.result)),), each) for each in fields]

    def _words(self, count: int) -> str:
        return " ".join(self._random.choice(ENGLISH) for _ in range(count))


def sent_back(chat: ChatEncoder, talk: Talk, said: Said, *, thoughts: bool) -> TemplateMessage:
    """An answer as the next request has it. thoughts: the client keeps them"""
    as_text = chat.takes_argument_text(talk.rendering)
    calls = [tool_call(c.id, c.name, c.arguments if as_text else arguments_object(c.arguments)) for c in said.calls]
    fields: dict[str, object] = {"tool_calls": calls} if calls else {}
    if thoughts and said.thoughts:
        fields[THOUGHTS] = "".join(said.thoughts)
    text = "".join(said.texts)
    return TemplateMessage("assistant", None if calls and not text else (TextPart(text),), fields)


def written(chat: ChatEncoder, talk: Talk, said: Said, thoughts: ThoughtFormat | None, end: str) -> str:
    """The text of an answer as a model writes it that was trained on its template, but for spaces within JSON.

    end: what the template writes behind answers
    """
    silent = Rendering(tools=talk.rendering.tools, add_generation_prompt=False)
    before = chat.render(talk.messages, silent)
    opened = chat.render(talk.messages, talk.rendering)
    bare = chat.render([*talk.messages, sent_back(chat, talk, said, thoughts=False)], silent)
    head = _common(bare, opened) if bare.startswith(before) else len(opened)
    body = bare[max(head, len(before)) :].removesuffix(end)
    for call in said.calls:
        shown = json.dumps(arguments_object(call.arguments), ensure_ascii=False)
        body = body.replace(shown, call.arguments)
    if thoughts is None:
        return body
    begin = "" if opened.rstrip().endswith(thoughts.begin) else f"{thoughts.begin}\n"
    return f"{begin}{''.join(said.thoughts)}\n{thoughts.end}\n\n{body}"


def unchanged(chat: ChatEncoder, talk: Talk, count: int, max_tokens: int) -> int:
    """Tokens of a prompt before whatever follows its first `count` messages.

    Where a template does not show their end, the opening of the next message is among these.
    """
    end = chat.conversation(talk.messages, talk.rendering, max_tokens).num_tokens(count)
    if end is not None:
        return end
    other = [*talk.messages[:count], *map(_reworded, talk.messages[count:])]
    prompts = [chat.conversation(messages, talk.rendering, max_tokens).prompt for messages in (talk.messages, other)]
    ours, theirs = (prompt.tokens.tolist() for prompt in prompts)
    return _common(ours, theirs)


def _message(role: str, text: str) -> TemplateMessage:
    return TemplateMessage(role, (TextPart(text),))


def _reworded(message: TemplateMessage) -> TemplateMessage:
    parts = message.parts or ()
    return TemplateMessage(message.role, tuple(TextPart("~" + part.text) for part in parts), message.fields)


def _common(a: Sequence[object] | str, b: Sequence[object] | str) -> int:
    """Number of leading items that a and b share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
