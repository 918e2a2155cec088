"""What is cached, for those whose it is: to list, to look at, to drop."""

import re
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request

from hybrid_cache.api.server.errors import NoSuchConversation, NotAllowed, quoted
from hybrid_cache.api.server.openapi import CACHE_ERRORS
from hybrid_cache.api.server.responses import unless_gone
from hybrid_cache.api.server.schemas.cache import (
    CachedState,
    ConversationDetail,
    ConversationInfo,
    ConversationList,
    Dropped,
)
from hybrid_cache.api.server.schemas.common import MAX_SALT
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import is_operator, owner_of, salt_of
from hybrid_cache.cache.inventory import Conversation, Inventory, MaySee, StateInfo
from hybrid_cache.engine.engine import Engine
from hybrid_cache.namespaces import salt_in

MOST_LISTED = 1000
SHOWN_TOKENS = 256  # at the end of a conversation
PATH = "/cache/conversations"
_NAME = re.compile(r"[0-9a-f]{4,32}")

Salt = Annotated[str | None, Query(max_length=MAX_SALT)]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
T = TypeVar("T")


def router(serving: Serving) -> APIRouter:
    """The routes, bound to the cache. They answer between two steps of the engine."""
    routes = APIRouter(tags=["Cache"], responses=CACHE_ERRORS)
    engine = serving.text.engine

    async def ask(request: Request, salt: str | None, question: Callable[[Inventory], T]) -> T:
        sees = seen_by(salt)
        return await unless_gone(request, engine.ask(lambda core: question(Inventory(core.cache, sees))))

    @routes.get(PATH)
    async def conversations(request: Request, limit: Limit = 100, cache_salt: Salt = None) -> ConversationList:
        """The conversations that are kept, those used last first."""
        found = await ask(request, cache_salt, lambda inventory: inventory.conversations())
        return ConversationList(data=[shown(serving, each) for each in found[:limit]], total=len(found))

    @routes.get(PATH + "/{name}")
    async def one_conversation(request: Request, name: str, cache_salt: Salt = None) -> ConversationDetail:
        """One of them, by the first digits of its name: its states, and its last text."""
        prefix = _checked(name)
        whole = await ask(request, cache_salt, lambda inventory: inventory.find(prefix))
        if whole is None:
            raise _not_one(name)
        readers = serving.whose(whole.conversation.namespace)
        if not readers:  # its model has just been unloaded
            raise _not_one(name)
        return ConversationDetail(
            **shown(serving, whole.conversation).model_dump(),
            states=[shown_state(each) for each in whole.states],
            text=readers[0].text.tokenizer.decode(whole.tokens[-SHOWN_TOKENS:].tolist()),
        )

    @routes.delete(PATH + "/{name}")
    async def drop_conversation(request: Request, name: str, cache_salt: Salt = None) -> Dropped:
        """Drops what one of them has to itself, unless it is in use."""
        prefix = _checked(name)
        freed_bytes = await ask(request, cache_salt, lambda inventory: inventory.drop(prefix))
        if freed_bytes is None:
            raise _not_one(name)
        return Dropped(freed_bytes=freed_bytes)

    @routes.delete(PATH)
    async def drop_all(request: Request, cache_salt: Salt = None) -> Dropped:
        """Drops all of them, and all else that is cached for whoever asks, unless it is in use; finished turns that
        wait for their pass do not come back.
        """
        sees = seen_by(cache_salt)

        def drop(core: Engine) -> int:
            core.forget_turns(sees)
            return Inventory(core.cache, sees).drop_all()

        return Dropped(freed_bytes=await unless_gone(request, engine.ask(drop)))

    return routes


def seen_by(salt: str | None) -> MaySee:
    """The namespaces of whoever asks: an operator's key all, another one its own, and without keys that of the salt.

    Raises NotAllowed where keys share one cache, except for an operator's.
    """
    if is_operator.get() and salt is None:
        return lambda namespace: True
    owner = owner_of()
    if owner is None and not is_operator.get():
        raise NotAllowed("all API keys share one cache here, and only an operator's key (--operator-key-file) sees it")
    if owner and salt is None:
        return lambda namespace: salt_in(namespace).startswith(owner)
    own = salt_of(salt)
    return lambda namespace: salt_in(namespace) == own


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name.lower()):
        raise NoSuchConversation(f"{quoted(name)} is no name, must be 4 to 32 hexadecimal digits", param="name")
    return name.lower()


def _not_one(name: str) -> NoSuchConversation:
    return NoSuchConversation(f"no cached conversation has the name {quoted(name)}, or more than one", param="name")


def shown(serving: Serving, conversation: Conversation) -> ConversationInfo:
    end = shown_state(conversation.end).model_dump()
    models = [name for each in serving.whose(conversation.namespace) for name in each.model.names]
    whole = {"bytes": conversation.num_bytes, "hits": conversation.hits, "models": models}
    return ConversationInfo.model_validate({**end, **whole, "namespace": salt_in(conversation.namespace)})


def shown_state(state: StateInfo) -> CachedState:
    return CachedState(
        name=state.name.hex(),
        kind=state.kind,
        tokens=state.num_tokens,
        bytes=state.num_bytes,
        hits=state.hits,
        age_s=state.age_s,
        score=state.score,
    )
