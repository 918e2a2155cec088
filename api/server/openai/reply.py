"""An answer in OpenAI's JSON: what chat and text completions share."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from functools import partial

from hybrid_cache.api.server.cache_report import shown_report
from hybrid_cache.api.server.errors import Problem
from hybrid_cache.api.server.json_text import json_bytes, json_in_pieces
from hybrid_cache.api.server.responses import DONE, event, event_of
from hybrid_cache.api.server.schemas.common import GenerationRequest, PromptTokensDetails, Usage
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.answer import Answer, Events
from hybrid_cache.api.text.text_work import LONG_TEXT

CHOICE_SIZE = 8  # of a choice beside its tokens, in these


class OpenAIReply(ABC):
    """The reply to one request, either whole or as server-sent events."""

    chunk: str  # the kind of object that an event holds

    def __init__(self, serving: Serving, asked: GenerationRequest, answer: Answer, prefix: str) -> None:
        """`prefix` begins the reply's id."""
        self._answer = answer
        self._tokenizer = serving.text.tokenizer
        self._work = serving.text.work
        self._tenant = current_tenant_or(asked.cache_salt)
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = asked.model or serving.model.name
        self._fingerprint = serving.model.system_fingerprint
        options = asked.stream_options
        self._reports_usage = options is not None and bool(options.include_usage)
        self._reports_usage_so_far = options is not None and bool(options.continuous_usage_stats)

    async def whole(self) -> bytes:
        """Waits for the end of all choices."""
        async for events in self._answer:
            self._take(events)
        return await self._work.run(
            self._tenant, self._size(), lambda: json_in_pieces({**self._whole(), **self._cache_report()})
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """An event for each thing to show, as it comes; usage if asked for; [DONE]."""
        async for events in self._answer:
            chunks = iter(self._chunks(events))
            size = self._size_of(events)
            next_chunk = partial(_next_chunk, chunks, json_in_pieces if size > LONG_TEXT else json_bytes)
            while (data := await self._work.run(self._tenant, size, next_chunk)) is not None:
                yield event_of(data)
        if self._reports_usage:
            usage = self._usage().model_dump()
            yield event({**self._head(), "choices": [], "usage": usage, **self._cache_report()})
        yield DONE

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        await self._answer.aclose()

    def failed(self, problem: Problem) -> bytes:
        """The last event of a stream that fails."""
        return event(problem.body())

    @abstractmethod
    def _take(self, events: Events) -> None:
        """Adds events to what is known of the answer."""

    @abstractmethod
    def _whole(self) -> Mapping[str, object]:
        """The reply, once all is known. Called on a thread if it is large."""

    @abstractmethod
    def _chunks(self, events: Events) -> Iterable[Mapping[str, object]]:
        """Takes events -> what to show of them. Each is made on a thread if it is large."""

    @abstractmethod
    def _size(self) -> int:
        """Tokens and log-probabilities in the whole reply."""

    @abstractmethod
    def _size_of(self, events: Events) -> int:
        """The same of the largest of the chunks that events cause."""

    def _chunk(self, choice: Mapping[str, object], extra: Mapping[str, object] | None = None) -> dict[str, object]:
        chunk = {**self._head(), "choices": [choice], **(extra or {})}
        if self._reports_usage:
            chunk["usage"] = self._usage().model_dump() if self._reports_usage_so_far else None
        elif choice["finish_reason"] is not None:
            chunk |= self._cache_report()
        return chunk

    def _cache_report(self) -> dict[str, object]:
        return shown_report(self._tokenizer, self._answer)

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": self.chunk,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _usage(self) -> Usage:
        used = self._answer.usage
        return Usage(
            prompt_tokens=used.prompt,
            completion_tokens=used.completion,
            total_tokens=used.prompt + used.completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=used.cached, cache_write_tokens=used.written),
        )


def _next_chunk(chunks: Iterator[Mapping[str, object]], written: Callable[[object], bytes]) -> bytes | None:
    chunk = next(chunks, None)
    return None if chunk is None else written(chunk)
