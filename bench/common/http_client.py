"""What all clients of a server share: its address, a connection, what it counts, and what can go wrong."""

from collections.abc import AsyncIterator
from typing import TypeVar

import httpx
import typer
from pydantic import BaseModel, ValidationError

from hybrid_cache.errors import HybridCacheError

Event = TypeVar("Event", bound=BaseModel)


class ServerFailed(HybridCacheError):
    """The server under test cannot be reached, refused a request, or broke off in the middle of a reply."""


class Details(BaseModel):
    cached_tokens: int | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class ModelCard(BaseModel):
    id: str
    max_model_len: int | None = None  # tokens of a prompt and its answer; not all servers say


class ModelList(BaseModel):
    data: list[ModelCard]


def server_url(url: str) -> str:
    """The root of the server, also if the address of its `/v1` was given."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise typer.BadParameter(f"{url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise typer.BadParameter(f"{url!r}, wanted an address such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def open_client(url: str, key: str | None = None, timeout_s: float = 600.0) -> httpx.AsyncClient:
    """timeout_s: until the next byte"""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A connection for each request: a request on a kept one can meet the server closing it, and is lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5), limits=limits)


def message_of(error: object) -> str:
    """The message inside an OpenAI error object, or all of it."""
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)[:500]


def refused(response: httpx.Response) -> ServerFailed:
    try:
        body = response.json()
    except ValueError:
        body = response.text
    error = body.get("error", body) if isinstance(body, dict) else body
    return ServerFailed(f"{response.request.url}: HTTP {response.status_code}: {message_of(error)}")


def unreachable(http: httpx.AsyncClient, error: httpx.TransportError) -> ServerFailed:
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError):
        return ServerFailed(f"{http.base_url}: no connection, is the server running? ({reason})")
    return ServerFailed(f"{http.base_url}: the connection broke or timed out ({reason})")


async def streamed(
    http: httpx.AsyncClient, path: str, body: object, event: type[Event], headers: dict[str, str] | None = None
) -> AsyncIterator[Event]:
    """The events of a streamed reply. Raises ServerFailed, also if an event is none."""
    try:
        async with http.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                raise refused(response)
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield event.model_validate_json(data)
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    except ValidationError as error:
        raise ServerFailed(f"{path}: not an event of the OpenAI stream: {error}") from error


async def first_model(http: httpx.AsyncClient) -> ModelCard:
    """The first model that the server lists. Raises ServerFailed."""
    try:
        response = await http.get("/v1/models")
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    if response.status_code != 200:
        raise refused(response)
    try:
        return ModelList.model_validate_json(response.content).data[0]
    except (ValidationError, IndexError) as error:
        raise ServerFailed(f"{response.request.url}: lists no model, name one with --model") from error
