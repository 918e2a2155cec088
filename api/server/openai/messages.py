"""From the JSON of messages to tokens."""

from collections.abc import Sequence

from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import CacheBreakpoint, ttl_seconds
from hybrid_cache.api.server.schemas.messages import ChatMessage, ContentPart, ToolCall
from hybrid_cache.api.server.schemas.tokens import TokenizeRequest
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart, arguments_object, tool_call
from hybrid_cache.api.text.text_engine import TextEngine


async def conversation_of(
    text: TextEngine, asked: ChatRequest | TokenizeRequest, sent: Sequence[ChatMessage]
) -> Conversation:
    """Messages, as tokens, in the rendering that a request asks for.

    Raises RequestError, and ContextTooLong when the context does not hold them.
    """
    rendering = rendering_of(asked)
    as_text = text.chat.takes_argument_text(rendering)
    tenant = current_tenant_or(asked.cache_salt if isinstance(asked, ChatRequest) else None)
    return await text.conversation([_message(m, as_text) for m in sent], rendering, tenant, body_size())


def rendering_of(asked: ChatRequest | TokenizeRequest) -> Rendering:
    """The fields of a request that decide how its messages are rendered."""
    continues = bool(asked.continue_final_message)
    options = asked.prompt_cache_options if isinstance(asked, ChatRequest) else None
    return Rendering(
        tools=[tool.model_dump(exclude={"function": {"strict"}}) for tool in asked.tools] if asked.tools else None,
        add_generation_prompt=not continues if asked.add_generation_prompt is None else asked.add_generation_prompt,
        continue_final_message=continues,
        kwargs=asked.chat_template_kwargs or {},
        default_ttl_s=ttl_seconds(options.ttl) if options and options.ttl else None,
    )


def _message(sent: ChatMessage, as_text: bool) -> TemplateMessage:
    fields: dict[str, object] = {
        "name": sent.name,
        "tool_call_id": sent.tool_call_id,
        "reasoning_content": sent.reasoning_content,
        "tool_calls": [_tool_call(call, as_text) for call in sent.tool_calls or ()] or None,
    }
    return TemplateMessage(sent.role, _parts(sent.content), {k: v for k, v in fields.items() if v is not None})


def _parts(content: str | list[ContentPart] | None) -> tuple[TextPart, ...] | None:
    if content is None or isinstance(content, str):
        return None if content is None else (TextPart(content),)
    return tuple(text_part(part.content or "", part.prompt_cache_breakpoint) for part in content)


def text_part(text: str, mark: CacheBreakpoint | None) -> TextPart:
    ttl = ttl_seconds(mark.ttl) if mark and mark.ttl else None
    return TextPart(text, mark is not None, ttl)


def _tool_call(call: ToolCall, as_text: bool) -> dict[str, object]:
    arguments = call.function.arguments
    return tool_call(call.id or "", call.function.name, arguments if as_text else arguments_object(arguments))
