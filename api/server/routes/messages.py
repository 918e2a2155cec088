"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect"""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hybrid_cache.api.server.anthropic.diagnostics import changes_of
from hybrid_cache.api.server.anthropic.parsing import conversation_of, spec_of
from hybrid_cache.api.server.anthropic.reply import MessageReply
from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.facts import facts
from hybrid_cache.api.server.openapi import ANTHROPIC_ERRORS, EVENTS, HINTS
from hybrid_cache.api.server.responses import respond, unless_gone
from hybrid_cache.api.server.schemas.anthropic import CountRequest, MessageResponse, MessagesRequest, TokenCount
from hybrid_cache.api.server.serving import Serving


def router(everything: Serving) -> APIRouter:
    """The routes, bound to what they serve."""
    routes = APIRouter(route_class=JsonRoute, tags=["Anthropic"], responses=ANTHROPIC_ERRORS)
    keep_billing = everything.settings.keep_billing_header

    @routes.post("/v1/messages", response_model=MessageResponse, responses=EVENTS, openapi_extra=HINTS)
    async def messages(asked: MessagesRequest, request: Request) -> Response:
        serving = everything.named(asked.model)
        conversation = await unless_gone(request, conversation_of(serving.text, asked, keep_billing=keep_billing))
        spec = await unless_gone(request, spec_of(serving.text, asked, conversation))
        changes = await unless_gone(request, changes_of(serving.text.work, serving.diagnoses, asked))
        answer = await serving.answer([spec], request.headers, asked)
        return await respond(
            request,
            MessageReply(serving, asked, spec, answer, changes),
            stream=bool(asked.stream),
            active=answer.active,
        )

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(asked: CountRequest, request: Request) -> TokenCount:
        """The tokens that the same messages would have as a prompt."""
        serving = everything.named(asked.model)
        conversation = await unless_gone(request, conversation_of(serving.text, asked, keep_billing=keep_billing))
        facts().prompt_tokens = len(conversation.prompt.tokens)
        return TokenCount(input_tokens=len(conversation.prompt.tokens))

    return routes
