"""How the server is doing: /health, /ready, /ping, /version, /metrics"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from hybrid_cache.api import schemas
from hybrid_cache.api.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The routes, bound to what they report on."""
    routes = APIRouter(tags=["Service"])
    engine, model = serving.engine, serving.model

    @routes.get("/health", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def health() -> Response:
        """Whether the engine lives. 503 when it has failed: start the process afresh."""
        stats, alive = engine.stats(), engine.alive
        body = schemas.Health(
            status="ok" if alive else "failed",
            model=model.name,
            backend=model.backend,
            dtype=model.dtype,
            exact=model.exact,
            fingerprint=model.fingerprint,
            version=model.version,
            running=stats.running,
            waiting=stats.waiting,
        )
        return JSONResponse(body.model_dump(), 200 if alive else 503)

    @routes.get("/ready", response_model=schemas.Ready, responses={503: {"model": schemas.Ready}})
    async def ready() -> Response:
        """Whether to send requests here. 503 while the server drains."""
        if engine.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready"}) if engine.alive else JSONResponse({"status": "failed"}, 503)

    @routes.get("/ping", response_class=PlainTextResponse)
    async def ping() -> Response:
        """Answers `pong`."""
        return PlainTextResponse("pong")

    @routes.get("/version")
    async def version() -> schemas.Version:
        """The version of the server."""
        return schemas.Version(version=model.version)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
