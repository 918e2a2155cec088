"""The JSON that clients send and receive. Unknown fields are ignored; every bound is named in the error it causes."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.errors import RequestError

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # content parts of one message
MAX_N = 16
MAX_STOPS = 16  # OpenAI takes 4
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 128  # prompts of one /v1/completions request
MAX_TOOLS = 128
MAX_DETOKENIZED = 2**20  # tokens of one /detokenize request
MAX_SALT = 1024
MAX_REF = 64
MAX_TTL_S = 24 * 3600.0
MAX_INT = 2**31 - 1

_TTL = re.compile(r"([1-9]\d{0,5})([smh])")


class Request(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Response(BaseModel):
    """Base of all responses."""


def _stops(value: object) -> list[str] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings, at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise ValueError(f"a stop string has {len(stop)} characters, must have 1 to {MAX_STOP_LENGTH}")
        _check_utf8(stop)
    return list(stops)


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(value)} entries, at most {MAX_LOGIT_BIAS} are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not re.fullmatch(r"\d{1,10}", str(key)):
            raise ValueError(f"{quoted(key)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} is {quoted(bias)}, must be in [-100, 100]")
        biases[int(key)] = float(bias)
    return biases


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds characters that UTF-8 cannot carry (lone surrogates)") from None


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


TextOrTokens = str | list[int]


def _prompts(value: object) -> list[TextOrTokens]:
    """Every form of a prompt -> a list of texts and token lists."""
    if isinstance(value, str):
        _check_utf8(value)
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
            _check_utf8(item)
            prompts.append(item)
        elif isinstance(item, list):
            prompts.append(_token_list(item))
        else:
            raise ValueError(f"{quoted(item)} is neither a string nor a list of token ids")
    return prompts


def _token_list(value: list[object]) -> list[int]:
    wrong = next((item for item in value if not _is_token(item)), None)
    if wrong is not None or None in value:
        raise ValueError(f"{quoted(wrong)} is not a token id in [0, {MAX_INT}]")
    return [item for item in value if isinstance(item, int)]


def _ttl(value: str) -> str:
    match = _TTL.fullmatch(value)
    if match is None or ttl_seconds(value) > MAX_TTL_S:
        raise ValueError("must be a duration such as '30m' or '12h', at most '24h'")
    return value


def ttl_seconds(text: str) -> float:
    """`30m` -> 1800."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


Stops = Annotated[
    list[str] | None,
    PlainValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float] | None,
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_LOGIT_BIAS,
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]
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
Ttl = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[smh]$"), AfterValidator(_ttl)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]


# Requests


class StreamOptions(Request):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CacheBreakpoint(Request):
    """Marks the exact end of a reusable prefix."""

    mode: Literal["explicit"]
    ttl: Ttl | None = None


class CacheOptions(Request):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Ttl | None = None


class Generation(Request):
    """What chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stops = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias = None
    user: str | None = None
    # As in vLLM
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT, description="0 and -1 keep all")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # The cache
    cache_salt: Annotated[str, Field(max_length=MAX_SALT)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None

    @model_validator(mode="after")
    def _streams_if_it_has_options(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        return self


class ContentPart(Request):
    """Only text; pictures, sound and files are refused with a message of their own."""

    type: Literal["text", "input_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in ("text", "input_text", "refusal"):
            raise ValueError(f"content parts of type {quoted(kind)} are not supported, only 'text'")
        return value

    @model_validator(mode="after")
    def _has_text(self) -> "ContentPart":
        if self.content is None:
            raise ValueError(f"a part of type '{self.type}' needs a text")
        return self

    @property
    def content(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


class FunctionCall(Request):
    name: Annotated[str, Field(max_length=256)]
    arguments: str


class ToolCall(Request):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _content(value: object) -> str | list[ContentPart] | None:
    """Read by hand so that an error tells about the form that the client chose, not about all of them."""
    if value is None:
        return None
    if isinstance(value, str):
        _check_utf8(value)
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of content parts, or null")
    if not 1 <= len(value) <= MAX_PARTS:
        raise ValueError(f"{len(value)} content parts, must be 1 to {MAX_PARTS}")
    parts = [part if isinstance(part, ContentPart) else ContentPart.model_validate(part) for part in value]
    for part in parts:
        _check_utf8(part.content or "")
    return parts


Content = Annotated[
    str | list[ContentPart] | None,
    PlainValidator(_content, json_schema_input_type=str | list[ContentPart] | None),
]


class ChatMessage(Request):
    """A message, or `{"ref": id}` for one that an earlier choreography has named."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    ref: Annotated[str, Field(min_length=1, max_length=MAX_REF)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _stands_for_another(cls, value: object) -> object:
        """A reference needs nothing else: role and content are those of the message it names."""
        if isinstance(value, dict) and value.get("ref") is not None:
            others = sorted(value.keys() - {"ref", "role"})
            if others:
                raise ValueError(f"a message with a ref has nothing else, here '{others[0]}'")
            return {"role": "user", "content": "", **value}
        return value

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message with role '{self.role}' needs content")
        return self


class FunctionDefinition(Request):
    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[str, Field(min_length=1, max_length=256)]


class Tool(Request):
    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Request):
    name: str


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]


def _check_one_of_them(continues: bool | None, opens: bool | None) -> None:
    if continues and opens:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )


class Choreography(Request):
    """How the messages of a request may be put together from what is stored of them.

    fidelity     exact: the bits of encoding everything; relocated, composed: approximate, for models that can
    order        any: messages side by side are unordered, and stand where the cache has most of them (exact only)
    seam         tokens at the start of each reused message that are computed again in their new place
    composition  how effects on recurrent states become one
    positions    leftmost: reused messages side by side all stand at the same place
    encode       alone: new messages see nothing before them, and are the same wherever they stand
    """

    fidelity: Literal["exact", "relocated", "composed"] = "exact"
    order: Literal["given", "any"] = "given"
    seam: Literal[0, 8, 16, 32, 64] = 0
    composition: Literal["ordered", "rotations", "permutations", "mean", "last"] = "ordered"
    positions: Literal["consecutive", "leftmost"] = "consecutive"
    encode: Literal["in_place", "alone"] = "in_place"


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    structured_outputs: dict[str, object] | None = None
    choreography: Choreography | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        _check_one_of_them(self.continue_final_message, self.add_generation_prompt)
        return self


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Request):
    """POST /tokenize: a prompt, or messages as in /v1/chat/completions."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either a prompt or messages", param="prompt")
        _check_one_of_them(self.continue_final_message, self.add_generation_prompt)
        return self


class DetokenizeRequest(Request):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZED)]


# Responses


class PromptTokensDetails(Response):
    cached_tokens: int
    cache_write_tokens: int


class Usage(Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Response):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response):
    content: list[ChatLogprob]
    refusal: None = None


class FunctionOut(Response):
    name: str
    arguments: str


class ToolCallOut(Response):
    id: str
    type: Literal["function"] = "function"
    function: FunctionOut


class AssistantMessage(Response):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallOut] | None = None


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Response):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class PlanItem(Response):
    message: str | None
    action: Literal["reused", "relocated", "composed", "computed"]
    tokens: int
    computed_tokens: int
    flops: float
    why: str


class PlanReport(Response):
    items: list[PlanItem]
    prefix_tokens: int
    computed_tokens: int
    flops: float
    flops_of_encoding: float


class ChoreographyReport(Response):
    """What was really done, and the ids under which the messages and the answer can be referred to."""

    fidelity: Literal["exact", "relocated", "composed"]
    asked: Literal["exact", "relocated", "composed"]
    why: str
    messages: list[str | None]
    answer: str | None
    plan: PlanReport


class ChatResponse(Response):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    choreography: ChoreographyReport | None = None
    prompt_token_ids: list[int] | None = None


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


class CompletionResponse(Response):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hybrid-cache"
    root: str
    max_model_len: int


class ModelList(Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


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


class Health(Response):
    status: Literal["ok", "failed"]
    exact: bool
    inexact: list[str]  # why not
    backend: str
    fallbacks: dict[str, str]  # what runs slower than it could, and why: operations left to torch, no CUDA graphs
    model: str
    adapter: str | None
    dtype: str
    version: str


Readiness = Literal["ready", "draining", "failed"]


class Ready(Response):
    status: Readiness


class Version(Response):
    version: str
