"""From a checked API request to pieces of text, by way of the engine. Chat and text completions share all of this."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from hybrid_cache.api.server.schemas.common import GenerationRequest, PromptTokensDetails, Usage
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.api.text.stream import ChoiceText, Detokenizer, Piece, make_stopper
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.errors import BadSampling, ContextTooLong
from hybrid_cache.request import CacheMode, PromptOutput, Request, SamplingParams, TokenOutput
from hybrid_cache.tokens import Prompt

Event = PromptOutput | Piece


@dataclass(frozen=True, slots=True)
class Wanted:
    """What chat and text completions ask for in different words."""

    endpoint: str
    prompt: Prompt
    max_tokens: int | None
    default_max_tokens: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    visible: frozenset[int] = frozenset()  # special tokens that have text all the same
    arrangement: Arrangement | None = None


class Generation:
    """One request in the engine. Iterate over its events; leaving the `async with` block aborts what still runs."""

    def __init__(self, serving: Serving, asked: GenerationRequest, wanted: Wanted) -> None:
        """Queues the request. Raises RequestError, Overloaded or EngineStopped."""
        self.id = uuid.uuid4().hex
        self.prompt_tokens = wanted.prompt.tokens.tolist()
        self.prompt_output = PromptOutput(cached_tokens=0, written_tokens=0)
        self.completion_tokens = 0
        self.n = asked.n or 1
        sampling = sampling_params(serving, asked, wanted)
        stops = asked.stop or []
        skip: frozenset[int] = frozenset()
        if asked.skip_special_tokens is not False:
            skip = serving.tokenizer.special_ids - wanted.visible

        def detokenizer() -> Detokenizer:
            return Detokenizer(serving.tokenizer, self.prompt_tokens, skip)

        named, include = asked.stop_token_ids or [], bool(asked.include_stop_str_in_output)
        self._texts = [
            ChoiceText(detokenizer(), stops, sampling.stop_token_ids, named, include_stop=include)
            for _ in range(self.n)
        ]
        self._stream = serving.engine.submit(
            Request(
                id=self.id,
                prompt=wanted.prompt,
                sampling=sampling,
                n=self.n,
                namespace=asked.cache_salt or "",
                cache_mode=cache_mode(asked, wanted),
                make_stopper=make_stopper(detokenizer, stops) if stops else None,
                arrangement=wanted.arrangement,
            )
        )
        self._observe = serving.metrics.observe
        self._times = _Times(wanted.endpoint, self.n)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Event:
        try:
            output = await anext(self._stream)
        except StopAsyncIteration:
            self._record()
            raise
        if isinstance(output, PromptOutput):
            self.prompt_output = output
            return output
        return self._piece(output)

    def _piece(self, output: TokenOutput) -> Piece:
        if output.token is not None:
            self.completion_tokens += 1
            self._times.token(output.index)
        if output.finish is not None:
            self._times.finish_reasons[output.index] = output.finish.value
        return self._texts[output.index].push(output)

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        await self._stream.aclose()
        self._record()

    def _record(self) -> None:
        """Tells the metrics about this request, once."""
        observe, self._observe = self._observe, lambda record: None
        observe(self._times.record(len(self.prompt_tokens), self.prompt_output, self.completion_tokens))


class _Times:
    """When the tokens of a request came."""

    def __init__(self, endpoint: str, n: int) -> None:
        self.finish_reasons = ["abort"] * n
        self._endpoint = endpoint
        self._start = time.monotonic()
        self._first: float | None = None
        self._latest: list[float | None] = [None] * n
        self._gaps: list[float] = []

    def token(self, index: int) -> None:
        now, before = time.monotonic(), self._latest[index]
        if self._first is None:
            self._first = now - self._start
        if before is not None:
            self._gaps.append(now - before)
        self._latest[index] = now

    def record(self, prompt_tokens: int, prompt: PromptOutput, completion_tokens: int) -> RequestRecord:
        return RequestRecord(
            endpoint=self._endpoint,
            finish_reasons=tuple(self.finish_reasons),
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt.cached_tokens,
            completion_tokens=completion_tokens,
            queued_s=prompt.queued_s,
            first_token_s=self._first,
            inter_token_s=tuple(self._gaps),
            total_s=time.monotonic() - self._start,
        )


class Generations:
    """Several requests in the engine that make one reply. Events come with the number of the request they belong to."""

    def __init__(self) -> None:
        self.all: list[Generation] = []

    @classmethod
    async def submit(cls, serving: Serving, asked: GenerationRequest, wanted: Sequence[Wanted]) -> "Generations":
        """Queues all of them or none. Raises RequestError, Overloaded or EngineStopped."""
        generations = cls()
        try:
            for each in wanted:
                generations.all.append(Generation(serving, asked, each))
        except BaseException:
            await generations.aclose()
            raise
        return generations

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all requests as they come."""
        if len(self.all) == 1:
            async for event in self.all[0]:
                yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue()

        async def pump(number: int, generation: Generation) -> None:
            try:
                async for event in generation:
                    queue.put_nowait((number, event))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(i, g)) for i, g in enumerate(self.all)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> "Generations":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        for generation in self.all:
            await generation.aclose()

    def usage(self) -> Usage:
        """What has been used so far."""
        prompt = sum(len(g.prompt_tokens) for g in self.all)
        completion = sum(g.completion_tokens for g in self.all)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(g.prompt_output.cached_tokens for g in self.all),
                cache_write_tokens=sum(g.prompt_output.written_tokens for g in self.all),
            ),
        )


def sampling_params(serving: Serving, asked: GenerationRequest, wanted: Wanted) -> SamplingParams:
    """What the request asks for, else what the model's generation_config.json says, else OpenAI's defaults."""
    defaults = serving.defaults
    _check_tokens(serving, asked)
    named = tuple(asked.stop_token_ids or ())
    model = serving.model
    eos = () if asked.ignore_eos else known_tokens(defaults.eos_ids, model.vocab_size)
    longest = wanted.default_max_tokens if wanted.max_tokens is None else wanted.max_tokens
    limit = Limit.of(model.max_length, model.budget_length, is_open=wanted.max_tokens is None)
    param = "messages" if wanted.endpoint == "chat" else "prompt"
    max_tokens = limit.answer(len(wanted.prompt.tokens), longest, param)
    return SamplingParams(
        temperature=_or(asked.temperature, defaults.temperature),
        top_p=_or(asked.top_p, defaults.top_p),
        top_k=max(0, defaults.top_k if asked.top_k is None else asked.top_k),
        min_p=_or(asked.min_p, 0.0),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, defaults.repetition_penalty),
        logit_bias=asked.logit_bias or {},
        seed=asked.seed,
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens or 0,
        stop_token_ids=(*eos, *(i for i in named if i not in eos)),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
    )


@dataclass(frozen=True, slots=True)
class Limit:
    """Tokens that a prompt and its answer may have together, and what sets this bound."""

    num_tokens: int
    bound: str

    @classmethod
    def of(cls, max_length: int, budget_length: int, *, is_open: bool) -> "Limit":
        """The answer ends where the context does; one whose length was left open, where the cache does as well."""
        if is_open and budget_length < max_length:
            return cls(budget_length, "the cache budget")
        return cls(max_length, "this model's context")

    def answer(self, num_prompt_tokens: int, longest: int, param: str) -> int:
        """Tokens that an answer of at most `longest` may have. Raises ContextTooLong if there is room for none."""
        # A prompt that fills the context may still be scored: that takes no answer.
        if num_prompt_tokens + min(longest, 1) > self.num_tokens:
            raise ContextTooLong(
                f"the prompt has {num_prompt_tokens} tokens and {self.bound} {self.num_tokens}, which must hold the "
                "prompt and its answer",
                param=param,
            )
        return min(longest, self.num_tokens - num_prompt_tokens)


def known_tokens(tokens: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Those that the model can choose: a generation_config.json may name others."""
    return tuple(token for token in tokens if token < vocab_size)


def cache_mode(asked: GenerationRequest, wanted: Wanted) -> CacheMode:
    """Log-probabilities of a prompt need all of it computed, so they leave the cache alone."""
    if wanted.prompt_logprobs is not None:
        return CacheMode.OFF
    options = asked.prompt_cache_options
    return CacheMode.EXPLICIT if options and options.mode == "explicit" else CacheMode.IMPLICIT


def _check_tokens(serving: Serving, asked: GenerationRequest) -> None:
    size = serving.model.vocab_size
    for name, tokens in (("logit_bias", asked.logit_bias), ("stop_token_ids", asked.stop_token_ids)):
        for token in tokens or ():
            if not 0 <= token < size:
                raise BadSampling(f"{name} names token {token}, the vocabulary is [0, {size})", param=name)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
