"""The JSON of OpenAI's Responses API."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas.cache import CacheReport
from hybrid_cache.api.server.schemas.common import (
    MAX_SALT,
    MAX_TOP_LOGPROBS,
    CacheBreakpoint,
    CacheOptions,
    Count,
    Request,
    Response,
    remark_unused,
)
from hybrid_cache.api.server.schemas.foreign import ANSWERED, CALL, COUNTED, MESSAGE, PART, TOOL
from hybrid_cache.api.server.schemas.messages import MAX_ITEMS, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from hybrid_cache.api.server.schemas.sharing import Sharing, SharingReport
from hybrid_cache.errors import RequestError

MAX_METADATA = 16
JsonObject = dict[str, object]
Name = Annotated[str, Field(min_length=1, max_length=256)]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class TextContent(Request):
    """Text of a message or of a tool; pictures, sound and files are refused with a message of their own."""

    foreign = PART
    place = "input.content."
    type: Literal["input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in ("input_text", "output_text", "refusal"):
            raise ValueError(f"content of type {quoted(kind)} is not supported here, only text")
        return value

    @model_validator(mode="after")
    def _has_text(self) -> "TextContent":
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"content of type '{self.type}' needs a text")
        remark_unused(self, ["text" if self.type == "refusal" else "refusal"], unless=self.content)
        return self

    @property
    def content(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


def _texts(value: object) -> str | list[TextContent]:
    """Read by hand so that an error names the form that the client chose, not all of them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content")
    if len(value) > MAX_PARTS:
        raise ValueError(f"{len(value)} pieces of content, at most {MAX_PARTS} are allowed")
    return [part if isinstance(part, TextContent) else TextContent.model_validate(part) for part in value]


Texts = Annotated[str | list[TextContent], PlainValidator(_texts, json_schema_input_type=str | list[TextContent])]


def _parts(content: str | list[TextContent], kind: Literal["input_text", "output_text"]) -> list[TextContent]:
    return [TextContent(type=kind, text=content)] if isinstance(content, str) else content


class MessageItem(Request):
    foreign = MESSAGE
    place = "input."
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: ItemId | None = None
    status: Status | None = None

    @model_validator(mode="after")
    def _content_of_its_role(self) -> "MessageItem":
        for part in self.content if isinstance(self.content, list) else ():
            if self.role != "assistant" and part.type != "input_text":
                raise ValueError(f"a message with role '{self.role}' has no content of type '{part.type}'")
        return self

    @property
    def parts(self) -> list[TextContent]:
        return _parts(self.content, "output_text" if self.role == "assistant" else "input_text")

    @property
    def by_system(self) -> bool:
        return self.role in ("system", "developer")


class FunctionCallItem(Request):
    """A call that the model has made."""

    foreign = CALL
    place = "input."
    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: ItemId | None = None
    status: Status | None = None


class FunctionOutputItem(Request):
    """What a function has answered."""

    foreign = CALL
    place = "input."
    type: Literal["function_call_output"]
    call_id: Name
    output: Texts
    id: ItemId | None = None
    status: Status | None = None

    @property
    def parts(self) -> list[TextContent]:
        return _parts(self.output, "input_text")


class ReasoningText(Request):
    place = "input.content."
    type: Literal["reasoning_text"]
    text: str


class SummaryText(Request):
    place = "input.summary."
    type: Literal["summary_text"]
    text: str


class ReasoningItem(Request):
    """What the model has thought."""

    place = "input."
    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    encrypted_content: str | None = None
    id: ItemId | None = None
    status: Status | None = None


class ItemReference(Request):
    """Stands for an item of a stored response."""

    place = "input."
    type: Literal["item_reference"] = "item_reference"
    id: ItemId


Said = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
Item = Said | ItemReference
_KINDS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


def _item(value: object) -> Item:
    if isinstance(value, Item):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"an input item is {quoted(value)}, must be an object")
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if "id" in value and "role" not in value else "message"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"an input item of type {quoted(kind)} is not supported here, only {', '.join(_KINDS)}")
    return _KINDS[kind].model_validate({**value, "type": kind})


def _input(value: object) -> list[Item]:
    if isinstance(value, str):
        return [MessageItem(role="user", content=value)]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"{len(value)} items, at most {MAX_MESSAGES} are allowed")
    fields = [item.get(name) for item in value if isinstance(item, dict) for name in ("content", "output", "summary")]
    num_parts = sum(len(field) for field in fields if isinstance(field, list))
    if num_parts > MAX_ITEMS:
        raise ValueError(f"{num_parts} pieces of content, at most {MAX_ITEMS} are allowed")
    return [_item(item) for item in value]


Input = Annotated[list[Item], PlainValidator(_input, json_schema_input_type=str | list[Item])]


def said_items(values: object) -> list[Said]:
    """Items as they were stored."""
    assert isinstance(values, list)
    return [item for value in values if not isinstance(item := _item(value), ItemReference)]


class FunctionTool(Request):
    """A function of the client's own."""

    foreign = TOOL
    place = "tools."
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if (kind := value.get("type")) != "function":
            raise ValueError(f"tools of type {quoted(kind)} are not supported here, only 'function'")
        if value.get("defer_loading"):
            raise ValueError("defer_loading needs a tool search, which is not supported here")
        return value


class FunctionChoice(Request):
    place = "tool_choice."
    type: Literal["function"]
    name: Name

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(value, dict) and kind != "function":
            raise ValueError(f"a tool_choice of type {quoted(kind)} is not supported here, only 'function'")
        return value


def _tool_choice(value: object) -> "str | FunctionChoice | None":
    if value is None or isinstance(value, FunctionChoice):
        return value
    if isinstance(value, dict):
        return FunctionChoice.model_validate(value)
    if value not in ("none", "auto", "required"):
        raise ValueError("must be 'none', 'auto', 'required' or a function's name in an object")
    return str(value)


ToolChoice = Annotated[
    str | FunctionChoice | None,
    PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | FunctionChoice | None),
]


class TextFormat(Request):
    place = "text.format."
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(alias="schema", default=None)
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("type json_schema needs a schema")
        if self.type == "text" and self.schema_ is not None:
            raise ValueError("type text has no schema, json_schema has one")
        return self


class TextConfig(Request):
    """Models here know one verbosity."""

    place = "text."
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Request):
    """Thoughts are shown in full, so that there is no summary of them; of earlier turns the template shows what it
    shows.
    """

    place = "reasoning."
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class StreamOptions(Request):
    place = "stream_options."
    include_obfuscation: bool | None = None  # there is none here


class ResponseCacheOptions(CacheOptions):
    prewarm: Literal[False] | None = None


Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponsesRequest(Request):
    """POST /v1/responses"""

    foreign = ANSWERED
    model: str | None = None
    input: Input | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: Literal[False] | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_tool_calls: Count | None = None  # of tools that run at the vendor, of which there are none
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: Annotated[list[Includable], Field(fail_fast=True, max_length=64)] | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(fail_fast=True, max_length=MAX_METADATA),
        ]
        | None
    ) = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    # The cache
    cache_salt: Annotated[str, Field(max_length=MAX_SALT)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: ResponseCacheOptions | None = None
    cache_report: bool | None = None
    sharing: Sharing | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.top_logprobs and not self.shows_logprobs:
            raise RequestError(f"top_logprobs needs include to have '{LOGPROBS}'", param="top_logprobs")
        if not self.input and self.previous_response_id is None:
            raise RequestError("input is required where no previous_response_id is", param="input")
        return self

    @property
    def shows_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def shows_encrypted(self) -> bool:
        return ENCRYPTED in (self.include or ())


class ResponsesCountRequest(ResponsesRequest):
    """POST /v1/responses/input_tokens"""

    foreign = COUNTED


class InputTokens(Response):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputTokensDetails(Response):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Response):
    reasoning_tokens: int


class ResponseUsage(Response):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Response):
    code: str
    message: str


class IncompleteDetails(Response):
    reason: Literal["max_output_tokens"]


class ResponseObject(Response):
    """What is known of a response. The last field comes last in what is sent, too."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: JsonObject
    tool_choice: str | dict[str, str]
    tools: list[JsonObject]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    cache_report: CacheReport | None = None  # only where one was asked for
    sharing: SharingReport | None = None
    output: list[JsonObject]


class ItemList(Response):
    object: Literal["list"] = "list"
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(Response):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
