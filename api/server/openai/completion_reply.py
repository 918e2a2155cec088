"""Text completions: an answer in their JSON."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

from hybrid_cache.api.server.openai.logprobs import (
    Columns,
    completion_logprobs,
    narrowed,
    prompt_logprobs,
    prompt_offsets,
)
from hybrid_cache.api.server.openai.parsing import most_of
from hybrid_cache.api.server.openai.reply import CHOICE_SIZE, OpenAIReply
from hybrid_cache.api.server.schemas.completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    TextOrTokens,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.answer import Answer, Events
from hybrid_cache.api.text.generation import Begin, CallArguments, CallBegin, CallEnd, End, Text, Thought, Token
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.request import FinishReason
from hybrid_cache.sampling import TokenLogprob

_REASONS: dict[FinishReason, Literal["stop", "length"]] = {  # no tools are offered
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


class _Echo:
    """A prompt as its choices show it. Everything is worked out once, when it is first needed."""

    def __init__(self, tokenizer: Tokenizer, asked: CompletionRequest, sent: TextOrTokens, begin: Begin) -> None:
        self._tokenizer = tokenizer
        self._asked = asked
        self._sent = sent
        self._begin = begin

    @cached_property
    def text(self) -> str:
        sent = self._sent
        return sent if isinstance(sent, str) else self._tokenizer.decode(self._begin.tokens, self._hidden)

    @cached_property
    def logprobs(self) -> Columns:
        ids = self._begin.tokens
        offsets = prompt_offsets(self._tokenizer, ids, self._hidden)
        entries = narrowed(self._begin.logprobs or [None] * len(ids), self._asked.logprobs or 0)
        return completion_logprobs(self._tokenizer, ids, entries, offsets)

    @cached_property
    def _hidden(self) -> frozenset[int]:
        """Special tokens of the prompt that its text does not show."""
        if isinstance(self._sent, str):
            bos, name = self._tokenizer.bos_id, self._tokenizer.named_tokens.get("bos_token")
            return frozenset() if bos is None or name is None or name in self._sent else frozenset({bos})
        return frozenset() if self._asked.skip_special_tokens is False else self._tokenizer.special_ids


class _Choice:
    """One continuation of one prompt, the prompt included if it is to be echoed."""

    def __init__(self, serving: Serving, asked: CompletionRequest, index: int) -> None:
        self._tokenizer = serving.text.tokenizer
        self._asked = asked
        self._index = index
        self._echo: _Echo | None = None
        self._shows_echo = False  # which has not been shown yet
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that have come since the last call of `take`."""
        return len(self._tokens)

    def begin(self, echo: _Echo) -> None:
        self._echo, self._shows_echo = echo, True

    def push(self, event: Text | End) -> None:
        if isinstance(event, End):
            self._finish, self._stop = event.finish, event.stop
            return
        self._texts.append(event.text)
        if event.token is not None:
            self._tokens.append(event.token)

    def take(self) -> dict[str, object]:
        """What has come since the last call, as a `CompletionChoice`."""
        echoed = self._echo.text if self._echo is not None and self._shows_echo else ""
        choice = CompletionChoice(
            index=self._index,
            text=echoed + "".join(self._texts),
            logprobs=None,
            finish_reason=None if self._finish is None else _REASONS[self._finish],
            stop_reason=self._stop,
        )
        if self._asked.return_token_ids:
            choice.token_ids = [token.id for token in self._tokens]
        shown = choice.model_dump(exclude_unset=True)
        if self._asked.logprobs is not None:
            shown["logprobs"] = self._logprobs().shown()
        self._texts, self._tokens, self._shows_echo = [], [], False
        return shown

    def _logprobs(self) -> Columns:
        begin = 0 if self._echo is None else len(self._echo.text)
        ids = [token.id for token in self._tokens]
        entries = [token.logprob for token in self._tokens]
        own = completion_logprobs(self._tokenizer, ids, entries, [begin + token.offset for token in self._tokens])
        return self._echo.logprobs + own if self._echo is not None and self._shows_echo else own


class CompletionReply(OpenAIReply):
    """The choices of one prompt or several."""

    chunk = "text_completion"

    def __init__(self, serving: Serving, asked: CompletionRequest, answer: Answer) -> None:
        super().__init__(serving, asked, answer, "cmpl")
        self._asked = asked
        self._n = asked.n or 1
        self._choices = [_Choice(serving, asked, i) for i in range(len(asked.prompt) * self._n)]
        self._prompt_ids: list[Sequence[int]] = [()] * len(asked.prompt)
        self._prompt_logprobs: list[Sequence[TokenLogprob | None]] = [()] * len(asked.prompt)

    def _take(self, events: Events) -> None:
        for event in events:
            match event:
                case Begin():
                    self._prompt_ids[event.prompt] = event.tokens
                    self._prompt_logprobs[event.prompt] = event.logprobs or ()
                    if self._asked.echo:
                        echo = _Echo(self._tokenizer, self._asked, self._asked.prompt[event.prompt], event)
                        for choice in self._of(event.prompt):
                            choice.begin(echo)
                case Text() | End():
                    self._choices[event.choice].push(event)
                case Thought() | CallBegin() | CallArguments() | CallEnd():
                    raise AssertionError("no tools were offered")

    def _whole(self) -> dict[str, object]:
        body = CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[],
            usage=self._usage(),
        )
        choices = [choice.take() for choice in self._choices]
        if self._asked.return_token_ids:
            for number, choice in enumerate(choices):
                choice["prompt_token_ids"] = list(self._prompt_ids[number // self._n])
        num_top = self._asked.prompt_logprobs
        for number, choice in enumerate(choices if num_top is not None else ()):
            scored = self._prompt_logprobs[number // self._n]
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, scored, num_top or 0)
        return {**body.model_dump(exclude_unset=True), "choices": choices}

    def _size(self) -> int:
        own = sum(CHOICE_SIZE + choice.num_tokens for choice in self._choices)
        shows_prompt = self._asked.echo or self._asked.return_token_ids or self._asked.prompt_logprobs is not None
        prompts = self._n * sum(map(len, self._prompt_ids)) if shows_prompt else 0
        return (own + prompts) * self._entries

    def _size_of(self, events: Events) -> int:
        first = events[0]
        return len(first.tokens) * self._entries if isinstance(first, Begin) and self._asked.echo else 0

    @property
    def _entries(self) -> int:
        """Of one token, itself included."""
        most = most_of(self._asked.logprobs, self._asked.prompt_logprobs)
        return 1 if most is None else 2 + most

    def _chunks(self, events: Events) -> Iterator[dict[str, object]]:
        self._take(events)
        for choice in self._shown(events):
            yield self._chunk(choice.take())

    def _shown(self, events: Events) -> Sequence[_Choice]:
        """The choices of which the events give something to show."""
        first = events[0]
        if isinstance(first, Begin):
            return self._of(first.prompt) if self._asked.echo else []
        shows_tokens = self._asked.logprobs is not None or bool(self._asked.return_token_ids)
        shows = shows_tokens or any(not isinstance(event, Text) or event.text for event in events)
        return [self._choices[first.choice]] if shows else []

    def _of(self, prompt: int) -> Sequence[_Choice]:
        return self._choices[prompt * self._n : (prompt + 1) * self._n]
