"""The JSON of chat completions."""

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas.cache import CacheReport
from hybrid_cache.api.server.schemas.choreography import Choreography, ChoreographyReport
from hybrid_cache.api.server.schemas.common import (
    MAX_TOP_LOGPROBS,
    GenerationRequest,
    Length,
    PromptLogprobs,
    Request,
    Response,
    Usage,
)
from hybrid_cache.api.server.schemas.messages import ChatMessages, TemplateRequest
from hybrid_cache.api.server.schemas.sharing import SharingReport
from hybrid_cache.errors import RequestError


class NamedFunction(Request):
    place = "function."
    name: str


class NamedTool(Request):
    place = "tool_choice."
    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: object) -> "str | NamedTool | None":
    """Read by hand so that an error names the form that the client chose, not all of them."""
    if value is None or isinstance(value, NamedTool):
        return value
    if isinstance(value, dict):
        if value.get("type") != "function":
            raise ValueError(f"a tool_choice of type {quoted(value.get('type'))} is not supported, only 'function'")
        return NamedTool.model_validate(value)
    if value not in ("none", "auto", "required"):
        raise ValueError("must be 'none', 'auto', 'required' or a function's name in an object")
    return str(value)


ToolChoice = Annotated[
    str | NamedTool | None,
    PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None),
]


class ChatRequest(GenerationRequest, TemplateRequest):
    """POST /v1/chat/completions"""

    messages: ChatMessages
    max_completion_tokens: Length = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    include_reasoning: bool | None = None
    choreography: Choreography | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        if isinstance(self.function_call, NamedFunction) and self.functions is None:
            raise RequestError("function_call names a function, and there are no functions", param="function_call")
        if self.function_call == "none" and self.functions is None and self.tools:
            raise RequestError("function_call belongs to functions, tools have tool_choice", param="function_call")
        if None not in (lengths := (self.max_tokens, self.max_completion_tokens)) and len({*lengths}) > 1:
            raise RequestError("max_completion_tokens and max_tokens differ: send one of them", param="max_tokens")
        return self


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
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, under its other name
    refusal: None = None
    tool_calls: list[ToolCallOut] | None = None
    function_call: FunctionOut | None = None


Finish = Literal["stop", "length", "tool_calls", "function_call"]


class ChatChoice(Response):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatResponse(Response):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    cache_report: CacheReport | None = None
    sharing: SharingReport | None = None
    choreography: ChoreographyReport | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
