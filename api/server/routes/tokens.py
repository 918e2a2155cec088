"""Text to tokens and back, and what the tokenizer says of itself."""

from fastapi import APIRouter, Request

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.openai.messages import conversation_of
from hybrid_cache.api.server.openapi import ERRORS
from hybrid_cache.api.server.responses import unless_gone
from hybrid_cache.api.server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Prompt


def router(serving: Serving) -> APIRouter:
    """The routes, bound to the tokenizer of the server. /detokenize raises RequestError for unknown ids."""
    routes = APIRouter(route_class=JsonRoute, tags=["Tokens"], responses=ERRORS)
    text, tokenizer = serving.text, serving.text.tokenizer

    @routes.post("/tokenize", response_model_exclude_unset=True)
    async def tokenize(asked: TokenizeRequest, request: Request) -> TokenizeResponse:
        """The tokens that the same prompt or messages would have in a completion."""
        serving.model.check_name(asked.model)
        tokens = (await unless_gone(request, _prompt(text, asked))).tokens.tolist()
        reply = TokenizeResponse(count=len(tokens), max_model_len=text.max_length, tokens=tokens)
        if asked.return_token_strs:
            reply.token_strs = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
        return reply

    @routes.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest, request: Request) -> DetokenizeResponse:
        """The text of some tokens, special ones included."""
        serving.model.check_name(asked.model)
        size = text.vocab_size
        wrong = next((token for token in asked.tokens if token >= size), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} is outside the vocabulary [0, {size})", param="tokens")
        decoding = text.work.run(current_tenant_or(None), len(asked.tokens), lambda: tokenizer.decode(asked.tokens))
        return DetokenizeResponse(prompt=await unless_gone(request, decoding))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        named = tokenizer.named_tokens
        return TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            vocab_size=tokenizer.vocab_size,
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            eos_token_id=tokenizer.eos_id,
            chat_template=text.chat.source,
        )

    return routes


async def _prompt(text: TextEngine, asked: TokenizeRequest) -> Prompt:
    if asked.messages is not None:
        return (await conversation_of(text, asked, asked.messages)).prompt
    special = asked.add_special_tokens is not False
    return await text.prompt(asked.prompt or "", current_tenant_or(None), add_special_tokens=special)
