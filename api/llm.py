"""A model in this process, text in and text out.

    from hybrid_cache import LLM

    with LLM() as llm:
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

Requests are read, rendered, queued and answered by what the HTTP server uses, so the tokens are the server's.
"""

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, TypeVar, Unpack, overload

from pydantic import ValidationError

from hybrid_cache.api.server.budget import plan_memory
from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.api.server.openai.messages import conversation_of
from hybrid_cache.api.server.routes.chat import chat_spec
from hybrid_cache.api.server.routes.completions import completion_specs
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import GenerationRequest
from hybrid_cache.api.server.schemas.completions import CompletionRequest
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import Begin, End, Event, GenerationSpec, Text, Thought
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import EngineStopped, RequestError
from hybrid_cache.models import folders
from hybrid_cache.request import CacheMode
from hybrid_cache.sizes import parse_budget

T = TypeVar("T")
R = TypeVar("R", bound=GenerationRequest)
Message = Mapping[str, object]  # as in a chat completion: role, content ...
Conversation = Sequence[Message]
END_S = 10.0  # for the thread to end


class Options(TypedDict, total=False):
    """How an answer is made. What is left out is the model's own default."""

    temperature: float  # 0 is greedy
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int  # `generate` stops after 16 where nothing is said
    min_tokens: int
    stop: str | list[str]  # what ends the answer; it is no part of it
    response_format: dict[str, object]  # as in a chat completion: json_object, json_schema
    chat_template_kwargs: dict[str, object]  # for `chat` only
    use_cache: bool  # False: everything is computed, and nothing kept


Reader = Callable[[object, Options], Coroutine[Any, Any, GenerationSpec]]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop, length
    prompt_tokens: int
    cached_tokens: int  # of the prompt, not computed
    completion_tokens: int
    thought: str  # what a model that thinks wrote before it answered
    first_token_s: float  # seconds to the first token, with the time in the queue

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model and its cache, on a thread of their own: use it from any thread, also while an event loop runs."""

    def __init__(
        self,
        model: str | None = None,
        *,
        budget: str = "auto",
        backend: str = "auto",
        fast: bool = False,
        dtype: str = "auto",
        adapter: str | None = None,
        threads: int = 0,
        max_model_len: int | None = None,
        revision: str | None = None,
        chat_template: str | Path | None = None,
        **config: Any,
    ) -> None:
        """Loads a model folder; the embedded model without one. Raises HybridCacheError.

        budget: of the cache, such as "2GiB"; the others as in `hybrid-cache serve`
        config: other fields of `EngineConfig`
        """
        path = None if revision is None else folders.resolve(model, revision)
        loaded = load(
            LoadOptions(model, backend, fast, dtype, threads, adapter, max_model_len=max_model_len, path=path)
        )
        text = TextModel.load(loaded.path)
        text = text if chat_template is None else text.with_template(Path(chat_template))
        engine = EngineConfig(**config)
        engine = replace(engine, budget_bytes=plan_memory(loaded, engine, parse_budget(budget)).budget_bytes)
        self.name = loaded.name
        self._text = TextEngine.of(AsyncEngine(loaded.model, engine), text)
        self._loop = _LoopThread()
        self._room = asyncio.Semaphore(engine.max_waiting)  # requests beyond it wait here, and are not refused
        self._loop.run(_start(self._text))
        self._end = weakref.finalize(self, _end, self._loop, self._text)

    @overload
    def chat(self, messages: Conversation, **options: Unpack[Options]) -> Completion: ...
    @overload
    def chat(self, messages: Sequence[Conversation], **options: Unpack[Options]) -> list[Completion]: ...
    def chat(
        self, messages: Conversation | Sequence[Conversation], **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """The answer to a conversation, or to each of several, which run as one batch.

        Raises RequestError for what the server would answer with a 400.
        """
        if _is_batch(messages):
            return self._run(self._complete(self._chat_spec, messages, options))
        return self._run(self._complete(self._chat_spec, [messages], options))[0]

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Completion: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[Completion]: ...
    def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> Completion | list[Completion]:
        """Continues a text, or each of several, which run as one batch. Raises RequestError."""
        if isinstance(prompt, list):
            return self._run(self._complete(self._text_spec, prompt, options))
        return self._run(self._complete(self._text_spec, [prompt], options))[0]

    def stream(self, messages: Conversation, **options: Unpack[Options]) -> Iterator[str]:
        """The answer to a conversation piece by piece. Leaving the loop early ends the work. Raises RequestError."""
        return self._stream(self._run(self._chat_spec(messages, options)))

    def close(self) -> None:
        """Ends what runs, and frees the memory. Idempotent."""
        self._end()
        vars(self).pop("_text", None)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}{'' if self._end.alive else ', closed'})"

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._end.alive:
            work.close()
            raise EngineStopped(f"{self!r}: it answers nothing any more")
        return self._loop.run(work)

    async def _chat_spec(self, messages: object, options: Options) -> GenerationSpec:
        asked = _read(ChatRequest, options, messages=_messages(messages))
        conversation = await conversation_of(self._text, asked, asked.messages)
        spec = await chat_spec(self._text, asked, conversation.prompt, talk=conversation.talk)
        return _with_cache(spec, options)

    async def _text_spec(self, prompt: object, options: Options) -> GenerationSpec:
        if not isinstance(prompt, str):
            raise RequestError(f"a prompt is {quoted(prompt)}, must be a text", param="prompt")
        (spec,) = await completion_specs(self._text, _read(CompletionRequest, options, prompt=prompt))
        return _with_cache(spec, options)

    async def _complete(self, read: Reader, inputs: Sequence[object], options: Options) -> list[Completion]:
        """Reads all inputs before any runs."""
        specs = [await read(each, options) for each in inputs]
        return list(await asyncio.gather(*map(self._completion, specs)))

    async def _completion(self, spec: GenerationSpec) -> Completion:
        collected = _Collected()
        async with self._room:
            begun = time.perf_counter()
            async with await Answer.to(self._text, [spec]) as answer:
                async for events in answer:
                    for event in events:
                        collected.take(event, time.perf_counter() - begun)
        return collected.completion()

    def _stream(self, spec: GenerationSpec) -> Iterator[str]:
        pieces = self._pieces(spec)
        try:
            while piece := self._run(_next(pieces)):
                yield piece
        finally:
            if self._end.alive:
                self._run(pieces.aclose())

    async def _pieces(self, spec: GenerationSpec) -> AsyncGenerator[str, None]:
        async with self._room, await Answer.to(self._text, [spec]) as answer:
            async for events in answer:
                for event in events:
                    if isinstance(event, Text) and event.text:
                        yield event.text


class _LoopThread:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hybrid-cache-llm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises. An interrupt, such as Ctrl-C, ends the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():
            self._loop.close()


class _Collected:
    """An answer as it grows."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._token_ids: list[int] = []
        self._first_s: float | None = None
        self._end: End | None = None

    def take(self, event: Event, seconds: float) -> None:
        """seconds: since the request was queued"""
        if isinstance(event, End):
            self._end = event
        elif not isinstance(event, Begin):
            self._first_s = seconds if self._first_s is None else self._first_s
            if event.token is not None:
                self._token_ids.append(event.token.id)
            if isinstance(event, Text | Thought):
                (self._texts if isinstance(event, Text) else self._thoughts).append(event.text)

    def completion(self) -> Completion:
        assert self._end is not None
        usage = self._end.usage
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._end.finish.value,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            thought="".join(self._thoughts),
            first_token_s=self._first_s or 0.0,
        )


async def _start(text: TextEngine) -> None:
    text.engine.start()


def _end(loop: _LoopThread, text: TextEngine) -> None:
    loop.run(text.engine.stop(0))
    loop.end()


async def _next(pieces: AsyncGenerator[str, None]) -> str:
    """Empty at the end."""
    return await anext(pieces, "")


def _is_batch(messages: Conversation | Sequence[Conversation]) -> TypeGuard[Sequence[Conversation]]:
    return isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], Mapping | str)


def _messages(messages: object) -> list[object]:
    """Raises RequestError for what is no list."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is {quoted(messages)}, must be a list of objects", param="messages")
    return [dict(each) if isinstance(each, Mapping) else each for each in messages]


def _read(schema: type[R], options: Options, **fields: object) -> R:
    """A request of the server's. Raises RequestError, and TypeError for an option that there is not."""
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of an answer, there are {', '.join(Options.__annotations__)}")
    given = {name: value for name, value in options.items() if name != "use_cache"}
    try:
        return schema.model_validate({**given, **fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        why = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where} is {quoted(first['input'])}: {why}", param=where) from None


def _with_cache(spec: GenerationSpec, options: Options) -> GenerationSpec:
    if options.get("use_cache", True):
        return spec
    return replace(spec, cache_mode=CacheMode.OFF, talk=None)
