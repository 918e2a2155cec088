"""The JSON of text completions."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas.cache import CacheReport
from hybrid_cache.api.server.schemas.common import (
    MAX_N,
    MAX_TOP_LOGPROBS,
    GenerationRequest,
    PromptLogprobs,
    Response,
    Usage,
)
from hybrid_cache.api.server.schemas.sharing import SharingReport
from hybrid_cache.sampling import MAX_INT

MAX_PROMPTS = 128  # prompts of one /v1/completions request


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


TextOrTokens = str | list[int]


def _prompts(value: object) -> list[TextOrTokens]:
    """Every form of a prompt -> a list of texts and token lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a list, not empty, of strings, of token ids, or of lists of token ids")
    if isinstance(value[0], int):
        return [_token_list(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts, at most {MAX_PROMPTS} are allowed")
    prompts: list[TextOrTokens] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list):
            prompts.append(_token_list(item))
        else:
            raise ValueError(f"{quoted(item)} is neither a string nor a list of token ids")
    return prompts


def _token_list(value: list[Any]) -> list[int]:
    if set(map(type, value)) <= {int} and (not value or 0 <= min(value) <= max(value) <= MAX_INT):
        return value
    wrong = next(item for item in value if not _is_token(item))
    raise ValueError(f"{quoted(wrong)} is not a token id in [0, {MAX_INT}]")


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT}}
Prompts = Annotated[
    list[TextOrTokens],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                _TOKENS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKENS_SCHEMA},
            ]
        }
    ),
]


def _none_if_false(value: object) -> object:
    """What chat says where it wants none."""
    return None if value is False else value


_Number = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
NumLogprobs = Annotated[_Number | None, BeforeValidator(_none_if_false, json_schema_input_type=_Number | None)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Prompts
    echo: bool | None = None
    logprobs: NumLogprobs = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class CompletionLogprobs(Response):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Response):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(Response):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    cache_report: CacheReport | list[CacheReport] | None = None
    sharing: SharingReport | list[SharingReport] | None = None
