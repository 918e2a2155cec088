"""The model and its tokenizer: /v1/models, /tokenize, /detokenize, /tokenizer_info"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from hybrid_cache.api import schemas
from hybrid_cache.api.errors import ERROR_RESPONSES, LOOKUP_RESPONSES
from hybrid_cache.api.logprobs import token_name
from hybrid_cache.api.prompts import chat_prompt, rendering_of, text_prompt
from hybrid_cache.api.serving import Serving
from hybrid_cache.errors import RequestError


def router(serving: Serving) -> APIRouter:
    """The routes, bound to what they serve."""
    routes = APIRouter(tags=["Model"])
    model, tokenizer = serving.model, serving.tokenizer

    def card(name: str) -> schemas.ModelCard:
        return schemas.ModelCard(id=name, created=serving.created, root=model.root, max_model_len=model.max_length)

    @routes.get("/v1/models")
    async def models() -> schemas.ModelList:
        """The names under which the model is served."""
        return schemas.ModelList(data=[card(name) for name in model.names])

    @routes.get("/v1/models/{name:path}", responses=LOOKUP_RESPONSES)
    async def model_card(name: str) -> schemas.ModelCard:
        """One of them."""
        model.check_name(name)
        return card(name)

    @routes.post("/tokenize", response_model=schemas.TokenizeResponse, responses=ERROR_RESPONSES)
    async def tokenize(asked: schemas.TokenizeRequest) -> Response:
        """Tokens of a text, or of messages as /v1/chat/completions would see them."""
        model.check_name(asked.model)
        if asked.messages is not None:
            prompt = await chat_prompt(serving, asked.messages, rendering_of(asked))
        else:
            special = asked.add_special_tokens is not False
            prompt = await text_prompt(serving, asked.prompt or "", add_special_tokens=special)
        tokens = prompt.tokens.tolist()
        body = schemas.TokenizeResponse(count=len(tokens), max_model_len=model.max_length, tokens=tokens)
        if asked.return_token_strs:
            body.token_strs = [token_name(tokenizer, token) for token in tokens]
        return JSONResponse(body.model_dump(exclude_unset=True))

    @routes.post("/detokenize", responses=ERROR_RESPONSES)
    async def detokenize(asked: schemas.DetokenizeRequest) -> schemas.DetokenizeResponse:
        """Text of some tokens, special ones included."""
        model.check_name(asked.model)
        wrong = next((token for token in asked.tokens if token >= model.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} is outside the vocabulary [0, {model.vocab_size})", param="tokens")
        return schemas.DetokenizeResponse(prompt=tokenizer.decode(asked.tokens))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> schemas.TokenizerInfo:
        """What lm-eval asks for."""
        named = tokenizer.named_tokens
        return schemas.TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            vocab_size=tokenizer.vocab_size,
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            eos_token_id=tokenizer.eos_id,
            chat_template=serving.chat.source,
        )

    return routes
