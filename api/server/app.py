"""The HTTP application: routes, middleware and the engine's lifetime."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hybrid_cache import __version__
from hybrid_cache.api.server.bodies import MAX_VALUES
from hybrid_cache.api.server.errors import install_error_handlers
from hybrid_cache.api.server.gate import Admission
from hybrid_cache.api.server.kv_events.disk import Disk
from hybrid_cache.api.server.kv_events.origins import Origins
from hybrid_cache.api.server.kv_events.publisher import Publisher
from hybrid_cache.api.server.middleware import ApiKeys, BodyLimit, Hosts, RequestIds
from hybrid_cache.api.server.recording.recorder import Recorder
from hybrid_cache.api.server.remarks import IGNORED, REARRANGED, RemarkHeaders
from hybrid_cache.api.server.request_log import RequestLog
from hybrid_cache.api.server.responses import ACTIVE
from hybrid_cache.api.server.routes import (
    adapters,
    cache,
    chat,
    completions,
    kv_events,
    messages,
    pages,
    props,
    responses,
    server,
    tokens,
    traffic,
)
from hybrid_cache.api.server.routes.adapters import LoadVariant
from hybrid_cache.api.server.serving import Variant, new_serving
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.tracing import Tracing
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine


def create_app(
    engine: AsyncEngine,
    text: TextModel,
    settings: ServerSettings,
    variants: Iterable[Variant] = (),
    load_variant: LoadVariant | None = None,
    tracing: Tracing | None = None,
    recorder: Recorder | None = None,
    publisher: Publisher | None = None,
) -> FastAPI:
    """An application that starts the engine with itself, and drains and stops it at its end.

    variants: those of the engine   load_variant: loads one with an adapter, where clients may ask for that
    tracing: makes spans of requests; it is closed at the end   recorder: listens to the engine; likewise
    publisher: of KV events; it is stopped at the end
    """
    serving = new_serving(engine, text, settings, variants, recorder)
    if recorder is not None:
        engine.listen(recorder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if recorder is not None:
            recorder.start()
        if publisher is not None:
            engine.record(publisher.journal)
            origins = Origins(serving, salted=publisher.config.publish_salted)
            disk = None if engine.disk_folder is None else Disk(engine.disk_folder, engine.disk_identities)
            publisher.start(origins, grouped=engine.model.cache_spec.slot_bytes > 0, disk=disk)
        engine.start()
        yield
        await engine.stop(settings.drain_timeout_s)
        await serving.responses.aclose()
        if tracing is not None:
            tracing.close()
        if recorder is not None:
            recorder.close()
        if publisher is not None:
            publisher.stop()

    # No documentation pages: they load their scripts from elsewhere. /openapi.json is ours.
    # No redirects either: they would lead to whatever host the client names.
    app = FastAPI(
        title="hybrid-cache",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for routes in (chat, completions, responses, messages, tokens, cache, traffic, props, server):
        app.include_router(routes.router(serving))
    app.include_router(kv_events.router(serving, publisher))
    if settings.pages:
        app.include_router(pages.router(serving))
    if publisher is not None:
        serving.metrics.also(publisher.families)
    if load_variant is not None:
        app.include_router(adapters.router(serving, load_variant))
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(RemarkHeaders)
    max_values = max(MAX_VALUES, 2 * engine.model.max_length)
    app.add_middleware(
        BodyLimit, limit=settings.max_body_bytes, max_values=max_values, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(Admission, gate=serving.gate)
    if settings.api_keys:
        app.add_middleware(
            ApiKeys, keys=settings.api_keys, shared=settings.shared_cache, operator_keys=settings.operator_keys
        )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "Retry-After", ACTIVE, IGNORED, REARRANGED),
        )
    if settings.allowed_hosts:
        app.add_middleware(Hosts, names=settings.allowed_hosts)
    app.add_middleware(RequestIds)
    app.add_middleware(RequestLog, content=settings.log_content, tracing=tracing)
    return app
