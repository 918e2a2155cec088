"""The JSON of what the tokenizer is asked."""

from typing import Annotated

from pydantic import Field, model_validator

from hybrid_cache.api.server.schemas.common import Request, Response, TokenId
from hybrid_cache.api.server.schemas.foreign import COUNTED
from hybrid_cache.api.server.schemas.messages import ChatMessages, TemplateRequest
from hybrid_cache.errors import RequestError

MAX_DETOKENIZED = 2**18  # tokens of one /detokenize request


class TokenizeRequest(TemplateRequest):
    """POST /tokenize: a prompt, or messages as in /v1/chat/completions."""

    foreign = COUNTED
    model: str | None = None
    prompt: str | None = None
    messages: ChatMessages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either a prompt or messages", param="prompt")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize"""

    foreign = COUNTED
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_DETOKENIZED)]


class TokenizeResponse(Response):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Response):
    prompt: str


class TokenizerInfo(Response):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    eos_token_id: int | None
    chat_template: str | None
