"""Pages for people: what this server is, what is cached, which routes there are.

A page is files that hold nothing of the server's, so they need no key, as neither does /health; what they show they ask
for, with the key that is typed in. Nothing is loaded from elsewhere.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from hybrid_cache.api.server.openapi import CACHE_ERRORS
from hybrid_cache.api.server.page_files import FILES, FOLDER, PAGES
from hybrid_cache.api.server.responses import event, unless_gone
from hybrid_cache.api.server.routes.cache import seen_by, shown, shown_state
from hybrid_cache.api.server.schemas.cache import CacheOutline, Gone, OutlinedConversation
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import Overloaded
from hybrid_cache.stats import EngineStats

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LIVE_S = 1.0  # between two events
MOST_LIVE = 16  # pages that are followed at once
MOST_OUTLINED = 200
MOST_GONE = 15


def router(serving: Serving) -> APIRouter:
    """The routes, bound to the server that they show."""
    routes = APIRouter(tags=["Cache"])
    engine = serving.text.engine
    followers = 0

    def add(path: str, name: str, kind: str) -> None:
        body = (FOLDER / name).read_bytes()

        async def send() -> Response:
            return Response(body, media_type=kind, headers=HEADERS)

        routes.add_api_route(path, send, methods=["GET"], include_in_schema=False, name=name)

    for path, name in PAGES.items():
        add(path, name, "text/html")
    for name, kind in FILES.items():
        add(f"/pages/{name}", name, kind)

    async def follow() -> AsyncGenerator[bytes]:
        """An event each second, until the reader goes away or the server ends."""
        nonlocal followers
        followers += 1
        try:
            while engine.alive and not engine.draining:
                yield event(sample(engine.stats()))
                await asyncio.sleep(LIVE_S)
        finally:
            followers -= 1

    @routes.get("/cache/live", include_in_schema=False)
    async def live() -> Response:
        """Counts as server-sent events; the same are in /metrics."""
        if followers >= MOST_LIVE:
            raise Overloaded(f"{followers} pages are followed, limit {MOST_LIVE}")
        return StreamingResponse(follow(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @routes.get("/cache/outline", responses=CACHE_ERRORS)
    async def outline(request: Request, limit: Annotated[int, Query(ge=1, le=MOST_OUTLINED)] = 50) -> CacheOutline:
        """The conversations that were used last, with the states on their paths, and what has gone last."""
        sees = seen_by(None)

        def question(core: Engine) -> CacheOutline:
            inventory = Inventory(core.cache, sees)
            found = [
                OutlinedConversation(**shown(serving, each).model_dump(), states=[shown_state(s) for s in states])
                for each, states in inventory.latest(limit)
            ]
            return CacheOutline(data=found, total=inventory.num_conversations, gone=gone(core))

        return await unless_gone(request, engine.ask(question))

    return routes


def gone(core: Engine) -> list[Gone]:
    """States that went last, or were not kept."""
    pool = core.cache.pool
    now = pool.clock()
    return [
        Gone(kind=fate.kind.value, end=fate.end.value, age_s=now - fate.time, score=fate.score)
        for fate in pool.fates.latest_states(MOST_GONE)
        if fate.kind is not None
    ]


def sample(stats: EngineStats) -> dict[str, object]:
    """What the page of the cache shows of a moment."""
    cache = stats.cache
    return {
        "time": time.time(),
        "budget": cache.budget_bytes,
        "bytes": cache.bytes_by_kind,
        "tokens": {"hit": cache.hit_tokens, "kv_only": cache.kv_only_tokens, "miss": cache.miss_tokens},
        "flops_saved": stats.flops_saved,
        "running": stats.running,
        "waiting": stats.waiting,
        "loading": stats.loading,
        "paused": stats.pauses.num_paused,
        "admissions": cache.admissions,
        "declines": cache.declines,
        "evictions": cache.evictions,
        "misses": cache.misses,
        "missed_tokens": cache.missed_tokens,
        "host": {"bytes": cache.host_bytes, "stores": cache.host_stores, "loads": cache.host_loads},
    }
