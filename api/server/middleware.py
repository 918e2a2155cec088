"""What happens to every request before it reaches a route: an id, a host, a key, bounds on its body. Pure ASGI, so that
a client's going away reaches the routes."""

import asyncio
import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_cache.api.server.bodies import values_in
from hybrid_cache.api.server.errors import (
    Problem,
    body_too_large,
    body_too_slow,
    current_request_id,
    problem_of,
    too_many_values,
    unauthorized,
    wrong_host,
)
from hybrid_cache.api.server.facts import KEY_CHARACTERS, facts
from hybrid_cache.api.server.gate import LOOKING, Visit, current_visit
from hybrid_cache.api.server.page_files import PATHS
from hybrid_cache.api.server.refusal import refuse, send_problem
from hybrid_cache.api.server.tenants import current_tenant, is_operator, shared_cache, tenant_of
from hybrid_cache.errors import EngineStopped, Overloaded

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics", *PATHS})  # no key needed
LEAST_BODY_RATE = 64 * 2**10  # bytes a second, after the time that every body has

_REQUEST_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?")

logger = logging.getLogger("hybrid_cache.api")


class RequestIds:
    """Gives every response an `x-request-id` and a `request-id`, the client's own if it sent one.

    It also answers for bugs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        current_request_id.set(request_id)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id  # OpenAI's name and Anthropic's
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # by a server that has waited long enough for this request
            if started:
                raise
            problem = problem_of(EngineStopped("the server is ending"))
            await problem.response(scope["path"])(scope, receive, send_with_id)
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                logger.exception("request %s failed", request_id)
            if started:
                raise
            await problem.response(scope["path"])(scope, receive, send_with_id)


class Hosts:
    """Answers requests that name this server, and no others: a web page whose name leads here has one of its own."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        """names: without ports; an IPv6 address in brackets"""
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")
        found = _HOST.fullmatch(host)
        if found and found[1].lower() in self._names:
            return await self._app(scope, receive, send)
        await refuse(wrong_host(host), scope, receive, send)


class ApiKeys:
    """Lets in requests that carry one of the keys, each of which is a tenant.

    Only digests are kept, and all of them are compared. A key comes as `Authorization: Bearer KEY` or `x-api-key: KEY`.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], *, shared: bool = False, operator_keys: Sequence[str] = ()
    ) -> None:
        """shared: all keys share one cache; each has its share of the engine all the same
        operator_keys: of these, those that may look after the whole cache
        """
        self._app = app
        self._tenants = [(_digest(key.encode()), tenant_of(key)) for key in keys]
        self._shared = shared
        self._operators = frozenset(map(tenant_of, operator_keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        tenant = self._tenant(Headers(scope=scope))
        if tenant is not None:
            current_tenant.set(tenant)
            facts().key = tenant[:KEY_CHARACTERS]
            shared_cache.set(self._shared)
            is_operator.set(tenant in self._operators)
            return await self._app(scope, receive, send)
        await refuse(unauthorized(), scope, receive, send)

    def _tenant(self, headers: Headers) -> str | None:
        """Whose key a request carries; None without a known one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        shown = _digest(key.strip().encode("latin-1", "replace"))
        found = [tenant for known, tenant in self._tenants if secrets.compare_digest(shown, known)]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Refusal:
    problem: Problem
    more: bool  # of the body comes in meanwhile, and is to be dropped


class BodyLimit:
    """Reads the body of a request, whatever its framing; answers 413 when it is too large and 408 when too slow."""

    def __init__(self, app: ASGIApp, limit: int, max_values: int, timeout_s: float) -> None:
        """limit: bytes   max_values: JSON values   timeout_s: seconds, and more for each byte at LEAST_BODY_RATE"""
        self._app = app
        self._limit = limit
        self._max_values = max_values
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in LOOKING:
            return await self._app(scope, receive, send)
        visit = current_visit.get()
        messages = await self._read(receive, visit)
        if isinstance(messages, _Refusal):
            if visit is not None:
                visit.leave()
            answer = refuse if messages.more else send_problem
            return await answer(messages.problem, scope, receive, send)
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, visit: Visit | None) -> list[Message] | _Refusal:
        """The parts of a body, or why it is not taken."""
        messages: list[Message] = []
        size, num_values, more = 0, 0, True
        begin = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(begin + self._timeout_s) as clock:
                while more and size <= self._limit:
                    message = await receive()
                    body = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(body)
                    num_values += values_in(body)
                    if visit is not None:
                        visit.add_bytes(len(body))
                    messages.append(message)
                    clock.reschedule(begin + self._timeout_s + size / LEAST_BODY_RATE)
        except TimeoutError:
            return _Refusal(body_too_slow(self._timeout_s, LEAST_BODY_RATE), more=False)
        except Overloaded as error:
            return _Refusal(problem_of(error), more)
        if size > self._limit:
            return _Refusal(body_too_large(self._limit), more)
        return _Refusal(too_many_values(self._max_values), more) if num_values > self._max_values else messages


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
