"""The ASGI application."""

from collections.abc import Sequence

from fastapi import FastAPI

from hybrid_cache.api import routes_chat, routes_completions, routes_model, routes_service
from hybrid_cache.api.errors import install_error_handlers
from hybrid_cache.api.middleware import MAX_BODY_BYTES, ApiKeys, BodyLimit, RequestIds
from hybrid_cache.api.serving import Serving


def create_app(serving: Serving, *, api_keys: Sequence[str] = (), max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Routes for what is served. The engine must have been started; whoever started it stops it."""
    app = FastAPI(
        title="hybrid-cache",
        version=serving.model.version,
        description="OpenAI-compatible server for hybrid language models behind one exact prefix cache.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        strict_content_type=False,
    )
    install_error_handlers(app)
    for routes in (routes_chat, routes_completions, routes_model, routes_service):
        app.include_router(routes.router(serving))
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    app.add_middleware(RequestIds)
    return app
