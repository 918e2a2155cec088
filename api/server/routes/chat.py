"""POST /v1/chat/completions"""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hybrid_cache.api.server.choreography import Arranged, arranged_prompt, is_arranged
from hybrid_cache.api.server.generation import Generations, Wanted
from hybrid_cache.api.server.logprobs import chat_logprob
from hybrid_cache.api.server.openapi import ERRORS, EVENTS
from hybrid_cache.api.server.prompts import conversation, rendering_of
from hybrid_cache.api.server.responses import DONE, EventStream, event, unless_gone
from hybrid_cache.api.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    Finish,
    FunctionOut,
    ToolCallOut,
)
from hybrid_cache.api.server.schemas.choreography import ChoreographyReport
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.stream import Piece
from hybrid_cache.api.text.tools import CLOSE, OPEN, ToolCall, ToolCallParser
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.errors import RequestError
from hybrid_cache.request import FinishReason, PromptOutput
from hybrid_cache.tokens import Prompt


def router(serving: Serving) -> APIRouter:
    """The route, bound to what it serves."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=ChatResponse, responses={**ERRORS, **EVENTS})
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        serving.model.check_name(asked.model)
        _refuse_unsupported(asked)
        arranged = await arranged_prompt(serving, asked) if is_arranged(asked) else None
        prompt = (
            arranged.prompt if arranged else (await conversation(serving, asked.messages, rendering_of(asked))).prompt
        )
        wanted = _wanted(serving, asked, prompt, arranged.arrangement if arranged else None)
        generations = await Generations.submit(serving, asked, [wanted])
        reply = _Reply(serving, asked, generations, arranged)
        if asked.stream:
            return EventStream(reply.events(), generations.aclose)
        async with generations:
            body = await unless_gone(request, reply.whole())
        return JSONResponse(body.model_dump(exclude_unset=True))

    return routes


def _refuse_unsupported(asked: ChatRequest) -> None:
    """What would need constrained decoding is refused, not ignored: the caller counts on the form of the answer."""
    if asked.response_format is not None and asked.response_format.type != "text":
        raise RequestError(
            f"response_format is '{asked.response_format.type}', only 'text' is supported", param="response_format"
        )
    if asked.structured_outputs:
        raise RequestError("structured_outputs is not supported", param="structured_outputs")
    if asked.tool_choice not in (None, "none", "auto"):
        shown = asked.tool_choice if isinstance(asked.tool_choice, str) else "a function"
        raise RequestError(f"tool_choice is {shown}, only 'auto' and 'none' are supported", param="tool_choice")


def _calls_tools(asked: ChatRequest) -> bool:
    return bool(asked.tools) and asked.tool_choice != "none"


def _wanted(serving: Serving, asked: ChatRequest, prompt: Prompt, arrangement: Arrangement | None) -> Wanted:
    tags = [serving.tokenizer.id_of(tag) for tag in (OPEN, CLOSE)] if _calls_tools(asked) else []
    return Wanted(
        endpoint="chat",
        prompt=prompt,
        max_tokens=asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens,
        default_max_tokens=serving.model.max_length,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        visible=frozenset(tag for tag in tags if tag is not None),
        arrangement=arrangement,
    )


@dataclass(slots=True)
class _Choice:
    """One answer as it grows."""

    parser: ToolCallParser | None  # None when no tools may be called
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | int | None = None

    def take(self, piece: Piece) -> list[str | ToolCall]:
        """Takes the next piece -> what it adds to the answer, in order."""
        if piece.output.token is not None:
            self.token_ids.append(piece.output.token)
        found: list[str | ToolCall] = [piece.text] if piece.text else []
        if self.parser is not None:
            found = self.parser.push(piece.text)
            if piece.output.finish is not None:
                found += self.parser.finish()
        self.texts += [item for item in found if isinstance(item, str)]
        self.calls += [item for item in found if isinstance(item, ToolCall)]
        if piece.output.finish is not None:
            stopped = piece.output.finish is FinishReason.STOP
            self.finish = ("tool_calls" if self.calls else "stop") if stopped else "length"
            self.stop = piece.stop
        return found


class _Reply:
    """The answers to one request, as a whole or as events."""

    def __init__(
        self,
        serving: Serving,
        asked: ChatRequest,
        generations: Generations,
        arranged: Arranged | None = None,
    ) -> None:
        self._serving = serving
        self._asked = asked
        self._generations = generations
        self._arranged = arranged
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = asked.model or serving.model.name
        calls_tools = _calls_tools(asked)
        self._choices = [_Choice(ToolCallParser() if calls_tools else None) for _ in range(asked.n or 1)]

    async def whole(self) -> ChatResponse:
        """Runs to the end."""
        async for _, output in self._generations.events():
            if isinstance(output, Piece):
                choice = self._choices[output.output.index]
                choice.take(output)
                if output.output.logprob is not None:
                    choice.logprobs.append(chat_logprob(self._serving.tokenizer, output.output.logprob))
        body = ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._serving.model.system_fingerprint,
            choices=[self._whole_choice(i, choice) for i, choice in enumerate(self._choices)],
            usage=self._generations.usage(),
        )
        if (report := self._report()) is not None:
            body.choreography = report
        if self._asked.return_token_ids:
            body.prompt_token_ids = self._generations.all[0].prompt_tokens
        return body

    def _report(self) -> ChoreographyReport | None:
        """What became of an arranged request, once it has been answered."""
        plan = self._generations.all[0].prompt_output.plan
        if self._arranged is None or plan is None:
            return None
        choice = self._choices[0]
        text = "".join(choice.texts)
        return self._arranged.report(plan, self._arranged.answer_id(self._serving, choice.token_ids, text))

    def _whole_choice(self, index: int, choice: _Choice) -> ChatChoice:
        assert choice.finish is not None
        text = "".join(choice.texts)
        content = None if choice.calls and not text else text
        message = AssistantMessage(role="assistant", content=content, refusal=None)
        if choice.calls:
            message.tool_calls = [_call_out(call) for call in choice.calls]
        whole = ChatChoice(
            index=index,
            message=message,
            logprobs=ChatLogprobs(content=choice.logprobs, refusal=None) if self._asked.logprobs else None,
            finish_reason=choice.finish,
            stop_reason=choice.stop,
        )
        if self._asked.return_token_ids:
            whole.token_ids = choice.token_ids
        return whole

    async def events(self) -> AsyncGenerator[bytes]:
        """One event for each piece of text, tool call and end."""
        async for _, output in self._generations.events():
            if isinstance(output, PromptOutput):
                for index in range(len(self._choices)):
                    yield self._opening(index)
                continue
            for body in self._piece_events(output):
                yield body
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._generations.usage().model_dump()})
        yield DONE

    def _opening(self, index: int) -> bytes:
        extra: dict[str, object] = {}
        if self._asked.return_token_ids and index == 0:
            extra["prompt_token_ids"] = self._generations.all[0].prompt_tokens
        return self._chunk(index, {"role": "assistant", "content": ""}, extra=extra)

    def _piece_events(self, piece: Piece) -> list[bytes]:
        index, output = piece.output.index, piece.output
        choice = self._choices[index]
        calls_before = len(choice.calls)
        deltas: list[dict[str, object]] = []
        for item in choice.take(piece):
            if isinstance(item, str):
                deltas.append({"content": item})
            else:
                call = _call_out(item).model_dump()
                deltas.append({"tool_calls": [{"index": calls_before, **call}]})
                calls_before += 1
        detail: dict[str, object] = {}
        if output.logprob is not None:
            entry = chat_logprob(self._serving.tokenizer, output.logprob)
            detail["logprobs"] = {"content": [entry.model_dump()], "refusal": None}
        if self._asked.return_token_ids and output.token is not None:
            detail["token_ids"] = [output.token]
        if detail and not deltas:
            deltas.append({"content": ""})
        # The log-probability of a token goes with the first thing that the token lets out.
        chunks = [self._chunk(index, delta, choice=detail if i == 0 else {}) for i, delta in enumerate(deltas)]
        if choice.finish is not None:
            ended: dict[str, object] = {"finish_reason": choice.finish, "stop_reason": choice.stop}
            report = self._report()
            extra: dict[str, object] = {} if report is None else {"choreography": report.model_dump()}
            chunks.append(self._chunk(index, {}, choice=ended, extra=extra))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: dict[str, object],
        *,
        choice: dict[str, object] | None = None,
        extra: dict[str, object] | None = None,
    ) -> bytes:
        whole = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(choice or {})}
        data = {**self._head(), "choices": [whole], **(extra or {})}
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            data["usage"] = self._generations.usage().model_dump() if options.continuous_usage_stats else None
        return event(data)

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._serving.model.system_fingerprint,
        }


def _call_out(call: ToolCall) -> ToolCallOut:
    function = FunctionOut(name=call.name, arguments=call.arguments)
    return ToolCallOut(id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)
