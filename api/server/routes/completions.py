"""POST /v1/completions"""

import time
import uuid
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hybrid_cache.api.server.generation import Generation, Generations, Wanted
from hybrid_cache.api.server.logprobs import completion_logprobs, prompt_offsets
from hybrid_cache.api.server.openapi import ERRORS, EVENTS
from hybrid_cache.api.server.prompts import text_prompt
from hybrid_cache.api.server.responses import DONE, EventStream, event, unless_gone
from hybrid_cache.api.server.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.stream import Piece
from hybrid_cache.errors import RequestError
from hybrid_cache.request import FinishReason, PromptOutput

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(serving: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", response_model=CompletionResponse, responses={**ERRORS, **EVENTS})
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continues texts, or tokens as they are: nothing is added to them."""
        serving.model.check_name(asked.model)
        _refuse_unsupported(asked)
        wanted = [
            Wanted(
                endpoint="completions",
                prompt=await text_prompt(serving, prompt, add_special_tokens=asked.add_special_tokens is not False),
                max_tokens=asked.max_tokens,
                default_max_tokens=DEFAULT_MAX_TOKENS,
                logprobs=asked.logprobs,
                prompt_logprobs=asked.logprobs if asked.echo else None,
            )
            for prompt in asked.prompt
        ]
        generations = await Generations.submit(serving, asked, wanted)
        reply = _Reply(serving, asked, generations)
        if asked.stream:
            return EventStream(reply.events(), generations.aclose)
        async with generations:
            body = await unless_gone(request, reply.whole())
        return JSONResponse(body.model_dump(exclude_unset=True))

    return routes


def _refuse_unsupported(asked: CompletionRequest) -> None:
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise RequestError(
            f"best_of is {asked.best_of}, only the value of n ({asked.n or 1}) is supported", param="best_of"
        )
    if asked.suffix:
        raise RequestError("suffix is not supported: this model continues text, it does not fill gaps", param="suffix")


class _Choice:
    """One continuation of one prompt, the prompt included if it is to be echoed."""

    def __init__(self, serving: Serving, asked: CompletionRequest, prompt: str | list[int], index: int) -> None:
        self._tokenizer = serving.tokenizer
        self._asked = asked
        self._sent = prompt
        self._index = index
        self._echo = ""
        self._new_entries: list[Piece] = []
        self._prompt: tuple[Generation, PromptOutput] | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None

    def begin(self, generation: Generation, output: PromptOutput) -> bool:
        """Takes the prompt's output -> whether there is something to echo."""
        if not self._asked.echo:
            return False
        tokens = generation.prompt_tokens
        self._echo = self._sent if isinstance(self._sent, str) else self._tokenizer.decode(tokens, self._hidden())
        self._text.append(self._echo)
        self._prompt = generation, output
        return True

    def push(self, piece: Piece) -> bool:
        """Takes a piece -> whether there is something to show."""
        self._text.append(piece.text)
        if piece.output.token is not None:
            self._new_entries.append(piece)
            self._token_ids.append(piece.output.token)
        self._finish, self._stop = piece.output.finish, piece.stop
        shows_tokens = self._asked.logprobs is not None or bool(self._asked.return_token_ids)
        return bool(piece.text) or self._finish is not None or shows_tokens

    def take(self) -> CompletionChoice:
        """What has come since the last call."""
        choice = CompletionChoice(
            index=self._index,
            text="".join(self._text),
            logprobs=self._logprobs() if self._asked.logprobs is not None else None,
            finish_reason=None if self._finish is None else self._finish.value,
            stop_reason=self._stop,
        )
        if self._asked.return_token_ids:
            choice.token_ids = self._token_ids
        self._text, self._token_ids, self._new_entries, self._prompt = [], [], [], None
        return choice

    def _logprobs(self) -> CompletionLogprobs:
        pieces = self._new_entries
        tokens = [p.output.token for p in pieces if p.output.token is not None]
        entries = [p.output.logprob for p in pieces]
        offsets = [len(self._echo) + p.offset for p in pieces]
        if self._prompt is not None:
            generation, output = self._prompt
            ids = generation.prompt_tokens
            tokens = ids + tokens
            entries = [*(output.logprobs or [None] * len(ids)), *entries]
            offsets = prompt_offsets(self._tokenizer, ids, self._hidden()) + offsets
        return completion_logprobs(self._tokenizer, tokens, entries, offsets)

    def _hidden(self) -> frozenset[int]:
        """Special tokens of the prompt that its text does not show."""
        if isinstance(self._sent, str):
            bos, name = self._tokenizer.bos_id, self._tokenizer.named_tokens.get("bos_token")
            return frozenset() if bos is None or name is None or name in self._sent else frozenset({bos})
        return frozenset() if self._asked.skip_special_tokens is False else self._tokenizer.special_ids


class _Reply:
    """The answer to one request, whole or as events. Choice `p * n + i` is the i-th of prompt p."""

    def __init__(self, serving: Serving, asked: CompletionRequest, generations: Generations) -> None:
        self._asked = asked
        self._generations = generations
        self._n = asked.n or 1
        prompts = [prompt for prompt in asked.prompt for _ in range(self._n)]
        self._choices = [_Choice(serving, asked, prompt, i) for i, prompt in enumerate(prompts)]
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = asked.model or serving.model.name
        self._fingerprint = serving.model.system_fingerprint

    def _ready(self, number: int, item: PromptOutput | Piece) -> list[_Choice]:
        """Takes an event of prompt `number` -> the choices that have something to show."""
        if isinstance(item, PromptOutput):
            choices = self._choices[number * self._n : (number + 1) * self._n]
            return [c for c in choices if c.begin(self._generations.all[number], item)]
        choice = self._choices[number * self._n + item.output.index]
        return [choice] if choice.push(item) else []

    async def whole(self) -> CompletionResponse:
        """Waits for the end of all choices."""
        async for number, item in self._generations.events():
            self._ready(number, item)
        choices = [choice.take() for choice in self._choices]
        if self._asked.return_token_ids:
            for choice in choices:
                choice.prompt_token_ids = self._generations.all[choice.index // self._n].prompt_tokens
        return CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=self._generations.usage(),
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """Text as it comes; usage if asked for; [DONE]."""
        options = self._asked.stream_options
        async for number, item in self._generations.events():
            for choice in self._ready(number, item):
                yield self._chunk(choice.take())
        if options and options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._generations.usage().model_dump()})
        yield DONE

    def _chunk(self, choice: CompletionChoice) -> bytes:
        chunk: dict[str, object] = {**self._head(), "choices": [choice.model_dump(exclude_unset=True)]}
        options = self._asked.stream_options
        if options and options.include_usage:
            running = self._generations.usage().model_dump() if options.continuous_usage_stats else None
            chunk["usage"] = running
        return event(chunk)

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }
