"""Request ids, the limit on bodies, and API keys. Pure ASGI: wrapping responses any other way hides disconnects."""

import hashlib
import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_cache.api.errors import body_too_large, unauthorized

MAX_BODY_BYTES = 10 << 20
MAX_DISCARDED_BYTES = 8 * MAX_BODY_BYTES  # read and dropped after that, so that the client hears why
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})
_REQUEST_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


class RequestIds:
    """Answers every request with its `x-request-id`, or with a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Reads the whole body first, and answers 413 when there is too much of it, chunked or not."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body, length, more = bytearray(), 0, True
        while more and length <= MAX_DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk = message.get("body", b"")
            length += len(chunk)
            more = message.get("more_body", False)
            if length <= self._limit:
                body += chunk
        if length > self._limit:
            await body_too_large(self._limit).response()(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_again, send)


class ApiKeys:
    """Answers 401 to requests without one of the keys. What tells how the server is doing stays open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        response = unauthorized().response()
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time taken does not tell which one was close.
        same = [secrets.compare_digest(sent, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(same)
