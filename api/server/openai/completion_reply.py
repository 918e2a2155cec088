"""Text completions: an answer in their JSON."""

from collections.abc import Iterator, Sequence

from hybrid_cache.api.server.openai.logprobs import completion_logprobs, prompt_offsets
from hybrid_cache.api.server.openai.reply import OpenAIReply
from hybrid_cache.api.server.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    TextOrTokens,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.answer import Answer, Events
from hybrid_cache.api.text.generation import Begin, End, Text, Token, ToolCall
from hybrid_cache.request import FinishReason


class _Choice:
    """One continuation of one prompt, the prompt included if it is to be echoed."""

    def __init__(self, serving: Serving, asked: CompletionRequest, prompt: TextOrTokens, index: int) -> None:
        self._tokenizer = serving.text.tokenizer
        self._asked = asked
        self._sent = prompt
        self._index = index
        self._echo = ""
        self._begin: Begin | None = None  # its tokens and text are still to be shown
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None

    def begin(self, begin: Begin) -> None:
        if self._asked.echo:
            sent = self._sent
            self._echo = sent if isinstance(sent, str) else self._tokenizer.decode(begin.tokens, self._hidden())
            self._texts.append(self._echo)
            self._begin = begin

    def push(self, event: Text | End) -> None:
        if isinstance(event, End):
            self._finish, self._stop = event.finish, event.stop
            return
        self._texts.append(event.text)
        if event.token is not None:
            self._tokens.append(event.token)

    def take(self) -> CompletionChoice:
        """What has come since the last call."""
        choice = CompletionChoice(
            index=self._index,
            text="".join(self._texts),
            logprobs=self._logprobs() if self._asked.logprobs is not None else None,
            finish_reason=None if self._finish is None else self._finish.value,
            stop_reason=self._stop,
        )
        if self._asked.return_token_ids:
            choice.token_ids = [token.id for token in self._tokens]
        self._texts, self._tokens, self._begin = [], [], None
        return choice

    def _logprobs(self) -> CompletionLogprobs:
        ids = [token.id for token in self._tokens]
        entries = [token.logprob for token in self._tokens]
        offsets = [len(self._echo) + token.offset for token in self._tokens]
        if self._begin is not None:
            prompt = list(self._begin.tokens)
            ids = prompt + ids
            entries = [*(self._begin.logprobs or [None] * len(prompt)), *entries]
            offsets = prompt_offsets(self._tokenizer, prompt, self._hidden()) + offsets
        return completion_logprobs(self._tokenizer, ids, entries, offsets)

    def _hidden(self) -> frozenset[int]:
        """Special tokens of the prompt that its text does not show."""
        if isinstance(self._sent, str):
            bos, name = self._tokenizer.bos_id, self._tokenizer.named_tokens.get("bos_token")
            return frozenset() if bos is None or name is None or name in self._sent else frozenset({bos})
        return frozenset() if self._asked.skip_special_tokens is False else self._tokenizer.special_ids


class CompletionReply(OpenAIReply):
    """The choices of one prompt or several."""

    chunk = "text_completion"

    def __init__(self, serving: Serving, asked: CompletionRequest, answer: Answer) -> None:
        super().__init__(serving, asked, answer, "cmpl")
        self._asked = asked
        self._n = asked.n or 1
        prompts = [prompt for prompt in asked.prompt for _ in range(self._n)]
        self._choices = [_Choice(serving, asked, prompt, i) for i, prompt in enumerate(prompts)]
        self._prompt_ids: list[Sequence[int]] = [()] * len(asked.prompt)

    def _take(self, events: Events) -> None:
        for event in events:
            match event:
                case Begin():
                    self._prompt_ids[event.prompt] = event.tokens
                    for choice in self._of(event.prompt):
                        choice.begin(event)
                case Text() | End():
                    self._choices[event.choice].push(event)
                case ToolCall():
                    raise AssertionError("no tools were offered")

    def _whole(self) -> CompletionResponse:
        choices = [choice.take() for choice in self._choices]
        if self._asked.return_token_ids:
            for choice in choices:
                choice.prompt_token_ids = list(self._prompt_ids[choice.index // self._n])
        return CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=self._usage(),
        )

    def _chunks(self, events: Events) -> Iterator[dict[str, object]]:
        self._take(events)
        for choice in self._shown(events):
            yield self._chunk(choice.take().model_dump(exclude_unset=True))

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
