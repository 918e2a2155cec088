"""From the JSON of a request to the prompt that the engine is given."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import ttl_seconds
from hybrid_cache.api.server.schemas.messages import ChatMessage, ContentPart, ToolCall
from hybrid_cache.api.server.schemas.tokens import TokenizeRequest
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.boundaries import prompt_of_tokens
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.messages import Message, Part, Rendering
from hybrid_cache.api.text.tokenizer import LONG_TEXT
from hybrid_cache.tokens import Prompt

T = TypeVar("T")
MESSAGE_WORK = 128  # in characters: the end of each message is found by rendering the messages before it


def rendering_of(asked: ChatRequest | TokenizeRequest) -> Rendering:
    """The fields of a request that decide how its messages are rendered."""
    continues = bool(asked.continue_final_message)
    options = asked.prompt_cache_options if isinstance(asked, ChatRequest) else None
    return Rendering(
        tools=[tool.model_dump() for tool in asked.tools] if asked.tools else None,
        add_generation_prompt=not continues if asked.add_generation_prompt is None else asked.add_generation_prompt,
        continue_final_message=continues,
        kwargs=asked.chat_template_kwargs or {},
        default_ttl_s=ttl_seconds(options.ttl) if options and options.ttl else None,
    )


async def conversation(serving: Serving, sent: Sequence[ChatMessage], rendering: Rendering) -> Conversation:
    """Renders and tokenises messages. Raises RequestError, and ContextTooLong when the context does not hold them."""
    as_text = serving.chat.takes_argument_text(rendering)
    messages = [_message(m, as_text) for m in sent]
    size = sum(len(part.text) for m in messages for part in m.parts or ()) + MESSAGE_WORK * len(messages)
    room = serving.model.max_length
    return await off_the_loop_if_long(size, lambda: serving.chat.conversation(messages, rendering, room))


async def text_prompt(serving: Serving, prompt: str | list[int], *, add_special_tokens: bool) -> Prompt:
    """A text, or tokens as they are."""
    if not isinstance(prompt, str):
        return prompt_of_tokens(prompt, serving.tokenizer)
    serving.tokenizer.check_size(prompt, serving.model.max_length, "prompt")
    encode = serving.tokenizer.encode_prompt if add_special_tokens else serving.tokenizer.encode
    return await off_the_loop_if_long(len(prompt), lambda: prompt_of_tokens(encode(prompt), serving.tokenizer))


async def off_the_loop_if_long(size: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()


def _message(sent: ChatMessage, as_text: bool) -> Message:
    fields: dict[str, object] = {
        "name": sent.name,
        "tool_call_id": sent.tool_call_id,
        "reasoning_content": sent.reasoning_content,
        "tool_calls": [_tool_call(call, as_text) for call in sent.tool_calls or ()] or None,
    }
    return Message(sent.role, _parts(sent.content), {k: v for k, v in fields.items() if v is not None})


def _parts(content: str | list[ContentPart] | None) -> tuple[Part, ...] | None:
    if content is None or isinstance(content, str):
        return None if content is None else (Part(content),)
    return tuple(_part(part) for part in content)


def _part(sent: ContentPart) -> Part:
    mark = sent.prompt_cache_breakpoint
    ttl = ttl_seconds(mark.ttl) if mark and mark.ttl else None
    return Part(sent.content or "", mark is not None, ttl)


def _tool_call(call: ToolCall, as_text: bool) -> dict[str, object]:
    """Templates that do not ask whether arguments are text expect an object."""
    arguments: object = call.function.arguments
    if not as_text:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = call.function.arguments
    return {"id": call.id or "", "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
