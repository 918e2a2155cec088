"""POST /v1/chat/completions"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hybrid_cache.api import schemas
from hybrid_cache.api.errors import ERROR_RESPONSES
from hybrid_cache.api.generation import Generations, Wanted
from hybrid_cache.api.logprobs import chat_logprob
from hybrid_cache.api.prompts import chat_prompt, rendering_of
from hybrid_cache.api.responses import EVENT_STREAM, EventStream, ending_with_errors, unless_gone
from hybrid_cache.api.serving import Serving
from hybrid_cache.api.stream import DONE, Piece, event
from hybrid_cache.api.tools import CLOSE, OPEN, ToolCall, ToolCallParser
from hybrid_cache.errors import RequestError
from hybrid_cache.request import PromptOutput

NEEDS_GRAMMAR = "needs constrained decoding, which this release does not have"


def router(serving: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post(
        "/v1/chat/completions", response_model=schemas.ChatResponse, responses={**ERROR_RESPONSES, **EVENT_STREAM}
    )
    async def chat_completions(asked: schemas.ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        serving.model.check_name(asked.model)
        _refuse_unsupported(asked)
        prompt = await chat_prompt(serving, asked.messages, rendering_of(asked))
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        wanted = Wanted(
            prompt=prompt,
            max_tokens=most,
            default_max_tokens=serving.defaults.max_new_tokens or serving.model.max_length,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            visible=_tool_tags(serving) if _parses_tools(asked) else frozenset(),
        )
        reply = _Reply(serving, asked, await Generations.submit(serving, asked, [wanted]))
        if asked.stream:
            return EventStream(ending_with_errors(reply.events()))
        body = await unless_gone(request, reply.whole())
        return JSONResponse(body.model_dump(exclude_unset=True))

    return routes


def _refuse_unsupported(asked: schemas.ChatRequest) -> None:
    kind = asked.response_format.type if asked.response_format else "text"
    if kind != "text":
        raise RequestError(f"response_format '{kind}' {NEEDS_GRAMMAR}; only 'text'", param="response_format")
    if asked.structured_outputs:
        raise RequestError(f"structured_outputs {NEEDS_GRAMMAR}", param="structured_outputs")
    if isinstance(asked.tool_choice, schemas.NamedTool) or asked.tool_choice == "required":
        raise RequestError(f"forcing a tool call {NEEDS_GRAMMAR}; use 'auto' or 'none'", param="tool_choice")


def _parses_tools(asked: schemas.ChatRequest) -> bool:
    return bool(asked.tools) and asked.tool_choice != "none"


def _tool_tags(serving: Serving) -> frozenset[int]:
    ids = (serving.tokenizer.id_of(tag) for tag in (OPEN, CLOSE))
    return frozenset(i for i in ids if i is not None)


class _Choice:
    """What one choice has said so far."""

    def __init__(self, serving: Serving, *, parses_tools: bool) -> None:
        self._tokenizer = serving.tokenizer
        self._parser = ToolCallParser() if parses_tools else None
        self._said: list[str] = []
        self.calls: list[schemas.ToolCallOut] = []
        self.logprobs: list[schemas.ChatLogprob] = []
        self.token_ids: list[int] = []
        self.finish: schemas.Finish = "stop"
        self.stop: str | int | None = None

    def push(self, piece: Piece) -> list[str | schemas.ToolCallOut]:
        """Takes a piece -> the text and the tool calls that are now certain."""
        if piece.output.token is not None:
            self.token_ids.append(piece.output.token)
        if piece.output.logprob is not None:
            self.logprobs.append(chat_logprob(self._tokenizer, piece.output.logprob))
        found = self._parse(piece)
        self._said += [f for f in found if isinstance(f, str)]
        self.calls += [f for f in found if isinstance(f, schemas.ToolCallOut)]
        if piece.output.finish is not None:
            self.stop = piece.stop
            self.finish = "tool_calls" if self.calls else piece.output.finish.value
        return found

    def _parse(self, piece: Piece) -> list[str | schemas.ToolCallOut]:
        if self._parser is None:
            return [piece.text] if piece.text else []
        found = self._parser.push(piece.text)
        if piece.output.finish is not None:
            found += self._parser.finish()
        return [_call_out(f) if isinstance(f, ToolCall) else f for f in found]

    @property
    def content(self) -> str | None:
        text = "".join(self._said)
        return (text.strip() or None) if self.calls else text


def _call_out(call: ToolCall) -> schemas.ToolCallOut:
    function = schemas.FunctionOut(name=call.name, arguments=call.arguments)
    return schemas.ToolCallOut(id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)


class _Reply:
    """The answer to one request, whole or as events."""

    def __init__(self, serving: Serving, asked: schemas.ChatRequest, generations: Generations) -> None:
        self._asked = asked
        self._generations = generations
        self._choices = [_Choice(serving, parses_tools=_parses_tools(asked)) for _ in range(asked.n or 1)]
        self._id = f"chatcmpl-{generations.all[0].id}"
        self._created = int(time.time())
        self._model = serving.model.name
        self._fingerprint = serving.model.system_fingerprint

    async def whole(self) -> schemas.ChatResponse:
        """Waits for the end of all choices."""
        async with self._generations as generations, aclosing(generations.events()) as events:
            async for _, item in events:
                if isinstance(item, Piece):
                    self._choices[item.output.index].push(item)
        body = schemas.ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[self._whole_choice(i, choice) for i, choice in enumerate(self._choices)],
            usage=self._generations.usage(),
        )
        if self._asked.return_token_ids:
            body.prompt_token_ids = self._generations.all[0].prompt_tokens
        return body

    def _whole_choice(self, index: int, choice: _Choice) -> schemas.ChatChoice:
        message = schemas.AssistantMessage(role="assistant", content=choice.content, refusal=None)
        if choice.calls:
            message.tool_calls = choice.calls
        logprobs = schemas.ChatLogprobs(content=choice.logprobs, refusal=None) if self._asked.logprobs else None
        whole = schemas.ChatChoice(
            index=index,
            message=message,
            logprobs=logprobs,
            finish_reason=choice.finish,
            stop_reason=choice.stop,
        )
        if self._asked.return_token_ids:
            whole.token_ids = choice.token_ids
        return whole

    async def events(self) -> AsyncGenerator[bytes]:
        """Role, content as it comes, the reason of the end for each choice; usage if asked for; [DONE]."""
        options = self._asked.stream_options
        async with self._generations as generations, aclosing(generations.events()) as events:
            async for _, item in events:
                if isinstance(item, PromptOutput):
                    for index in range(len(self._choices)):
                        yield self._chunk(index, {"role": "assistant", "content": ""})
                else:
                    for chunk in self._chunks(item):
                        yield chunk
        if options and options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._generations.usage().model_dump()})
        yield DONE

    def _chunks(self, piece: Piece) -> list[bytes]:
        index, choice = piece.output.index, self._choices[piece.output.index]
        num_calls = len(choice.calls)
        deltas: list[dict[str, object]] = []
        for found in choice.push(piece):
            if isinstance(found, str):
                deltas.append({"content": found})
            else:
                deltas.append({"tool_calls": [{"index": num_calls, **found.model_dump()}]})
                num_calls += 1
        extra: dict[str, object] = {}
        if piece.output.logprob is not None:
            extra["logprobs"] = {"content": [choice.logprobs[-1].model_dump()], "refusal": None}
        if self._asked.return_token_ids and piece.output.token is not None:
            extra["token_ids"] = [piece.output.token]
        if extra and not deltas:
            deltas.append({"content": ""})  # a token whose text is held back
        chunks = [self._chunk(index, delta, **(extra if i == 0 else {})) for i, delta in enumerate(deltas)]
        if piece.output.finish is not None:
            chunks.append(self._chunk(index, {}, finish=choice.finish, stop_reason=choice.stop))
        return chunks

    def _chunk(self, index: int, delta: dict[str, object], *, finish: str | None = None, **more: object) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        chunk: dict[str, object] = {**self._head(), "choices": [choice]}
        options = self._asked.stream_options
        if options and options.include_usage:
            running = self._generations.usage().model_dump() if options.continuous_usage_stats else None
            chunk["usage"] = running
        return event(chunk)

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }
