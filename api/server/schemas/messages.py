"""The JSON of messages and tools."""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas.common import CacheBreakpoint, Request, remark_unused
from hybrid_cache.api.server.schemas.foreign import CALL, MESSAGE, PARSED, PART
from hybrid_cache.api.server.schemas.functions import calls_as_tool_calls, functions_as_tools
from hybrid_cache.errors import RequestError

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # content parts of one message
MAX_TOOLS = 128
MAX_ITEMS = 1 << 14  # content parts and tool calls of all messages together
MAX_REF = 64


_TEXTS = ("text", "input_text", "output_text", "refusal")
_THOUGHTS = ("thinking", "reasoning")


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"thinking holds {quoted(part)}, must be parts of text")
    return text


class ContentPart(Request):
    """Only text, and thoughts of an answer; pictures, sound and files are refused with a message of their own."""

    foreign = PART
    place = "messages.content."
    type: Literal["text", "input_text", "output_text", "refusal", "thinking", "reasoning"]
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in (*_TEXTS, *_THOUGHTS):
            raise ValueError(f"content parts of type {quoted(kind)} are not supported, only 'text'")
        if isinstance(value, dict) and isinstance(value.get("thinking"), list):  # as Mistral has it
            return {**value, "thinking": "".join(_text_of(part) for part in value["thinking"])}
        return value

    @model_validator(mode="after")
    def _says_one_thing(self) -> "ContentPart":
        others = {"text", "refusal", "thinking"} - {"text" if self.type in _TEXTS[:3] else self.type}
        remark_unused(self, others if self.content is not None else (), unless=self.content)
        return self

    @model_validator(mode="after")
    def _has_text(self) -> "ContentPart":
        if self.content is None:
            raise ValueError(f"a part of type '{self.type}' needs a text")
        return self

    @property
    def content(self) -> str | None:
        if self.type == "refusal":
            return self.refusal
        return self.thinking if self.type == "thinking" and self.thinking is not None else self.text

    @property
    def is_thought(self) -> bool:
        return self.type in _THOUGHTS


def _arguments(value: object) -> object:
    """Some clients send the object that the text stands for, or nothing where it is empty."""
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None


Arguments = Annotated[str, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, object] | None)]


class FunctionCall(Request):
    foreign = PARSED
    place = "messages.tool_calls.function."
    name: Annotated[str, Field(max_length=256)]
    arguments: Arguments = ""


class ToolCall(Request):
    foreign = CALL
    place = "messages.tool_calls."
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _content(value: object) -> str | list[ContentPart] | None:
    """Read by hand so that an error names the form that the client chose, not all of them."""
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of content parts, or null")
    if len(value) > MAX_PARTS:
        raise ValueError(f"{len(value)} content parts, must be 1 to {MAX_PARTS}")
    return [part if isinstance(part, ContentPart) else ContentPart.model_validate(part) for part in value]


Content = Annotated[
    str | list[ContentPart] | None,
    PlainValidator(_content, json_schema_input_type=str | list[ContentPart] | None),
]


_OF_ROLES = {  # what only one role has
    **dict.fromkeys(("tool_calls", "reasoning_content", "reasoning", "thinking", "refusal"), "assistant"),
    "tool_call_id": "tool",
}


class ChatMessage(Request):
    """A message, or `{"ref": id}` for one that an earlier choreography has named."""

    foreign = MESSAGE
    place = "messages."
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as vLLM names it
    thinking: str | None = None  # and Ollama
    refusal: str | None = None
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
    def _has_what_is_its_role_s(self) -> "ChatMessage":
        for name, role in _OF_ROLES.items():
            if self.role != role and getattr(self, name):
                remark_unused(self, [name])
                setattr(self, name, None)
        if self.content:
            remark_unused(self, ["refusal"])
        remark_unused(self, ["reasoning_content", "reasoning", "thinking"], unless=self.thoughts)
        return self

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError(f"a message with role '{self.role}' needs content")
        if self.content == [] and self.role not in ("assistant", "tool"):
            raise ValueError(f"0 content parts, must be 1 to {MAX_PARTS}")
        if self.role != "assistant" and any(part.is_thought for part in self.parts):
            raise ValueError(f"a message with role '{self.role}' has no thoughts")
        return self

    @property
    def parts(self) -> list[ContentPart]:
        """Of content that has them."""
        return self.content if isinstance(self.content, list) else []

    @property
    def thoughts(self) -> str | None:
        """What an answer began with, under whichever name."""
        named = (self.reasoning_content, self.reasoning, self.thinking)
        said = "\n".join(part.content or "" for part in self.parts if part.is_thought)
        return next((text for text in named if text is not None), None) or said or None


def _few_items(messages: object) -> object:
    """Bounds what is looked at one by one. Calls of functions are those of tools."""
    if isinstance(messages, list):
        fields = [message.get(name) for message in messages if isinstance(message, dict) for name in _LISTS]
        num_items = sum(len(field) for field in fields if isinstance(field, list))
        if num_items > MAX_ITEMS:
            raise ValueError(f"{num_items} content parts and tool calls, at most {MAX_ITEMS} are allowed")
    return calls_as_tool_calls(messages) if isinstance(messages, list) else messages


_LISTS = ("content", "tool_calls")
ChatMessages = Annotated[
    list[ChatMessage],
    Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
    BeforeValidator(_few_items, json_schema_input_type=list[ChatMessage]),
]


class FunctionDefinition(Request):
    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[str, Field(min_length=1, max_length=256)]
    strict: bool | None = None  # calls are as `parameters` say; not for the model


class Tool(Request):
    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ReasoningOptions(Request):
    """As in OpenRouter."""

    place = "reasoning."
    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class ThinkingOptions(Request):
    """As in Anthropic's API, and DeepSeek's. budget_tokens: a target for the model, which no template shows"""

    place = "thinking."
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class TemplateRequest(Request):
    """How messages become a prompt. functions: the tools, in their older form"""

    functions: Annotated[list[FunctionDefinition], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    documents: Annotated[list[dict[str, object]], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    thinking: ThinkingOptions | None = None
    enable_thinking: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_tools_alone(cls, value: object) -> object:
        return functions_as_tools(value)

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> "TemplateRequest":
        check_one_of_them(self.continue_final_message, self.add_generation_prompt)
        return self


def check_one_of_them(continues: bool | None, opens: bool | None) -> None:
    """Raises RequestError if both are set."""
    if continues and opens:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
