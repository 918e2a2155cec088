"""A request that goes through an ASGI application in this process as if it had come over a connection of its own."""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message

from hybrid_cache.api.ray.call import Call

LAST_S = 5.0  # for an application whose client has gone
MOST_WAITING = 256  # parts of an answer that nobody has taken


async def through(app: ASGIApp, call: Call) -> AsyncGenerator[list[Message]]:
    """What the application sends, as it comes: all that waits at once. Closing it is the client's going away."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue(MOST_WAITING)
    task = asyncio.ensure_future(_run(app, call, sent, gone := asyncio.Event()))
    try:
        while (first := await sent.get()) is not None:
            batch: list[Message | None] = [first]
            while not sent.empty():
                batch.append(sent.get_nowait())
            yield [message for message in batch if message is not None]
            if None in batch:
                break
        await task
    finally:
        gone.set()
        await _end(task, sent)


async def _run(app: ASGIApp, call: Call, sent: asyncio.Queue[Message | None], gone: asyncio.Event) -> None:
    parts: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if not gone.is_set():
            await sent.put(message)

    try:
        await app(dict(call.scope), receive, send)
    finally:
        if not gone.is_set():
            await sent.put(None)


async def _end(task: "asyncio.Future[None]", sent: asyncio.Queue[Message | None]) -> None:
    """Gives it a moment to notice. What it still sends is not wanted."""
    while not sent.empty():
        sent.get_nowait()
    await asyncio.wait((task,), timeout=LAST_S)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(task, return_exceptions=True)
