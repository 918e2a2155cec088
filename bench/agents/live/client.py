"""Chat completions of an OpenAI-compatible server: their tool calls, their times and their tokens."""

import time
from dataclasses import dataclass, field

import httpx
from pydantic import BaseModel

from hybrid_cache.bench.common.http_client import ServerFailed, Usage, message_of, streamed

PATH = "/v1/chat/completions"


class _Function(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _Call(BaseModel):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Delta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(BaseModel):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Event(BaseModel):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: object = None


@dataclass(slots=True)
class ToolCall:
    """As it was streamed so far."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    @property
    def json(self) -> dict[str, object]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True)
class Answer:
    """One reply. Times of `time.perf_counter`."""

    sent_s: float
    first_s: float = 0.0  # the first event with a token; 0: there was none
    last_s: float = 0.0
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    num_events: int = 0  # that brought something
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # None: the server does not say

    @property
    def message(self) -> dict[str, object]:
        """As it is sent back."""
        calls = {"tool_calls": [call.json for call in self.calls]} if self.calls else {}
        return {"role": "assistant", "content": self.content or (None if self.calls else ""), **calls}

    def take(self, delta: _Delta) -> None:
        if not (delta.content or delta.reasoning_content or delta.tool_calls):
            return
        self.num_events += 1
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.content += delta.content or ""
        for part in delta.tool_calls or ():
            while len(self.calls) <= part.index:
                self.calls.append(ToolCall())
            call = self.calls[part.index]
            call.id, call.name = part.id or call.id, part.function.name or call.name
            call.arguments += part.function.arguments or ""


@dataclass(frozen=True, slots=True)
class ChatClient:
    """Asks one server."""

    http: httpx.AsyncClient
    model: str

    async def ask(self, body: dict[str, object], headers: dict[str, str] | None = None) -> Answer:
        """Raises ServerFailed."""
        asked = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        answer, counted = Answer(time.perf_counter()), False
        async for event in streamed(self.http, PATH, asked, _Event, headers):
            if event.error:
                raise ServerFailed(f"the server broke off: {message_of(event.error)}")
            for choice in event.choices:
                answer.take(choice.delta)
            if event.usage is not None and event.usage.prompt_tokens and event.usage.completion_tokens:
                details, counted = event.usage.prompt_tokens_details, True
                answer.prompt_tokens = event.usage.prompt_tokens
                answer.completion_tokens = event.usage.completion_tokens
                answer.cached_tokens = details.cached_tokens if details else None
        answer.last_s = answer.last_s or time.perf_counter()
        answer.first_s = answer.first_s or answer.last_s
        if not counted:
            raise ServerFailed(f"{PATH}: the stream ended without `usage`, by which its tokens are counted")
        return answer
