"""What routers ask before they subscribe to KV events, and by these names: vLLM's and SGLang's."""

import uuid

from fastapi import APIRouter

from hybrid_cache.api.server.kv_events.publisher import Publisher
from hybrid_cache.api.server.kv_events.wire import BLOCK_TOKENS
from hybrid_cache.api.server.openapi import LOOKUP_ERRORS, Responses
from hybrid_cache.api.server.schemas.kv_events import KVEventSource, ServerInfo
from hybrid_cache.api.server.serving import Serving

ERRORS: Responses = {status: LOOKUP_ERRORS[status] for status in (401, 421)}


def router(serving: Serving, publisher: Publisher | None) -> APIRouter:
    """publisher: None where no events are published"""
    routes = APIRouter(tags=["Server"], responses=ERRORS)
    instance = uuid.uuid4().hex

    @routes.get("/get_server_info")
    async def server_info() -> ServerInfo:
        """The model, and how many tokens a block of its KV events has."""
        return ServerInfo(
            model_id=serving.model.name,
            model_path=serving.model.path,
            served_model_name=serving.model.name,
            instance_id=instance,
            kv_block_size=BLOCK_TOKENS,
            max_model_len=serving.text.max_length,
        )

    @routes.get("/kv_event_sources")
    async def event_sources() -> dict[str, KVEventSource]:
        """Where KV events are published, by data parallel rank; empty without `--kv-events-config`."""
        return {} if publisher is None else {"0": KVEventSource.model_validate(publisher.source())}

    return routes
