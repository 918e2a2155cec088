"""What was served of late, for those whose it is: the lines of a record, without any text."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from hybrid_cache.api.server.openapi import CACHE_ERRORS
from hybrid_cache.api.server.routes.cache import seen_by
from hybrid_cache.api.server.schemas.common import MAX_SALT
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.errors import RequestError

PATH = "/cache/traffic"
NOT_RECORDED = "not_recorded"
LINES = "application/x-ndjson"


def router(serving: Serving) -> APIRouter:
    """The route, bound to a recorder."""
    routes = APIRouter(tags=["Cache"], responses=CACHE_ERRORS)

    @routes.get(PATH, response_class=StreamingResponse, responses={200: {"content": {LINES: {}}}})
    async def traffic(cache_salt: Annotated[str | None, Query(max_length=MAX_SALT)] = None) -> StreamingResponse:
        """A record of the latest requests, as `serve --record` writes it."""
        may, recorder = seen_by(cache_salt), serving.recorder
        if recorder is None or not recorder.has_memory:
            raise RequestError(
                "this server keeps no traffic in memory: start it with --record-memory 64MiB, or with --record FILE",
                code=NOT_RECORDED,
            )
        stats = serving.text.engine.stats()
        totals = {"prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens}
        lines = await asyncio.to_thread(lambda: [*recorder.traffic(may, totals)])
        return StreamingResponse(iter(lines), media_type=LINES)

    return routes
