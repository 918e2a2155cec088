"""An answer in Anthropic's JSON: a message of content blocks, whole or as events."""

import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hybrid_cache.api.server.anthropic.diagnostics import Changes, Earlier
from hybrid_cache.api.server.cache_report import shown_report
from hybrid_cache.api.server.errors import Problem
from hybrid_cache.api.server.json_text import json_in_pieces
from hybrid_cache.api.server.responses import named_event
from hybrid_cache.api.server.schemas.anthropic import (
    CacheCreation,
    MessageResponse,
    MessagesRequest,
    MessageUsage,
    StopReason,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import (
    Begin,
    CallArguments,
    CallBegin,
    CallEnd,
    End,
    Event,
    GenerationSpec,
    Text,
    Thought,
    Usage,
)
from hybrid_cache.api.text.messages import begun_object
from hybrid_cache.request import FinishReason
from hybrid_cache.tokens import Boundary

HOUR_S = 3600.0


Shown = Iterator[tuple[str, Mapping[str, object]]]  # names of events, and their data


@dataclass(slots=True)
class _Blocks:
    """The content of a message as it grows."""

    done: list[dict[str, object]] = field(default_factory=list)
    opened: Mapping[str, object] | None = None  # the block that is open, as it began
    texts: list[str] = field(default_factory=list)  # in it

    @property
    def kind(self) -> object:
        """Of the block that is open."""
        return self.opened and self.opened["type"]

    def close(self) -> bool:
        """Ends the open block -> whether there was one."""
        if self.opened is None:
            return False
        text = "".join(self.texts)
        content = {"input": begun_object(text)} if self.kind == "tool_use" else {str(self.kind): text}
        self.done.append({**self.opened, **content})
        self.opened, self.texts = None, []
        return True


def _empty(kind: str) -> dict[str, object]:
    """A block to which text is to come. Nobody checks a signature here, but clients want one."""
    block: dict[str, object] = {"type": kind, kind: ""}
    return {**block, "signature": ""} if kind == "thinking" else block


class MessageReply:
    """The reply to one request."""

    def __init__(
        self,
        serving: Serving,
        asked: MessagesRequest,
        spec: GenerationSpec,
        answer: Answer,
        changes: Changes | None = None,
    ) -> None:
        """changes: since an earlier request, if the client wants to know"""
        self._answer = answer
        self._tokenizer = serving.text.tokenizer
        self._changes = changes
        self._asked = asked
        self._work = serving.text.work
        self._tenant = current_tenant_or(None)
        self._id = f"msg_{uuid.uuid4().hex}"
        self._boundaries: Sequence[Boundary] = spec.prompt.boundaries
        self._blocks = _Blocks()
        if changes is not None:
            serving.diagnoses.keep(self._id, Earlier(changes.now, len(spec.prompt.tokens)))
        self._stop_reason: StopReason | None = None
        self._stop_sequence: str | None = None

    async def whole(self) -> bytes:
        """Waits for the end."""
        async for events in self._answer:
            for event in events:
                for _ in self._take(event):
                    pass
        size = sum(len(str(block)) for block in self._blocks.done)
        return await self._work.run(self._tenant, size, lambda: json_in_pieces(self._message()))

    async def events(self) -> AsyncGenerator[bytes]:
        """Events by name, as the answer comes."""
        async for events in self._answer:
            for event in events:
                for name, data in self._take(event):
                    yield named_event(name, data)

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        await self._answer.aclose()

    def failed(self, problem: Problem) -> bytes:
        """The last event of a stream that fails."""
        return named_event("error", problem.body_for("/v1/messages"))

    def _take(self, event: Event) -> Shown:
        """Adds an event to what is known of the answer -> what to show of it."""
        match event:
            case Begin():
                yield "message_start", {"message": self._message()}
            case Text(text=text) if text:
                yield from self._say("text", text)
            case Thought(text=text):
                yield from self._say("thinking", text)
            case CallBegin():
                yield from self._begin_block({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            case CallArguments(text=text):
                yield self._add(text, {"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self._end_block()
            case End():
                yield from self._end_block()
                self._end(event)
                ended = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
                usage = self._usage(event.usage).model_dump()
                yield "message_delta", {"delta": ended, "usage": usage, **self._cache_report()}
                yield "message_stop", {}

    def _say(self, kind: Literal["text", "thinking"], text: str) -> Shown:
        if self._blocks.kind != kind:
            yield from self._begin_block(_empty(kind))
        yield self._add(text, {"type": f"{kind}_delta", kind: text})

    def _begin_block(self, block: Mapping[str, object]) -> Shown:
        yield from self._end_block()
        self._blocks.opened = block
        yield "content_block_start", {"index": len(self._blocks.done), "content_block": block}

    def _add(self, text: str, delta: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
        self._blocks.texts.append(text)
        return "content_block_delta", {"index": len(self._blocks.done), "delta": delta}

    def _end_block(self) -> Shown:
        if self._blocks.close():
            yield "content_block_stop", {"index": len(self._blocks.done) - 1}

    def _end(self, event: End) -> None:
        if event.finish is FinishReason.LENGTH:
            full = event.usage.completion < self._asked.max_tokens
            self._stop_reason = "model_context_window_exceeded" if full else "max_tokens"
        elif any(block["type"] == "tool_use" for block in self._blocks.done):
            self._stop_reason = "tool_use"
        elif isinstance(event.stop, str) and event.stop in (self._asked.stop_sequences or ()):
            self._stop_reason, self._stop_sequence = "stop_sequence", event.stop
        else:
            self._stop_reason = "end_turn"

    def _message(self) -> dict[str, object]:
        used, diagnostics = self._answer.usage, None
        if self._changes is not None:
            diagnostics = self._changes.diagnosis(used.cached)
        message = MessageResponse(
            id=self._id,
            model=self._asked.model,
            content=self._blocks.done,
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage(used),
            diagnostics=diagnostics,
        )
        return {**message.model_dump(exclude={"cache_report", "sharing"}), **self._cache_report()}

    def _cache_report(self) -> dict[str, object]:
        return shown_report(self._tokenizer, self._answer)

    def _usage(self, used: Usage) -> MessageUsage:
        """Tokens that are new in the cache count to the longest life that a mark at or after them has asked for."""
        marks = [b.position for b in self._boundaries if b.ttl_s is not None and b.ttl_s >= HOUR_S]
        for_an_hour = min(max(max(marks, default=0) - used.cached, 0), used.written)
        return MessageUsage(
            input_tokens=used.prompt - used.cached - used.written,
            cache_creation_input_tokens=used.written,
            cache_read_input_tokens=used.cached,
            cache_creation=CacheCreation(
                ephemeral_5m_input_tokens=used.written - for_an_hour, ephemeral_1h_input_tokens=for_an_hour
            ),
            output_tokens=used.completion,
        )
