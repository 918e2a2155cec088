"""Chat completions: an answer in their JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hybrid_cache.api.server.openai.choreography import Arranged
from hybrid_cache.api.server.openai.logprobs import chat_logprob, prompt_logprobs
from hybrid_cache.api.server.openai.reply import CHOICE_SIZE, OpenAIReply
from hybrid_cache.api.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    Finish,
    FunctionOut,
    ToolCallOut,
)
from hybrid_cache.api.server.schemas.choreography import ChoreographyReport
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.text.answer import Answer, Events
from hybrid_cache.api.text.generation import (
    Begin,
    CallArguments,
    CallBegin,
    CallEnd,
    End,
    Event,
    Part,
    Text,
    Thought,
    Token,
)
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.request import FinishReason
from hybrid_cache.sampling import TokenLogprob


@dataclass(slots=True)
class _Call:
    """A tool call as it grows."""

    name: str
    id: str
    arguments: list[str] = field(default_factory=list)

    def shown(self) -> ToolCallOut:
        function = FunctionOut(name=self.name, arguments="".join(self.arguments))
        return ToolCallOut(id=self.id, type="function", function=function)


@dataclass(slots=True)
class _Choice:
    """One answer as it grows."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[dict[str, object]] = field(default_factory=list)  # as `ChatLogprob`
    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | int | None = None

    def take(self, event: Part | End) -> None:
        match event:
            case End():
                stopped = event.finish is not FinishReason.LENGTH
                self.finish = ("tool_calls" if self.calls else "stop") if stopped else "length"
                self.stop = event.stop
                return
            case Text():
                self.texts.append(event.text)
            case Thought():
                self.thoughts.append(event.text)
            case CallBegin():
                self.calls.append(_Call(event.name, event.id))
            case CallArguments():
                self.calls[-1].arguments.append(event.text)
        if event.token is not None:
            self.token_ids.append(event.token.id)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def shows_thoughts(asked: ChatRequest) -> bool:
    """Unless the client wants none of them: vLLM's field, or OpenRouter's."""
    return asked.include_reasoning is not False and not (asked.reasoning is not None and asked.reasoning.exclude)


class ChatReply(OpenAIReply):
    """The choices of one conversation."""

    chunk = "chat.completion.chunk"

    def __init__(self, serving: Serving, asked: ChatRequest, answer: Answer, arranged: Arranged | None = None) -> None:
        super().__init__(serving, asked, answer, "chatcmpl")
        self._serving = serving
        self._asked = asked
        self._arranged = arranged
        self._plan: Plan | None = None
        self._reported: ChoreographyReport | None = None  # of a whole reply
        self._prompt_ids: Sequence[int] = ()
        self._prompt_logprobs: Sequence[TokenLogprob | None] = ()
        self._shows_thoughts = shows_thoughts(asked)
        self._as_functions = asked.functions is not None
        self._choices = [_Choice() for _ in range(asked.n or 1)]

    def _take(self, events: Events) -> None:
        for event in events:
            self._take_event(event)
            if not isinstance(event, Begin | End) and (entry := self._logprob(event.token)):
                self._choices[event.choice].logprobs.append(entry)
        if self._arranged is not None and all(choice.finish for choice in self._choices):
            self._reported = self._report()  # here, not where the reply is built: it writes to the message book

    def _take_event(self, event: Event) -> None:
        match event:
            case Begin():
                self._prompt_ids, self._prompt_logprobs = event.tokens, event.logprobs or ()
                return
            case End():
                self._plan = event.plan
        self._choices[event.choice].take(event)

    def _whole(self) -> dict[str, object]:
        body = ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[],
            usage=self._usage(),
        )
        if self._reported is not None:
            body.choreography = self._reported
        if self._asked.return_token_ids:
            body.prompt_token_ids = list(self._prompt_ids)
        shown = body.model_dump(exclude_unset=True)
        if (num_top := self._asked.prompt_logprobs) is not None:
            shown["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._prompt_logprobs, num_top)
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return {**shown, "choices": choices}

    def _size(self) -> int:
        own = sum(CHOICE_SIZE + len(choice.token_ids) for choice in self._choices)
        entries = 1 if not self._asked.logprobs else 2 + (self._asked.top_logprobs or 0)
        scored = len(self._prompt_logprobs) * (2 + (self._asked.prompt_logprobs or 0))
        return own * entries + scored + (len(self._prompt_ids) if self._asked.return_token_ids else 0)

    def _size_of(self, events: Events) -> int:
        first = events[0]
        return len(first.tokens) if isinstance(first, Begin) and self._asked.return_token_ids else 0

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, object]:
        content = None if choice.calls and not choice.text else choice.text
        message = AssistantMessage(role="assistant", content=content, refusal=None)
        if choice.thoughts and self._shows_thoughts:
            message.reasoning_content = message.reasoning = "".join(choice.thoughts)
        if choice.calls and self._as_functions:
            message.function_call = choice.calls[0].shown().function
        elif choice.calls:
            message.tool_calls = [call.shown() for call in choice.calls]
        whole = ChatChoice(
            index=index,
            message=message,
            logprobs=None,
            finish_reason=self._finish(choice),
            stop_reason=choice.stop,
        )
        if self._asked.return_token_ids:
            whole.token_ids = choice.token_ids
        shown = whole.model_dump(exclude_unset=True)
        if self._asked.logprobs:
            shown["logprobs"] = {"content": choice.logprobs, "refusal": None}
        return shown

    def _report(self) -> ChoreographyReport | None:
        """What became of an arranged request, once it has been answered."""
        if self._arranged is None or self._plan is None:
            return None
        choice = self._choices[0]
        return self._arranged.report(self._plan, self._arranged.answer_id(self._serving, choice.token_ids, choice.text))

    def _chunks(self, events: Events) -> Iterator[dict[str, object]]:
        for event in events:
            self._take_event(event)
            match event:
                case Begin():
                    yield from map(self._opening, range(len(self._choices)))
                case End():
                    yield self._ending(event.choice)
                case _:
                    yield from self._delta(event)

    def _opening(self, index: int) -> dict[str, object]:
        shows_prompt = self._asked.return_token_ids and index == 0
        extra = {"prompt_token_ids": list(self._prompt_ids)} if shows_prompt else None
        return self._chunk(_shown(index, {"role": "assistant", "content": ""}), extra)

    def _delta(self, event: Part) -> Iterator[dict[str, object]]:
        """What an event adds. The log-probability of a token goes with the first thing that the token lets out."""
        detail, calls = self._detail(event.token), self._choices[event.choice].calls
        match event:
            case Thought() if self._shows_thoughts:
                delta: dict[str, object] = {"reasoning_content": event.text, "reasoning": event.text}
            case CallBegin():
                call = _Call(event.name, calls[-1].id).shown().model_dump()
                delta = self._call_delta(len(calls) - 1, call)
            case CallArguments():
                delta = self._call_delta(len(calls) - 1, {"function": {"arguments": event.text}})
            case Text() | CallEnd() | Thought():
                text = event.text if isinstance(event, Text) else ""
                if not (text or detail):
                    return
                delta = {"content": text}
        yield self._chunk(_shown(event.choice, delta, detail))

    def _call_delta(self, index: int, call: Mapping[str, object]) -> dict[str, object]:
        return {"function_call": call["function"]} if self._as_functions else {"tool_calls": [{"index": index, **call}]}

    def _finish(self, choice: _Choice) -> Finish:
        assert choice.finish is not None
        return "function_call" if self._as_functions and choice.finish == "tool_calls" else choice.finish

    def _detail(self, token: Token | None) -> dict[str, object]:
        detail: dict[str, object] = {}
        if (entry := self._logprob(token)) is not None:
            detail["logprobs"] = {"content": [entry], "refusal": None}
        if self._asked.return_token_ids and token is not None:
            detail["token_ids"] = [token.id]
        return detail

    def _ending(self, index: int) -> dict[str, object]:
        choice, report = self._choices[index], self._report()
        ended = {"finish_reason": self._finish(choice), "stop_reason": choice.stop}
        return self._chunk(_shown(index, {}, ended), {"choreography": report.model_dump()} if report else None)

    def _logprob(self, token: Token | None) -> dict[str, object] | None:
        if token is None or token.logprob is None:
            return None
        return chat_logprob(self._tokenizer, token.logprob).model_dump()


def _shown(index: int, delta: Mapping[str, object], detail: Mapping[str, object] | None = None) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(detail or {})}
