"""Responses that notice when the client goes away, so that its work in the engine ends within a step."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid_cache.api.server.errors import Problem, current_request_id, logger, problem_of
from hybrid_cache.api.server.facts import facts
from hybrid_cache.api.server.json_text import json_bytes
from hybrid_cache.errors import HybridCacheError

T = TypeVar("T")
KEEP_ALIVE_S = 15.0
ACTIVE = "x-adapter-active"  # of an activated adapter: 1 where the prompt invokes it, 0 where the base answers
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return event_of(json_bytes(data))


def event_of(data: bytes) -> bytes:
    """One server-sent event of JSON."""
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: Mapping[str, object]) -> bytes:
    """One server-sent event with a name, which its data repeats."""
    return b"event: " + name.encode() + b"\n" + event({"type": name, **data})


class Reply(Protocol):
    """An answer in the JSON of one dialect: either whole or as events, and once."""

    async def whole(self) -> bytes:
        """Waits for the end."""
        ...

    def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, as the answer comes."""
        ...

    def failed(self, problem: Problem) -> bytes:
        """The last event of a stream that fails."""
        ...

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        ...


async def respond(request: Request, reply: Reply, *, stream: bool, active: Sequence[bool] = ()) -> Response:
    """The reply, whole or as a stream. What still runs is aborted when the client goes away.

    active: of an activated adapter, whether each prompt switches it on
    """
    headers = {ACTIVE: ",".join("01"[each] for each in active)} if active else {}
    if stream:
        return EventStream(reply.events(), reply.aclose, reply.failed, headers=headers)
    async with aclosing(reply):
        body = await unless_gone(request, reply.whole())
    return Response(body, media_type="application/json", headers=headers)


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`. If the client goes away first, cancels it and raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        await _cancel(task)
        await _cancel(gone)


class EventStream(Response):
    """Server-sent events as they come, with a comment now and then that keeps idle connections open."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], Awaitable[None]],
        failed: Callable[[Problem], bytes],
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """`close` is called at the end, whatever the end is, and even if no event was ever asked for."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._failed = failed
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if await self._send_events(send, gone):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(gone)
            await self._close()
            await self._events.aclose()

    async def _send_events(self, send: Send, gone: asyncio.Future[None]) -> bool:
        """False if the client went away before the last event."""
        following = asyncio.ensure_future(self._next())
        try:
            while True:
                await asyncio.wait((following, gone), timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return False
                body = following.result() if following.done() else KEEP_ALIVE
                if body is None:
                    return True
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if following.done():
                    following = asyncio.ensure_future(self._next())
        finally:
            await _cancel(following)

    async def _next(self) -> bytes | None:
        """The next event, None after the last one. The headers are out, so a failure becomes an event, too."""
        try:
            return await anext(self._events, None)
        except HybridCacheError as error:
            return self._fail(error)
        except Exception as error:
            logger.exception("the stream of request %s failed", current_request_id.get())
            return self._fail(error)

    def _fail(self, error: Exception) -> bytes:
        """The last event."""
        problem = facts().problem = problem_of(error)
        return self._failed(problem)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[T]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
