"""Responses that notice when the client goes away, so that its work in the engine ends within a step."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid_cache.api.errors import problem_of
from hybrid_cache.api.stream import KEEP_ALIVE, event
from hybrid_cache.errors import HybridCacheError

T = TypeVar("T")
KEEP_ALIVE_S = 15.0
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or server-sent events when `stream` is true.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

logger = logging.getLogger("hybrid_cache.api")


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`. If the client goes away first, cancels it and raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Server-sent events as they come, with a comment now and then so that nobody takes silence for death."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        following: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                following = following or asyncio.ensure_future(anext(self._events))
                await asyncio.wait({following, gone}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not following.done():
                    await _send_body(send, KEEP_ALIVE)
                    continue
                try:
                    body = following.result()
                except StopAsyncIteration:
                    break
                following = None
                await _send_body(send, body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(gone, *([following] if following else []))
            await self._events.aclose()


async def ending_with_errors(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events; a failure after the headers becomes the last of them."""
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except Exception as error:
            if not isinstance(error, HybridCacheError):
                logger.exception("a stream has failed")
            yield event(problem_of(error).body())


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
