"""POST /v1/completions"""

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.openai.completion_reply import CompletionReply
from hybrid_cache.api.server.openai.parsing import (
    asks_for_form,
    check_tokens,
    most_of,
    sampling_params,
    source_of,
    spec_of,
)
from hybrid_cache.api.server.openapi import ERRORS, EVENTS
from hybrid_cache.api.server.responses import respond, unless_gone
from hybrid_cache.api.server.schemas.completions import CompletionRequest, CompletionResponse
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.grammars import Grammar
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Prompt

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(everything: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @routes.post("/v1/completions", response_model=CompletionResponse, responses={**ERRORS, **EVENTS})
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continues texts, or tokens as they are: nothing is added to them."""
        serving = everything.named(asked.model)
        specs = await unless_gone(request, completion_specs(serving.text, asked))
        answer = await serving.answer(specs, request.headers, asked)
        return await respond(
            request, CompletionReply(serving, asked, answer), stream=bool(asked.stream), active=answer.active
        )

    return routes


async def completion_specs(text: TextEngine, asked: CompletionRequest) -> list[GenerationSpec]:
    """One for each prompt. Raises RequestError."""
    _refuse_unsupported(asked)
    prompts = await _prompts(text, asked)
    source = partial(source_of, asked) if asks_for_form(asked) else None
    grammar = await text.grammar(source, AnswerForm(), current_tenant_or(asked.cache_salt), body_size())
    return [_spec(text, asked, prompt, grammar) for prompt in prompts]


def _refuse_unsupported(asked: CompletionRequest) -> None:
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise RequestError(
            f"best_of is {asked.best_of}, only the value of n ({asked.n or 1}) is supported", param="best_of"
        )
    if asked.suffix:
        raise RequestError("suffix is not supported: this model continues text, it does not fill gaps", param="suffix")


async def _prompts(text: TextEngine, asked: CompletionRequest) -> list[Prompt]:
    tenant, special = current_tenant_or(asked.cache_salt), asked.add_special_tokens is not False
    return [await text.prompt(prompt, tenant, add_special_tokens=special) for prompt in asked.prompt]


def _spec(text: TextEngine, asked: CompletionRequest, prompt: Prompt, grammar: Grammar | None) -> GenerationSpec:
    check_tokens(text, asked)
    max_tokens = text.answer_length(prompt, asked.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
    scored = most_of(asked.logprobs if asked.echo else None, asked.prompt_logprobs)
    sampling = sampling_params(text, asked, max_tokens, logprobs=asked.logprobs, prompt_logprobs=scored)
    return spec_of(text, asked, prompt, sampling, grammar=grammar)
