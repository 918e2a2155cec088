"""POST /v1/chat/completions"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hybrid_cache.api import schemas
from hybrid_cache.api.chat import Message, Part, Rendering
from hybrid_cache.api.generation import Generations, Wanted
from hybrid_cache.api.offload import in_thread_if_long
from hybrid_cache.api.openapi import ERRORS, EVENTS
from hybrid_cache.api.responses import EventStream, unless_gone
from hybrid_cache.api.serving import Serving
from hybrid_cache.api.stream import DONE, Piece, event
from hybrid_cache.api.streaming_errors import ending_with_errors
from hybrid_cache.api.tools import CLOSE, OPEN, ToolCall, ToolCallParser
from hybrid_cache.errors import RequestError
from hybrid_cache.request import FinishReason, Prompt, TokenLogprob


def router(serving: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=schemas.ChatResponse, responses={**ERRORS, **EVENTS})
    async def chat_completions(asked: schemas.ChatRequest, request: Request) -> Response:
        serving.model.check_name(asked.model)
        _refuse_unsupported(asked)
        prompt = await encode(serving, asked.messages, _rendering(asked))
        generations = await Generations.submit(serving, asked, [_wanted(serving, asked, prompt)])
        reply = _Reply(serving, asked, generations)
        if asked.stream:
            return EventStream(ending_with_errors(reply.events(), generations))
        body = await unless_gone(request, reply.whole())
        return JSONResponse(body.model_dump(exclude_unset=True))

    return routes


async def encode(serving: Serving, messages: Sequence[schemas.ChatMessage], rendering: Rendering) -> Prompt:
    """Renders and tokenises messages, off the event loop if they are long."""
    size = sum(len(p) for m in messages for p in _texts(m))
    as_text = serving.chat.takes_argument_text(rendering)
    room = serving.model.max_length
    return await in_thread_if_long(
        size, lambda: serving.chat.encode([_message(m, as_text) for m in messages], rendering, room)
    )


def _texts(message: schemas.ChatMessage) -> list[str]:
    if isinstance(message.content, list):
        return [part.content or "" for part in message.content]
    return [message.content or ""]


def _message(sent: schemas.ChatMessage, as_text: bool) -> Message:
    fields: dict[str, object] = {}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(sent, name)
        if value is not None:
            fields[name] = value
    if sent.tool_calls:
        fields["tool_calls"] = [_tool_call(call, as_text) for call in sent.tool_calls]
    return Message(sent.role, _parts(sent.content), fields)


def _parts(content: str | list[schemas.ContentPart] | None) -> tuple[Part, ...] | None:
    if content is None or isinstance(content, str):
        return None if content is None else (Part(content),)
    return tuple(_part(part) for part in content)


def _part(sent: schemas.ContentPart) -> Part:
    mark = sent.prompt_cache_breakpoint
    ttl = schemas.ttl_seconds(mark.ttl) if mark and mark.ttl else None
    return Part(sent.content or "", mark is not None, ttl)


def _tool_call(call: schemas.ToolCall, as_text: bool) -> dict[str, object]:
    arguments: object = call.function.arguments
    if not as_text:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def rendering_of(asked: schemas.ChatRequest | schemas.TokenizeRequest) -> Rendering:
    """The parts of a request that decide how its messages are rendered."""
    goes_on = bool(asked.continue_final_message)
    opens = (not goes_on) if asked.add_generation_prompt is None else asked.add_generation_prompt
    return Rendering(
        tools=[tool.model_dump() for tool in asked.tools] if asked.tools else None,
        add_generation_prompt=opens,
        continue_final_message=goes_on,
        kwargs=asked.chat_template_kwargs or {},
    )
