"""An answer in the JSON of the Responses API, whole or as events, and kept for those who ask again."""

import itertools
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from hybrid_cache.api.server.cache_report import shown_report
from hybrid_cache.api.server.errors import Problem, printable
from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.json_text import json_bytes, json_in_pieces
from hybrid_cache.api.server.openai.logprobs import chat_logprob
from hybrid_cache.api.server.openai.response_items import Output, Shown
from hybrid_cache.api.server.openai.response_parsing import encoded
from hybrid_cache.api.server.openai.response_turns import Turn
from hybrid_cache.api.server.response_store import Stored
from hybrid_cache.api.server.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Reasoning,
    ResponseFailure,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    TextConfig,
    TextFormat,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import End, Event, GenerationSpec, Token, Usage
from hybrid_cache.request import FinishReason


class ResponseReply:
    """The reply to one request."""

    def __init__(
        self, serving: Serving, asked: ResponsesRequest, turn: Turn, spec: GenerationSpec, answer: Answer
    ) -> None:
        self._serving, self._asked, self._turn, self._spec, self._answer = serving, asked, turn, spec, answer
        self._tenant = current_tenant_or(asked.cache_salt)
        self._head_size = body_size()
        self._created = int(time.time())
        self._status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
        self._failure: ResponseFailure | None = None
        self._kept = asked.store is not False
        self._output = Output(turn.key, self._logprob, encoded if asked.shows_encrypted else None)
        self._numbers = itertools.count()

    async def whole(self) -> bytes:
        """Waits for the end."""
        async for events in self._answer:
            for event in events:
                for _ in self._take(event):
                    pass
        return (await self._ended()).body

    async def events(self) -> AsyncGenerator[bytes]:
        """Events by name and number, as the answer comes."""
        begun = await self._written(lambda: {**self._head(), "output": []}, self._head_size)
        yield self._of_response("response.created", begun)
        yield self._of_response("response.in_progress", begun)
        async for events in self._answer:
            for event in events:
                for name, data in self._take(event):
                    size = 0 if name.endswith(".delta") else self._output.size
                    yield self._event(name, (await self._written(partial(dict, data), size))[1:-1])
        yield self._of_response(f"response.{self._status}", (await self._ended()).body)

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        await self._answer.aclose()

    def failed(self, problem: Problem) -> bytes:
        """The last events of a stream that fails."""
        self._status, self._kept, message = "failed", False, printable(problem.message)
        self._failure = ResponseFailure(
            code="invalid_prompt" if problem.status < 500 else "server_error", message=message
        )
        error = {"code": problem.code, "message": message, "param": problem.param}
        body = json_in_pieces({**self._head(), "output": self._output.items})
        return self._event("error", json_bytes(error)[1:-1]) + self._of_response("response.failed", body)

    def _take(self, event: Event) -> Shown:
        if not isinstance(event, End):
            return self._output.take(event)
        self._status = "incomplete" if event.finish is FinishReason.LENGTH else "completed"
        return self._output.finish(whole=self._status == "completed")

    async def _ended(self) -> Stored:
        """The whole response, which is kept from now on if it is to be."""
        output = await self._written(lambda: self._output.items, self._output.size)
        head = await self._written(self._head, self._head_size)
        own = await self._written(lambda: self._turn.own, self._head_size)
        stored = Stored(self._turn.name, self._asked.previous_response_id, head, own, output)
        if self._kept and not await self._serving.responses.put(stored, self._asked.cache_salt):
            self._kept = False
            stored = replace(stored, head=await self._written(self._head, self._head_size))
        return stored

    async def _written(self, make: Callable[[], object], size: int) -> bytes:
        """JSON of what `make` returns, on a thread if it is large."""
        return await self._serving.text.work.run(self._tenant, size, lambda: json_in_pieces(make()))

    def _of_response(self, name: str, body: bytes) -> bytes:
        return self._event(name, b'"response":' + body)

    def _event(self, name: str, fields: bytes) -> bytes:
        """One server-sent event. fields: of an object, without its braces"""
        head = f'event: {name}\ndata: {{"type":"{name}","sequence_number":{next(self._numbers)},'
        return head.encode() + fields + b"}\n\n"

    def _logprob(self, token: Token) -> dict[str, object] | None:
        if token.logprob is None:
            return None
        return chat_logprob(self._serving.text.tokenizer, token.logprob).model_dump()

    def _head(self) -> dict[str, object]:
        """All that is known of the response but its output."""
        asked, sampling, text = self._asked, self._spec.sampling, self._asked.text or TextConfig()
        form = text.format or TextFormat(type="text")
        choice, reasoning = asked.tool_choice or "auto", asked.reasoning or Reasoning()
        shown = ResponseObject(
            id=self._turn.name,
            created_at=self._created,
            completed_at=int(time.time()) if self._status == "completed" else None,
            status=self._status,
            error=self._failure,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if self._status == "incomplete" else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            max_tool_calls=asked.max_tool_calls,
            metadata=asked.metadata or {},
            model=asked.model or self._serving.model.name,
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=asked.previous_response_id,
            prompt_cache_key=asked.prompt_cache_key,
            reasoning={"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
            safety_identifier=asked.safety_identifier,
            store=self._kept,
            temperature=sampling.temperature,
            text={"format": form.model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
            tool_choice=choice if isinstance(choice, str) else {"type": "function", "name": choice.name},
            tools=[tool.model_dump() for tool in asked.tools or ()],
            top_logprobs=asked.top_logprobs or 0,
            top_p=sampling.top_p,
            truncation=asked.truncation or "disabled",
            usage=None if self._status in ("in_progress", "failed") else _usage(self._answer.usage),
            user=asked.user,
            output=[],
        )
        report = {} if self._status == "in_progress" else shown_report(self._serving.text.tokenizer, self._answer)
        return {**shown.model_dump(exclude={"output", "cache_report", "sharing"}), **report}


def _usage(used: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=used.prompt,
        input_tokens_details=InputTokensDetails(cached_tokens=used.cached, cache_write_tokens=used.written),
        output_tokens=used.completion,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=used.thought),
        total_tokens=used.prompt + used.completion,
    )
