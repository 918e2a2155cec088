"""What happens to every request before it reaches a route: an id, a key, a bound on its size. Pure ASGI, so that a
client's going away reaches the routes."""

import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_cache.api.server.bodies import values_in
from hybrid_cache.api.server.errors import body_too_large, problem_of, too_many_values, unauthorized
from hybrid_cache.api.server.gate import current_visit
from hybrid_cache.api.server.tenants import current_tenant, shared_cache, tenant_of

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})  # no key needed
DRAINED = 4  # this many times the limit is read and dropped, so that the client gets to read our answer

_REQUEST_ID = re.compile(r"[\w-]{1,128}", re.ASCII)

logger = logging.getLogger("hybrid_cache.api")


class RequestIds:
    """Gives every response an `x-request-id`, the client's own if it sent one. Outermost: it also answers for bugs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                logger.exception("request %s failed", request_id)
            if started:
                raise
            await problem.response()(scope, receive, send_with_id)


class ApiKeys:
    """Lets in requests that carry one of the keys, each of which is a tenant.

    Only digests are kept, and all of them are compared. A key comes as `Authorization: Bearer KEY` or `x-api-key: KEY`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, shared: bool = False) -> None:
        """shared: all keys share one cache; each has its share of the engine all the same"""
        self._app = app
        self._tenants = [(_digest(key.encode()), tenant_of(key)) for key in keys]
        self._shared = shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        tenant = self._tenant(Headers(scope=scope))
        if tenant is not None:
            current_tenant.set(tenant)
            shared_cache.set(self._shared)
            return await self._app(scope, receive, send)
        response = unauthorized().response()
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _tenant(self, headers: Headers) -> str | None:
        """Whose key a request carries; None without a known one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        shown = _digest(key.strip().encode("latin-1", "replace"))
        found = [tenant for known, tenant in self._tenants if secrets.compare_digest(shown, known)]
        return found[0] if found else None


class BodyLimit:
    """Reads the body of a request, whatever its framing, and answers 413 when it is too large."""

    def __init__(self, app: ASGIApp, limit: int, max_values: int) -> None:
        """limit: bytes   max_values: JSON values"""
        self._app = app
        self._limit = limit
        self._max_values = max_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        visit = current_visit.get()
        messages: list[Message] = []
        size = num_values = 0
        while not messages or messages[-1].get("more_body", False):
            message = await receive()
            size += len(message.get("body", b""))
            num_values += values_in(message.get("body", b""))
            if visit is not None and message.get("body"):
                visit.add_bytes(len(message["body"]))
            if size > self._limit:
                messages.clear()
            messages.append(message)
            if size > DRAINED * self._limit:
                break
        if size > self._limit:
            return await body_too_large(self._limit).response()(scope, receive, send)
        if num_values > self._max_values:
            return await too_many_values(self._max_values).response()(scope, receive, send)
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
