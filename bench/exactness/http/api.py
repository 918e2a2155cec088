"""Requests, and replies of both forms: whole, or as a stream that is put together."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from pydantic import BaseModel

from hybrid_cache.api.server.schemas.chat import ChatLogprob, FunctionOut
from hybrid_cache.api.server.schemas.choreography import ChoreographyReport
from hybrid_cache.bench.common.http_client import Details, refused, unreachable
from hybrid_cache.bench.exactness.http.report import Json

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the server with a cache."""

    path: str
    body: Json
    labels: tuple[str, ...]
    messages: tuple[Json, ...] = ()  # of a chat, with texts in place of references
    delay_s: float = 0.0  # from the start of its burst
    events: int | None = None  # read of a stream before the connection is dropped
    seconds: float | None = None  # the same by time

    @property
    def aborted(self) -> bool:
        return self.events is not None or self.seconds is not None

    @property
    def salt(self) -> str:
        return str(self.body.get("cache_salt", ""))

    def json(self) -> Json:
        """All that is needed to send it again."""
        how = {"delay_s": self.delay_s, "events": self.events, "seconds": self.seconds}
        return {"path": self.path, "body": self.body, **how}

    def plainly(self, order: Sequence[int]) -> Json:
        """The body for a server that knows of no choreography, with the messages in this order."""
        body = {k: v for k, v in self.body.items() if k not in ("choreography", "stream", "stream_options")}
        return {**body, "messages": [self.messages[i] for i in order]} if self.messages else body


class SaidCall(BaseModel):
    function: FunctionOut


class Said(BaseModel):
    """A message, or what an event adds to it."""

    content: str | None = None
    tool_calls: list[SaidCall] | None = None


class Logprobs(BaseModel):
    """In the form of chat, or that of text completions."""

    content: list[ChatLogprob] = []
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def entries(self) -> list[Json]:
        rows = zip(self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset, strict=True)
        texts: list[Json] = [{"token": t, "logprob": p, "top": top, "offset": at} for t, p, top, at in rows]
        return texts + [entry.model_dump() for entry in self.content]


class Piece(BaseModel):
    """A choice, or what an event adds to it."""

    index: int
    text: str = ""
    message: Said | None = None
    delta: Said | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    prompt_tokens_details: Details | None = None


class Event(BaseModel):
    """A whole reply, or an event of a stream."""

    choices: list[Piece] = []
    usage: Usage | None = None
    choreography: ChoreographyReport | None = None
    prompt_token_ids: list[int] | None = None
    error: object = None


@dataclass(slots=True)
class Choice:
    """One answer, as it grows."""

    text: str = ""
    calls: list[Json] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None

    def take(self, piece: Piece) -> None:
        said = piece.message or piece.delta or Said()
        self.text += piece.text + (said.content or "")
        self.calls += [call.function.model_dump() for call in said.tool_calls or ()]
        self.logprobs += piece.logprobs.entries() if piece.logprobs else []
        self.tokens += piece.token_ids or []
        self.finish, self.stop = piece.finish_reason or self.finish, piece.stop_reason or self.stop

    def json(self) -> Json:
        said = {"text": self.text, "tool_calls": self.calls, "logprobs": self.logprobs, "tokens": self.tokens}
        return {**said, "finish": self.finish, "stop": self.stop}

    def core(self) -> Json:
        """What does not depend on whether the answer was asked for as chat or as text."""
        return {"tokens": self.tokens, "logprobs": [entry["logprob"] for entry in self.logprobs]}


@dataclass(slots=True)
class Reply:
    """What came back, whole or as events."""

    status: int
    error: str = ""
    choices: dict[int, Choice] = field(default_factory=dict)
    report: ChoreographyReport | None = None
    prompts: list[list[int]] = field(default_factory=list)  # tokens, where the server reports them
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def take(self, event: Event) -> None:
        for piece in event.choices:
            self.choices.setdefault(piece.index, Choice()).take(piece)
            self.prompts += [piece.prompt_token_ids] if piece.prompt_token_ids else []
        self.prompts += [event.prompt_token_ids] if event.prompt_token_ids else []
        self.report = event.choreography or self.report
        self.error = str(event.error) if event.error else self.error
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            self.prompt_tokens = event.usage.prompt_tokens
            self.cached_tokens = (details.cached_tokens if details else None) or 0

    def json(self) -> Json:
        outcome: Json = {"status": self.status, "error": self.error}
        return outcome | {f"choice {i}": choice.json() for i, choice in sorted(self.choices.items())}

    def core(self) -> Json:
        return {f"choice {i}": choice.core() for i, choice in sorted(self.choices.items())}


async def ask(http: httpx.AsyncClient, path: str, body: Mapping[str, object]) -> Reply:
    """Raises ServerFailed where no answer comes, or the server says that it is broken."""
    try:
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code == 503:
                    raise refused(response)
                return Reply(response.status_code, error=response.text)
            reply = Reply(200)
            if not body.get("stream"):
                reply.take(Event.model_validate(json.loads(await response.aread())))
                return reply
            ended = False
            async for data in _events(response):
                ended = data == "[DONE]"
                reply.take(Event() if ended else Event.model_validate(json.loads(data)))
            reply.error = reply.error or ("" if ended else "the stream broke off")
            return reply
    except httpx.TransportError as error:
        raise unreachable(http, error) from error


async def hang_up(http: httpx.AsyncClient, asked: Asked) -> None:
    """Asks, and drops the connection before the end."""
    try:
        async with asyncio.timeout(asked.seconds), http.stream("POST", asked.path, json=asked.body) as response:
            left = asked.events
            async for _ in _events(response):
                left = None if left is None else left - 1
                if left is not None and left <= 0:
                    return
    except TimeoutError:
        return
    except httpx.TransportError as error:
        raise unreachable(http, error) from error


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()
