"""Text to tokens and back, and what the tokenizer says of itself."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.facts import facts
from hybrid_cache.api.server.json_text import json_in_pieces
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
from hybrid_cache.api.text.text_work import still_wanted
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Prompt


def router(everything: Serving) -> APIRouter:
    """The routes, bound to the tokenizers of the server. /detokenize raises RequestError for unknown ids."""
    routes = APIRouter(route_class=JsonRoute, tags=["Tokens"], responses=ERRORS)

    @routes.post("/tokenize", response_model=TokenizeResponse)
    async def tokenize(asked: TokenizeRequest, request: Request) -> Response:
        """The tokens that the same prompt or messages would have in a completion."""
        text = everything.named(asked.model).text
        prompt = await unless_gone(request, _prompt(text, asked))
        facts().prompt_tokens = len(prompt.tokens)

        def reply() -> bytes:
            tokens = prompt.tokens.tolist()
            shown = TokenizeResponse(count=len(tokens), max_model_len=text.max_length, tokens=tokens)
            if asked.return_token_strs:
                shown.token_strs = [_token_text(text.tokenizer, token) for token in tokens]
            return json_in_pieces(shown.model_dump(exclude_unset=True))

        return await _made(text, request, len(prompt.tokens), reply)

    @routes.post("/detokenize", response_model=DetokenizeResponse)
    async def detokenize(asked: DetokenizeRequest, request: Request) -> Response:
        """The text of some tokens, special ones included."""
        text = everything.named(asked.model).text
        size = text.vocab_size

        def reply() -> bytes:
            wrong = next((token for token in asked.tokens if token >= size), None)
            if wrong is not None:
                raise RequestError(f"token {wrong} is outside the vocabulary [0, {size})", param="tokens")
            return json_in_pieces(DetokenizeResponse(prompt=text.tokenizer.decode(asked.tokens)).model_dump())

        return await _made(text, request, len(asked.tokens), reply)

    @routes.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> TokenizerInfo:
        text = everything.named(model).text
        tokenizer = text.tokenizer
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


async def _made(text: TextEngine, request: Request, size: int, reply: Callable[[], bytes]) -> Response:
    """A reply about `size` tokens, made on a thread if they are many."""
    body = await unless_gone(request, text.work.run(current_tenant_or(None), size, reply))
    return Response(body, media_type="application/json")


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    still_wanted()
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
