"""From the JSON of messages to tokens."""

from collections.abc import Sequence

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.openai.thinking import template_variables
from hybrid_cache.api.server.remarks import remark_reading
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import CacheBreakpoint, ttl_seconds
from hybrid_cache.api.server.schemas.messages import ChatMessage, ToolCall
from hybrid_cache.api.server.schemas.tokens import TokenizeRequest
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart, arguments_object, tool_call
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.errors import RequestError


async def conversation_of(
    text: TextEngine, asked: ChatRequest | TokenizeRequest, sent: Sequence[ChatMessage]
) -> Conversation:
    """A conversation in which each tool call has its result, as tokens; raises as `rendered`."""
    _check_results(sent)
    conversation = await rendered(text, asked, sent)
    return conversation


async def rendered(
    text: TextEngine,
    asked: ChatRequest | TokenizeRequest,
    sent: Sequence[ChatMessage],
    *,
    in_order: bool = False,
) -> Conversation:
    """Messages, as tokens, in the rendering that a request asks for; in_order: as in `TextEngine.conversation`.

    Raises RequestError, and ContextTooLong when the context does not hold them.
    """
    rendering = rendering_of(text, asked)
    as_text = text.chat.takes_argument_text(rendering)
    tenant = current_tenant_or(asked.cache_salt if isinstance(asked, ChatRequest) else None)
    messages = [_message(m, as_text) for m in sent]
    made = await text.conversation(messages, rendering, tenant, body_size(), in_order=in_order)
    remark_reading(made.rearranged, made.unread)
    return made


def rendering_of(text: TextEngine, asked: ChatRequest | TokenizeRequest) -> Rendering:
    """The fields of a request that decide how its messages are rendered. Raises RequestError."""
    continues = bool(asked.continue_final_message)
    options = asked.prompt_cache_options if isinstance(asked, ChatRequest) else None
    return Rendering(
        tools=[tool.model_dump(exclude=_NOT_SHOWN) for tool in asked.tools] if asked.tools else None,
        add_generation_prompt=not continues if asked.add_generation_prompt is None else asked.add_generation_prompt,
        continue_final_message=continues,
        kwargs=template_variables(text, asked),
        default_ttl_s=ttl_seconds(options.ttl) if options and options.ttl else None,
    )


def _check_results(sent: Sequence[ChatMessage]) -> None:
    """Results directly follow the message that has their calls, in any order; calls that end it all need none.

    Raises RequestError, in the words of OpenAI.
    """
    open_calls: set[str] | None = None  # of the assistant's message before; None after another one
    for place, message in enumerate(sent):
        if message.role == "tool":
            _take_result(message, open_calls, place)
            continue
        _check_answered(open_calls, place)
        open_calls = _calls_of(message, place) if message.tool_calls else None
    if sent[-1].role == "tool":
        _check_answered(open_calls, len(sent))


def _take_result(message: ChatMessage, open_calls: set[str] | None, place: int) -> None:
    where, name = f"messages.[{place}]", message.tool_call_id
    if open_calls is None:
        raise RequestError(
            "Invalid parameter: messages with role 'tool' must be a response to a preceding message with 'tool_calls'.",
            param=f"{where}.role",
        )
    if name is None:
        raise RequestError(f"Missing parameter '{where}.tool_call_id'.", param=f"{where}.tool_call_id")
    if name not in open_calls:
        raise RequestError(
            f"Invalid parameter: 'tool_call_id' of {quoted(name)} not found in 'tool_calls' of previous message, "
            "or answered before.",
            param=f"{where}.tool_call_id",
        )
    open_calls.remove(name)


def _check_answered(open_calls: set[str] | None, place: int) -> None:
    """place: of the message after the results"""
    if open_calls:
        names = ", ".join(sorted(open_calls))
        raise RequestError(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. The following tool_call_ids did not have response messages: {names}",
            param=f"messages.[{place}].role",
        ) from LookupError(names)  # which are the client's words


def _calls_of(message: ChatMessage, place: int) -> set[str]:
    names = set[str]()
    for number, call in enumerate(message.tool_calls or ()):
        where = f"messages.[{place}].tool_calls.[{number}].id"
        if call.id is None:
            raise RequestError(f"Missing parameter '{where}'.", param=where)
        if call.id in names:
            raise RequestError(f"Invalid parameter: Duplicate value for 'id' of {quoted(call.id)}.", param=where)
        names.add(call.id)
    return names


_NOT_SHOWN: dict[str, bool | set[str]] = {"cache_control": True, "function": {"strict"}}


def _message(sent: ChatMessage, as_text: bool) -> TemplateMessage:
    fields: dict[str, object] = {
        "name": sent.name,
        "tool_call_id": sent.tool_call_id,
        "reasoning_content": sent.thoughts,
        "tool_calls": [_tool_call(call, as_text) for call in sent.tool_calls or ()] or None,
    }
    return TemplateMessage(sent.role, _parts(sent), {k: v for k, v in fields.items() if v is not None})


def _parts(sent: ChatMessage) -> tuple[TextPart, ...] | None:
    """None for an answer that only calls tools; one that says nothing at all is empty."""
    content = sent.content if sent.content is not None else sent.refusal
    if isinstance(content, str):
        return (TextPart(content),)
    texts = [part for part in content or () if not part.is_thought]
    if not texts:
        return None if sent.tool_calls else (TextPart(""),)
    return tuple(text_part(part.content or "", part.prompt_cache_breakpoint) for part in texts)


def text_part(text: str, mark: CacheBreakpoint | None) -> TextPart:
    ttl = ttl_seconds(mark.ttl) if mark and mark.ttl else None
    return TextPart(text, mark is not None, ttl)


def _tool_call(call: ToolCall, as_text: bool) -> dict[str, object]:
    arguments = call.function.arguments
    return tool_call(call.id or "", call.function.name, arguments if as_text else arguments_object(arguments))
