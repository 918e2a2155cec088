"""What the JSON of several requests and replies shares.

Fields that a class does not have are refused, remarked or harmless, see `foreign`; every bound is named in the error it
causes.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from sys import getsizeof
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.remarks import ignore
from hybrid_cache.api.server.schemas.foreign import (
    ANSWERED,
    DESCRIBED,
    OBFUSCATION,
    OUTPUTS,
    SCHEMA_WRAPPER,
    Fate,
    Foreign,
)
from hybrid_cache.api.server.schemas.sharing import Sharing
from hybrid_cache.api.text.stops import MAX_STOP_LENGTH, MAX_STOPS, stops_of
from hybrid_cache.errors import RequestError
from hybrid_cache.sampling import BOUNDS, MAX_INT

MAX_N = 16
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_SALT = 1024
MAX_CHOICES = 1024
MAX_TTL_S = 24 * 3600.0
OBJECT_BYTES = 1024  # of a parsed object beside the text in it
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_TTL = re.compile(r"[1-9][0-9]{0,5}[smh]")


class Request(BaseModel):
    """Base of all requests, and of the objects in them.

    foreign: what becomes of fields that the class does not have   place: leads to an object within a request
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    foreign: ClassVar[Mapping[str, Foreign]] = {}
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _drops_nothing_in_silence(cls, value: object) -> object:
        if isinstance(value, dict) and cls.model_config.get("extra") == "ignore":
            own = _fields_of(cls)
            for name in value:
                if name not in own:
                    _look_at(cls, str(name), value[name])
        return value


@cache
def _fields_of(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _look_at(kind: type[Request], name: str, value: object) -> None:
    """Raises RequestError, or within a request ValueError, for a field that asks for what there is not."""
    entry = kind.foreign.get(name)
    fate = Fate.NOTED if value is not None else Fate.HARMLESS
    if entry is not None:
        fate = entry.fate_of(value)
    if fate is Fate.NOTED:
        ignore(kind.place + name)
    if entry is None or fate is not Fate.REFUSED:
        return
    message = f"{kind.place}{name} is not supported here: {entry.why}"
    raise ValueError(message) if kind.place else RequestError(message, param=name, code=entry.code)


def remark_unused(request: Request, names: Iterable[str], unless: object = None) -> None:
    """Remarks fields that hold something, and something else than `unless`: what is there twice is not lost."""
    for name in names:
        if getattr(request, name) not in (None, "", [], unless):
            ignore(request.place + name)


class Response(BaseModel):
    """Base of all responses."""


def _stops(value: object) -> list[str] | None:
    return stops_of(value)


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(value)} entries, at most {MAX_LOGIT_BIAS} are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(str(key)):
            raise ValueError(f"{quoted(key)} is not a token id")
        if int(key) in biases:
            raise ValueError(f"token {int(key)} has more than one bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} is {quoted(bias)}, must be in [-100, 100]")
        biases[int(key)] = float(bias)
    return biases


def held_bytes(value: object) -> int:
    """Memory that a parsed request, or a part of one, keeps."""
    if isinstance(value, BaseModel):
        return OBJECT_BYTES + sum(map(held_bytes, value.__dict__.values()))
    if isinstance(value, list):
        return getsizeof(value) + sum(map(held_bytes, value))
    return getsizeof(value) if isinstance(value, str) else 0


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
JsonText = dict[str, object] | str
Ttl = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[smh]$"), AfterValidator(_ttl)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]


def _not_minus_one(value: object) -> object:
    return None if type(value) is int and value == -1 else value


# Of llama-server and LM Studio, -1 leaves it open.
Length = Annotated[Count | None, BeforeValidator(_not_minus_one, json_schema_input_type=Count | None)]


class StreamOptions(Request):
    foreign = OBFUSCATION
    place = "stream_options."
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Request):
    foreign = SCHEMA_WRAPPER
    place = "response_format.json_schema."
    name: str | None = None
    schema_: dict[str, object] | bool = Field(alias="schema", default=True)
    strict: bool | None = None


class ResponseFormat(Request):
    foreign = DESCRIBED
    place = "response_format."
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, object] | bool | None = Field(alias="schema", default=None)  # llama-server's place for it

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("type json_schema needs a json_schema")
        if self.type == "text" and not (self.json_schema is None and self.schema_ is None):
            raise ValueError("type text has no schema, json_schema has one")
        if self.schema_ is not None and self.json_schema is not None and self.json_schema.schema_ is not True:
            raise ValueError("schema and json_schema.schema cannot both be there")
        return self

    @property
    def wanted(self) -> object:
        """The schema that answers have to follow; None for text."""
        if self.type == "text":
            return None
        if self.json_schema is not None and self.schema_ is None:
            return self.json_schema.schema_
        return {"type": "object"} if self.schema_ is None else self.schema_


class StructuredOutputs(Request):
    """As in vLLM: one of these."""

    foreign = OUTPUTS
    place = "structured_outputs."
    json_: dict[str, object] | str | None = Field(alias="json", default=None)
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise ValueError("one of json, json_object, regex, choice and grammar is needed, and only one")
        return self


class CacheBreakpoint(Request):
    """Marks the exact end of a reusable prefix."""

    place = "prompt_cache_breakpoint."
    mode: Literal["explicit"]
    ttl: Ttl | None = None


class CacheOptions(Request):
    place = "prompt_cache_options."
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Ttl | None = None


def _within(name: str) -> FieldInfo:
    """The bound that sampling sets."""
    bound = BOUNDS[name]
    low = {"gt" if bound.open_low else "ge": bound.low}
    field: FieldInfo = Field(le=bound.high, gt=low.get("gt"), ge=low.get("ge"))
    return field


class GenerationRequest(Request):
    """What chat and text completions share."""

    foreign = ANSWERED
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Length = None
    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    stop: Stops = None
    seed: Annotated[int, _within("seed")] | None = None
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    logit_bias: LogitBias = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # As in vLLM
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT, description="0 and -1 keep all")] | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # The same as structured_outputs: vLLM's older names, and those of SGLang and llama-server
    guided_json: JsonText | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICES)] | None = None
    guided_grammar: str | None = None
    json_schema: JsonText | None = None
    regex: str | None = None
    # The cache
    cache_salt: Annotated[str, Field(max_length=MAX_SALT)] | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    cache_report: bool | None = None
    sharing: Sharing | None = None
    prompt_cache_options: CacheOptions | None = None

    @model_validator(mode="after")
    def _streams_if_it_has_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs come with whole replies, stream is true", param="prompt_logprobs")
        return self


class PromptLogprob(Response):
    """Of a token in a place of a prompt. rank: from 1; None where it is not among those that were asked for"""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token ids as text; None for the first token


class PromptTokensDetails(Response):
    cached_tokens: int
    cache_write_tokens: int


class Usage(Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
