"""The JSON of Anthropic's Messages API."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas.cache import CacheReport
from hybrid_cache.api.server.schemas.common import Count, Request, Response
from hybrid_cache.api.server.schemas.foreign import ANSWERED, CALL, COUNTED, DESCRIBED, LABELS, PART, TOOL
from hybrid_cache.api.server.schemas.messages import MAX_ITEMS, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from hybrid_cache.api.server.schemas.sharing import Sharing, SharingReport
from hybrid_cache.api.text.stops import MAX_STOP_LENGTH, MAX_STOPS
from hybrid_cache.errors import RequestError

Name = Annotated[str, Field(min_length=1, max_length=256)]


class CacheControl(Request):
    """Marks the end of a prefix that will be used again, and how long it is kept at least."""

    place = "cache_control."
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Request):
    foreign = PART
    place = "content."
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ToolUseBlock(Request):
    """A call that the model has made."""

    foreign = CALL
    place = "content."
    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, object]
    cache_control: CacheControl | None = None


class ThinkingBlock(Request):
    place = "content."
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Request):
    """Thinking that nobody here can read: it is left out."""

    place = "content."
    type: Literal["redacted_thinking"]
    data: str


def _blocks(value: object, kinds: dict[str, type[Request]]) -> list[object]:
    """Read by hand so that an error names the kind of block that the client chose, not all of them."""
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content blocks")
    if len(value) > MAX_PARTS:
        raise ValueError(f"{len(value)} content blocks, at most {MAX_PARTS} are allowed")
    return [_block(block, kinds) for block in value]


def _block(value: object, kinds: dict[str, type[Request]]) -> object:
    if isinstance(value, Request):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"a content block of type {quoted(kind)} is not supported here, only {', '.join(kinds)}")
    return kinds[kind].model_validate(value)


def _texts(value: object) -> str | list[TextBlock]:
    return value if isinstance(value, str) else _blocks(value, {"text": TextBlock})  # type: ignore[return-value]


Texts = Annotated[str | list[TextBlock], PlainValidator(_texts, json_schema_input_type=str | list[TextBlock])]


class ToolResultBlock(Request):
    """What a tool has answered."""

    foreign = PART
    place = "content."
    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
_KINDS: dict[str, type[Request]] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
}


def _content(value: object) -> str | list[Block]:
    return value if isinstance(value, str) else _blocks(value, _KINDS)  # type: ignore[return-value]


Content = Annotated[str | list[Block], PlainValidator(_content, json_schema_input_type=str | list[Block])]


_OF_ANSWERS = (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock)
_WRONG: dict[str, tuple[type[Request], ...]] = {  # blocks that a role does not have
    "user": _OF_ANSWERS,
    "assistant": (ToolResultBlock,),
    "system": (*_OF_ANSWERS, ToolResultBlock),
}


class Message(Request):
    """A turn; turns of one role in a row are one. The system may speak between them."""

    place = "messages."
    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _of_its_role(self) -> "Message":
        if self.role != "assistant" and self.content == []:
            raise ValueError(f"a message with role '{self.role}' needs content, its list of blocks is empty")
        wrong = _WRONG[self.role]
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, wrong):
                raise ValueError(f"a message with role '{self.role}' has no block of type '{block.type}'")
        return self


def _few_items(messages: object) -> object:
    """Bounds what is looked at one by one."""
    if isinstance(messages, list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        num_items = sum(len(content) for content in contents if isinstance(content, list))
        if num_items > MAX_ITEMS:
            raise ValueError(f"{num_items} content blocks, at most {MAX_ITEMS} are allowed")
    return messages


class Tool(Request):
    """A tool of the client's own."""

    foreign = TOOL
    place = "tools."
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, object]
    strict: bool | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise ValueError(f"tools of type {quoted(kind)} run at the vendor and are not supported, only 'custom'")
        return value


class ToolChoice(Request):
    place = "tool_choice."
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> "ToolChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("type tool needs a name")
        return self


class Thinking(Request):
    place = "thinking."
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class OutputFormat(Request):
    foreign = DESCRIBED
    place = "output_config.format."
    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Request):
    place = "output_config."
    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(Request):
    """POST /v1/messages/count_tokens"""

    foreign = COUNTED
    model: str
    messages: Annotated[
        list[Message],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_few_items, json_schema_input_type=list[Message]),
    ]
    system: Texts | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where it was before
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> "CountRequest":
        form = self.output_config.format if self.output_config is not None else None
        if form is not None and self.output_format is not None and form != self.output_format:
            raise RequestError("output_format and output_config.format differ: send one of them", param="output_format")
        return self

    @property
    def schema_of_answer(self) -> dict[str, object] | None:
        form = self.output_config.format if self.output_config is not None else None
        form = form or self.output_format
        return None if form is None else form.schema_


class Metadata(Request):
    foreign = LABELS
    place = "metadata."
    user_id: str | None = None


class Diagnostics(Request):
    """Asks what has changed since an earlier request; without one, a later request may ask that of this one."""

    place = "diagnostics."
    previous_message_id: Annotated[str, Field(max_length=256)] | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    foreign = ANSWERED
    max_tokens: Annotated[Count, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(fail_fast=True, max_length=MAX_STOPS),
        ]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Count, Field(ge=0)] | None = None
    metadata: Metadata | None = None
    session_id: str | None = None
    cache_report: bool | None = None
    sharing: Sharing | None = None
    diagnostics: Diagnostics | None = None


class TokenCount(Response):
    input_tokens: int


class CacheCreation(Response):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(Response):
    """input_tokens: those that were neither read from the cache nor written to it"""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageResponse(Response):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, object]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    diagnostics: dict[str, object] | None = None
    cache_report: CacheReport | None = None
    sharing: SharingReport | None = None
