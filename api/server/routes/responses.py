"""POST /v1/responses and what was stored of it: OpenAI's Responses API"""

from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.facts import facts
from hybrid_cache.api.server.gate import Gate, Visit
from hybrid_cache.api.server.json_text import json_in_pieces
from hybrid_cache.api.server.openai.response_parsing import as_chat, conversation_of, in_words_of_responses
from hybrid_cache.api.server.openai.response_reply import ResponseReply
from hybrid_cache.api.server.openai.response_turns import Turn, items_before, turn_of
from hybrid_cache.api.server.openapi import ERRORS, HINTS, NAMED_EVENTS
from hybrid_cache.api.server.responses import respond, unless_gone
from hybrid_cache.api.server.routes.chat import chat_spec
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import MAX_SALT
from hybrid_cache.api.server.schemas.responses import (
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponseObject,
    ResponsesCountRequest,
    ResponsesRequest,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.messages import SentBack
from hybrid_cache.errors import RequestError

Salt = Annotated[str | None, Query(max_length=MAX_SALT)]


def router(everything: Serving) -> APIRouter:
    """The routes, bound to what they serve."""
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=ERRORS)
    store = everything.responses

    @routes.post("/v1/responses", response_model=ResponseObject, responses=NAMED_EVENTS, openapi_extra=HINTS)
    async def create(asked: ResponsesRequest, request: Request) -> Response:
        serving = everything.named(asked.model)
        turn = await unless_gone(request, turn_of(serving, asked))
        spec = await unless_gone(request, _parse(serving, asked, turn))
        answer = await serving.answer([spec], request.headers, asked)
        return await respond(
            request, ResponseReply(serving, asked, turn, spec, answer), stream=bool(asked.stream), active=answer.active
        )

    @routes.post("/v1/responses/input_tokens")
    async def count(asked: ResponsesCountRequest, request: Request) -> InputTokens:
        """The tokens that the same input would have as a prompt."""
        serving = everything.named(asked.model)
        turn = await unless_gone(request, turn_of(serving, asked))
        conversation = await unless_gone(request, _conversation(serving, asked, as_chat(asked), turn))
        facts().prompt_tokens = len(conversation.prompt.tokens)
        return InputTokens(input_tokens=len(conversation.prompt.tokens))

    @routes.get("/v1/responses/{name}", response_model=ResponseObject)
    async def retrieve(name: str, cache_salt: Salt = None, stream: bool | None = None) -> Response:
        """A stored response, to those with its API key and the salt that it was made with."""
        if stream:
            raise RequestError(
                "stream is true: only responses in the background have one, and none are", param="stream"
            )
        return _Looked(everything.gate, (await store.find(name, cache_salt)).body)

    @routes.delete("/v1/responses/{name}")
    async def delete(name: str, cache_salt: Salt = None) -> DeletedResponse:
        """Forgets a response. Those that continue it cannot be continued any more."""
        await store.delete(name, cache_salt)
        return DeletedResponse(id=name)

    @routes.post("/v1/responses/{name}/cancel", response_model=ResponseObject)
    async def cancel(name: str, cache_salt: Salt = None) -> Response:
        """Always refuses: no response here runs in the background."""
        await store.find(name, cache_salt)
        raise RequestError("Cannot cancel a synchronous response.")

    @routes.get("/v1/responses/{name}/input_items", response_model=ItemList)
    async def input_items(
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        cache_salt: Salt = None,
    ) -> Response:
        """What a response was an answer to, with what it continues; `after` is the id of an item."""
        items = await unless_gone(request, items_before(everything, name, cache_salt))
        items = items if order == "asc" else items[::-1]
        places = {item["id"]: place + 1 for place, item in enumerate(items)}
        if after is not None and after not in places:
            raise RequestError(f"after names {after[:100]!r}, which is no item of {name}", param="after")
        start = places.get(after, 0)
        data = items[start : start + limit]
        first, last = (str(data[i]["id"]) if data else None for i in (0, -1))
        shown = ItemList(data=data, first_id=first, last_id=last, has_more=start + limit < len(items))
        return Response(json_in_pieces(shown.model_dump()), media_type="application/json")

    return routes


class _Looked(Response):
    """A stored response, which counts as the body of a request does until it is sent."""

    def __init__(self, gate: Gate, body: bytes) -> None:
        """Raises OverShare or Overloaded."""
        super().__init__(body, media_type="application/json")
        self._visit = Visit(gate, current_tenant.get())
        self._visit.add_bytes(len(body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.leave()


async def _conversation(serving: Serving, asked: ResponsesRequest, chat: ChatRequest, turn: Turn) -> Conversation:
    with in_words_of_responses():
        return await conversation_of(serving.text, asked, chat, turn)


async def _parse(serving: Serving, asked: ResponsesRequest, turn: Turn) -> GenerationSpec:
    with in_words_of_responses():
        chat = as_chat(asked)
        conversation = await conversation_of(serving.text, asked, chat, turn)
        return await chat_spec(
            serving.text, chat, conversation.prompt, talk=replace(conversation.talk, sent_back=SentBack(whole=True))
        )
