"""Answers to requests whose body nobody wants."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from hybrid_cache.api.server.errors import Problem

DRAINED_BYTES = 40 * 2**20  # four times the default limit
DRAINED_S = 5.0
SILENCE_S = 0.3  # who sends nothing for so long waits for the answer


async def refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, once what has been sent of the body is read and dropped, within bounds.

    A connection that is closed while data comes in is reset, and the client may never see the answer.
    """
    if Headers(scope=scope).get("expect", "").lower() != "100-continue":  # else the client waits for this answer
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINED_S):
                await _drain(receive)
    await send_problem(problem, scope, receive, send)


async def send_problem(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once."""
    await problem.response(scope["path"])(scope, receive, send)


async def _drain(receive: Receive) -> None:
    size, more = 0, True
    while more and size < DRAINED_BYTES:
        async with asyncio.timeout(SILENCE_S):
            message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
