"""Messages for a workflow: each rendered by itself, so that it can stand anywhere."""

from collections.abc import Sequence

import numpy as np

from hybrid_cache.api.text.chat import PROBE, ChatEncoder
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ModelError
from hybrid_cache.tokens import TokenArray


class ChatRenderer:
    """Messages as a model's chat template renders them, each by itself."""

    def __init__(self, text: TextModel) -> None:
        """Raises ModelError for a template that does not show how messages end."""
        self._tokenizer = text.tokenizer
        self._encoder = ChatEncoder(text.tokenizer, text.chat_templates)
        self._preamble = self._what_comes_first()
        self._openings: dict[str, TokenArray] = {}
        answered = self._render([("user", PROBE), ("assistant", PROBE)])
        end = answered[answered.rindex(PROBE) + len(PROBE) :]
        self.closing = tuple(self._tokenizer.encode(end))
        if not self.closing:
            raise ModelError("the chat template does not end messages: a workflow could not take them apart")

    def message(self, role: str, text: str) -> TokenArray:
        """Raises RequestError for a role that the template does not know."""
        if role in ("system", "user"):
            return self._message([(role, text)], "" if role == "system" else self._preamble)
        return self._message([("user", PROBE), (role, text)], self._render([("user", PROBE)]))

    def opening(self, role: str) -> TokenArray:
        """As for the assistant, with the name of the role in its place."""
        if role not in self._openings:
            before = self._render([("user", PROBE)])
            opening = self._render([("user", PROBE)], opening=True).removeprefix(before)
            self._openings[role] = self._tokens(opening if role == "assistant" else opening.replace("assistant", role))
        return self._openings[role]

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([t for t in tokens if t not in self._tokenizer.special_ids])

    def _what_comes_first(self) -> str:
        """What a template writes before the first message, such as a system prompt of its own."""
        once, twice = (self._render([("user", PROBE), ("assistant", PROBE)] * n) for n in (1, 2))
        return once[: 2 * len(once) - len(twice)]

    def _message(self, messages: Sequence[tuple[str, str]], before: str) -> TokenArray:
        sent = [TemplateMessage(role, (TextPart(text),)) for role, text in messages]
        return np.asarray(self._encoder.tokens(sent, Rendering(add_generation_prompt=False), before), np.int32)

    def _render(self, messages: Sequence[tuple[str, str]], *, opening: bool = False) -> str:
        rendering = Rendering(add_generation_prompt=opening)
        return self._encoder.render([TemplateMessage(role, (TextPart(text),)) for role, text in messages], rendering)

    def _tokens(self, text: str) -> TokenArray:
        return np.asarray(self._tokenizer.encode(text), np.int32)
