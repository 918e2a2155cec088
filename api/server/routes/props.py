"""GET /props and GET /slots: what a server is set to, and who is in it now."""

import time
from typing import Annotated

from fastapi import APIRouter, Query, Request

from hybrid_cache import __version__
from hybrid_cache.api.server.openapi import CACHE_ERRORS, LOOKUP_ERRORS
from hybrid_cache.api.server.responses import unless_gone
from hybrid_cache.api.server.schemas.common import MAX_SALT
from hybrid_cache.api.server.schemas.props import ModelProps, Props, Slot, Slots
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or, is_operator
from hybrid_cache.api.text.answer import request_id_in
from hybrid_cache.engine.census import Occupant, census

MOST_LISTED = 1000
SLOT_ERRORS = {status: shown for status, shown in CACHE_ERRORS.items() if status not in (403, 404)}


def router(serving: Serving) -> APIRouter:
    """The routes, bound to the server they speak for."""
    routes = APIRouter(tags=["Server"])
    engine, settings = serving.text.engine, serving.settings

    @routes.get("/props", responses=LOOKUP_ERRORS)
    async def props() -> Props:
        """What holds for all requests: models, limits, the chat template."""
        return Props(
            version=__version__,
            models=[_model(each) for each in (serving, *serving.variants.values())],
            backend=settings.backend,
            exact=settings.exact,
            inexact=list(settings.inexact),
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            budget_bytes=engine.stats().cache.budget_bytes,
            max_body_bytes=settings.max_body_bytes,
            special_tokens_in_content=settings.special_tokens_in_content,
            shared_cache=settings.shared_cache,
        )

    @routes.get("/slots", responses=SLOT_ERRORS)
    async def slots(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
        cache_salt: Annotated[str | None, Query(max_length=MAX_SALT)] = None,
    ) -> Slots:
        """The requests that wait or run: those of one's own key, of all for an operator's, and without keys those of
        the salt.
        """
        tenant, sees_all = current_tenant_or(cache_salt), is_operator.get() and cache_salt is None

        def may_see(other: str) -> bool:
            return sees_all or other == tenant

        found = await unless_gone(request, engine.ask(lambda core: census(core, may_see, time.monotonic())))
        shown = [_slot(serving, each) for each in found[:limit]]
        return Slots(data=shown, total=len(found), max_running=engine.max_running, max_waiting=engine.max_waiting)

    return routes


def _model(serving: Serving) -> ModelProps:
    model, text = serving.model, serving.text
    return ModelProps(
        id=model.name,
        aliases=[*model.names[1:]],
        parent=model.parent,
        adapter=model.adapter,
        dtype=model.dtype,
        context=text.max_length,
        longest=text.engine.longest_sequence,
        vocab_size=text.vocab_size,
        tool_format=text.tools.name,
        thinks=text.thoughts is not None,
        chat_template=text.chat.source,
        special_tokens=dict(text.tokenizer.named_tokens),
        generation_defaults_ignored=list(text.defaults.ignored),
    )


def _slot(serving: Serving, occupant: Occupant) -> Slot:
    return Slot(
        id=occupant.request_id,
        request_id=request_id_in(occupant.request_id),
        choice=occupant.choice,
        model=occupant.model or serving.model.name,
        state=occupant.state,
        prompt_tokens=occupant.prompt_tokens,
        computed_tokens=occupant.computed_tokens,
        cached_tokens=occupant.cached_tokens,
        generated_tokens=occupant.generated_tokens,
        age_s=round(occupant.age_s, 4),
    )
