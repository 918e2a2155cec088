"""An ingress in front of replicas in one process: all but Ray."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import httpx
from starlette.types import ASGIApp, Message

from hybrid_cache.api.ray.arguments import options_of
from hybrid_cache.api.ray.call import Call
from hybrid_cache.api.ray.fleet import Fleet
from hybrid_cache.api.ray.ingress import Gone, ingress
from hybrid_cache.api.ray.replica import Server
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.servers import new_app, new_engine

SECRET = b"secret"
Answerer = Callable[[Call], AsyncGenerator[list[Message]]]


@dataclass
class Local:
    """Replicas by their marks, which say what they hold before each request."""

    replicas: dict[str, Answerer]
    said: Callable[[str], dict[str, object]] = lambda mark: {}
    fleet: Fleet = field(default_factory=Fleet)
    words: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)  # in the order in which they were
    closed: list[str] = field(default_factory=list)

    def app(self) -> ASGIApp:
        return ingress(options_of(self.words), self.fleet, self.reach, SECRET)

    async def reach(self, call: Call) -> AsyncGenerator[list[Message]]:
        now = time.monotonic()
        self.fleet.hear({mark: self.said(mark) for mark in self.replicas}, now)
        ranked = self.fleet.rank(call, now)
        if not ranked:
            raise Gone
        self.asked.append(ranked[0])
        try:
            async with aclosing(self.replicas[ranked[0]](call)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self.closed.append(ranked[0])

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            yield client


@asynccontextmanager
async def servers(
    text: TextModel, *words: str, number: int = 2, **settings: object
) -> AsyncIterator[tuple[Local, dict[str, AsyncEngine]]]:
    """Real ones, whose model is a small sum. words: options that the ingress knows, settings: that they have"""
    engines = {f"r{i}": new_engine() for i in range(number)}
    found = {mark: Server(new_app(engine, text, **settings), engine, mark) for mark, engine in engines.items()}
    async with AsyncExitStack() as stack:
        for each in found.values():
            await each.start()
            stack.push_async_callback(each.aclose)
        answerers = {mark: each.answer for mark, each in found.items()}
        yield Local(answerers, lambda mark: {**found[mark].stats()}, words=words), engines


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))
