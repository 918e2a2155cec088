"""An answer in OpenAI's JSON: what chat and text completions share."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping

from hybrid_cache.api.server.responses import DONE, event
from hybrid_cache.api.server.schemas.common import GenerationRequest, PromptTokensDetails, Response, Usage
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.answer import Answer, Events


class OpenAIReply(ABC):
    """The reply to one request, either whole or as server-sent events."""

    chunk: str  # the kind of object that an event holds

    def __init__(self, serving: Serving, asked: GenerationRequest, answer: Answer, prefix: str) -> None:
        """`prefix` begins the reply's id."""
        self._answer = answer
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = asked.model or serving.model.name
        self._fingerprint = serving.model.system_fingerprint
        options = asked.stream_options
        self._reports_usage = options is not None and bool(options.include_usage)
        self._reports_usage_so_far = options is not None and bool(options.continuous_usage_stats)

    async def whole(self) -> Response:
        """Waits for the end of all choices."""
        async for events in self._answer:
            self._take(events)
        return self._whole()

    async def events(self) -> AsyncGenerator[bytes]:
        """An event for each thing to show, as it comes; usage if asked for; [DONE]."""
        async for events in self._answer:
            for chunk in self._chunks(events):
                yield event(chunk)
        if self._reports_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage().model_dump()})
        yield DONE

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        await self._answer.aclose()

    @abstractmethod
    def _take(self, events: Events) -> None:
        """Adds events to what is known of the answer."""

    @abstractmethod
    def _whole(self) -> Response:
        """The reply, once all is known."""

    @abstractmethod
    def _chunks(self, events: Events) -> Iterable[Mapping[str, object]]:
        """Takes events -> what to show of them."""

    def _chunk(self, choice: Mapping[str, object], extra: Mapping[str, object] | None = None) -> dict[str, object]:
        chunk = {**self._head(), "choices": [choice], **(extra or {})}
        if self._reports_usage:
            chunk["usage"] = self._usage().model_dump() if self._reports_usage_so_far else None
        return chunk

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
