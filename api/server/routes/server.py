"""The server about itself: its models, its health, its version, its metrics."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from hybrid_cache import __version__
from hybrid_cache.api.server.errors import ModelNotFound
from hybrid_cache.api.server.openapi import LOOKUP_ERRORS, UNAVAILABLE
from hybrid_cache.api.server.schemas.server import DiskHealth, Health, ModelCard, ModelList, Readiness, Ready, Version
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.stats import DiskStats


def _disk_health(disk: DiskStats | None) -> DiskHealth | None:
    if disk is None:
        return None
    used = {"budget_bytes": disk.budget_bytes, "used_bytes": disk.used_bytes, "entries": disk.entries}
    return DiskHealth(**used, refused=disk.refused, not_saved=disk.not_saved)


def router(serving: Serving) -> APIRouter:
    """The routes, bound to the server they speak for."""
    routes = APIRouter(tags=["Server"])
    engine, settings, model = serving.text.engine, serving.settings, serving.model

    def cards() -> Iterator[ModelCard]:
        for each in (serving, *serving.variants.values()):
            invocation = [*each.model.invocation]
            for name in each.model.names:
                yield ModelCard(
                    id=name,
                    object="model",
                    created=settings.created,
                    owned_by="hybrid-cache",
                    root=PurePath(each.model.path).name or each.model.name,
                    parent=each.model.parent,
                    text_differs=list(each.model.text_difference.parts),
                    same_tokens=each.model.text_difference.same_tokens,
                    max_model_len=each.text.max_length,
                    invocation=each.text.tokenizer.decode(invocation) if invocation else None,
                    invocation_tokens=invocation or None,
                )

    @routes.get("/v1/models", responses=LOOKUP_ERRORS)
    async def models() -> ModelList:
        return ModelList(object="list", data=[*cards()])

    @routes.get("/v1/models/{name:path}", responses=LOOKUP_ERRORS)
    async def one_model(name: str) -> ModelCard:
        if not name:
            raise ModelNotFound("a model has a name", param="model")
        serving.named(name)
        return next(card for card in cards() if card.id == name)

    @routes.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the engine runs; a draining engine still does, one that has not ended a step for long does not."""
        status: Literal["ok", "hung", "failed"] = "failed" if not engine.alive else "hung" if engine.hung else "ok"
        body = Health(
            status=status,
            exact=settings.exact,
            inexact=list(settings.inexact),
            backend=settings.backend,
            fallbacks={**settings.fallbacks, **engine.fallbacks},
            model=model.name,
            adapter=settings.adapter,
            variants=[*serving.variants],
            variant_bytes={name: each.model.own_bytes for name, each in serving.variants.items()},
            dtype=model.dtype,
            disk=_disk_health(engine.stats().cache.disk),
            version=__version__,
        )
        return JSONResponse(body.model_dump(), 200 if status == "ok" else UNAVAILABLE)

    @routes.get("/ready", response_model=Ready, responses={503: {"model": Ready}})
    async def ready() -> Response:
        """Whether new requests are welcome."""
        status: Readiness = "draining" if engine.draining else "ready"
        if engine.hung or not engine.alive:
            status = "hung" if engine.hung else "failed"
        return JSONResponse(Ready(status=status).model_dump(), 200 if status == "ready" else UNAVAILABLE)

    @routes.get("/ping", response_class=Response, responses={503: {"description": "The engine has failed or hangs."}})
    async def ping() -> Response:
        return Response(status_code=200 if engine.alive and not engine.hung else UNAVAILABLE)

    @routes.get("/version")
    async def version() -> Version:
        return Version(version=__version__)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        body, content_type = serving.metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    return routes
