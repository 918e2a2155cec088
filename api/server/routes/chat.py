"""POST /v1/chat/completions"""

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.openai.chat_reply import ChatReply
from hybrid_cache.api.server.openai.choreography import Arranged, arranged_prompt, is_arranged
from hybrid_cache.api.server.openai.messages import conversation_of
from hybrid_cache.api.server.openai.parsing import asks_for_form, check_tokens, sampling_params, source_of, spec_of
from hybrid_cache.api.server.openapi import ERRORS, EVENTS, HINTS
from hybrid_cache.api.server.responses import respond, unless_gone
from hybrid_cache.api.server.schemas.chat import ChatRequest, ChatResponse, NamedTool
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.grammars import Source
from hybrid_cache.api.text.messages import Talk
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tool_grammars import call_source
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Prompt


def router(everything: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @routes.post(
        "/v1/chat/completions", response_model=ChatResponse, responses={**ERRORS, **EVENTS}, openapi_extra=HINTS
    )
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        serving = everything.named(asked.model)
        spec, arranged = await unless_gone(request, _parse(serving, asked))
        answer = await serving.answer([spec], request.headers, asked)
        return await respond(
            request, ChatReply(serving, asked, answer, arranged), stream=bool(asked.stream), active=answer.active
        )

    return routes


async def _parse(serving: Serving, asked: ChatRequest) -> tuple[GenerationSpec, Arranged | None]:
    """What is wanted, and of a choreography what its reply needs."""
    if is_arranged(asked):
        arranged = await arranged_prompt(serving, asked)
        return await chat_spec(serving.text, asked, arranged.prompt, arranged.arrangement), arranged
    conversation = await conversation_of(serving.text, asked, asked.messages)
    return await chat_spec(serving.text, asked, conversation.prompt, talk=conversation.talk), None


async def chat_spec(
    text: TextEngine,
    asked: ChatRequest,
    prompt: Prompt,
    arrangement: Arrangement | None = None,
    talk: Talk | None = None,
) -> GenerationSpec:
    """What is wanted of a prompt that a conversation has become. Raises RequestError."""
    check_tokens(text, asked)
    if arrangement is not None and asked.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not known of a choreography", param="prompt_logprobs")
    wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    max_tokens = text.answer_length(prompt, wanted, text.max_length, "messages")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    sampling = sampling_params(text, asked, max_tokens, logprobs=logprobs, prompt_logprobs=asked.prompt_logprobs)
    tools = None if asked.tool_choice == "none" else [tool.model_dump() for tool in asked.tools or ()]
    form = text.answer_form(prompt, tools)
    asks = asks_for_form(asked) or asked.tool_choice not in (None, "none", "auto")
    asks = asks or any(tool.function.strict for tool in asked.tools or ())
    source = partial(_source, text, asked) if asks else None
    grammar = await text.grammar(source, form, current_tenant_or(asked.cache_salt), body_size())
    return spec_of(
        text,
        asked,
        prompt,
        sampling,
        form=form,
        grammar=grammar,
        arrangement=arrangement,
        talk=talk,
        one_call=asked.parallel_tool_calls is False,
    )


def _source(text: TextEngine, asked: ChatRequest) -> Source | None:
    """What the answer has to be: one that has to be a call has no text that could have another form.

    Raises RequestError.
    """
    source, choice = source_of(asked), asked.tool_choice
    functions = [tool.function.model_dump() for tool in asked.tools or ()]
    parallel = asked.parallel_tool_calls is not False
    if choice == "none" or (choice in (None, "auto") and not functions):
        return source
    if choice in (None, "auto"):
        return text.open_source(functions, source, parallel=parallel)
    only = choice.function.name if isinstance(choice, NamedTool) else None
    return call_source(text.tools, functions, text.tokenizer, only=only, parallel=parallel and only is None)
