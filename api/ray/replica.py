"""A replica: a whole server, without a socket of its own."""

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import Message

from hybrid_cache.api.ray.call import REPLICA, Call
from hybrid_cache.api.ray.fleet import Stats
from hybrid_cache.api.ray.holdings import Holdings
from hybrid_cache.api.ray.tunnel import through
from hybrid_cache.api.server.serving import current_onlooker
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import EngineStopped
from hybrid_cache.tokens import Prompt

SLOWER = 0.98  # a rate that was reached is believed a little less with each look


class Pace:
    """The tokens of prompts a second that an engine has read at its best of late."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._before, self._looked_s = 0, time.monotonic()
        self.rate = 0.0

    def look(self) -> float:
        computed, now = self._engine.stats().computed_tokens, time.monotonic()
        passed_s = now - self._looked_s
        if passed_s > 0 and computed > self._before:
            self.rate = max(self.rate * SLOWER, (computed - self._before) / passed_s)
        self._before, self._looked_s = computed, now
        return round(self.rate, -1)


class Server:
    """Answers calls, and says what it could answer fast. Belongs to one event loop."""

    def __init__(self, app: FastAPI, engine: AsyncEngine, mark: str) -> None:
        """app: of the engine, which has not started"""
        self._app, self._engine, self._mark = app, engine, mark
        self._holdings = Holdings(states=self._engine.model.cache_spec.slot_bytes > 0)
        self._engine.record(self._holdings.journal)
        self._pace = Pace(self._engine)
        self._unread: dict[int, int] = {}  # tokens of calls whose answers have not begun, at a guess
        self._open = AsyncExitStack()

    async def start(self) -> None:
        await self._open.enter_async_context(self._app.router.lifespan_context(self._app))

    async def aclose(self) -> None:
        """Running requests get the time that the server's settings say. Idempotent."""
        await self._open.aclose()

    def check(self) -> None:
        """Raises EngineStopped unless it can answer."""
        if not self._engine.alive or self._engine.hung:
            raise EngineStopped("the engine hangs" if self._engine.alive else "the engine has failed")

    def stats(self) -> Stats:
        return Stats(digest=self._holdings.digest(), owed=sum(self._unread.values()), rate=self._pace.look())

    async def answer(self, call: Call) -> AsyncGenerator[list[Message]]:
        """ASGI messages. Each says which replica it is from."""

        def learn(namespace: str, prompt: Prompt) -> None:
            self._holdings.learn(call.chain, namespace, prompt)

        current_onlooker.set(learn)
        self._unread[id(call)] = call.unread
        messages = through(self._app, call)
        try:
            async for batch in messages:
                for message in batch:
                    self._see(call, message)
                yield batch
        finally:
            self._unread.pop(id(call), None)
            await messages.aclose()

    def _see(self, call: Call, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: Any = MutableHeaders(scope=message)
            headers[REPLICA] = self._mark
        elif message.get("body"):
            self._unread.pop(id(call), None)
