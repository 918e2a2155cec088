"""From a `GenerationSpec` to events in text, by way of the engine. Every dialect, whole or as a stream, shares this."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType

from hybrid_cache.api.text.answer_parser import AnswerParser, Item
from hybrid_cache.api.text.answer_parser import Thought as ThoughtItem
from hybrid_cache.api.text.call_readers import Arguments, CallBegun, CallDone
from hybrid_cache.api.text.generation import (
    Begin,
    CallArguments,
    CallBegin,
    CallEnd,
    End,
    Event,
    GenerationSpec,
    Lookup,
    Part,
    Shared,
    Text,
    Thought,
    Token,
    Usage,
)
from hybrid_cache.api.text.next_turn import Said
from hybrid_cache.api.text.records import RequestRecord, Stopwatch
from hybrid_cache.api.text.stream import ChoiceText, Detokenizer, Piece, make_stopper
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.request import FinishReason, PromptOutput, Request, Stopper, TokenOutput

APART = "."  # between the id of a request that the client knows, which has no such character, and digits
MOST_TOOL_NAME = 256  # characters by which the engine knows the tools that an answer has called

Events = tuple[Event, ...]  # what one output of the engine causes, in order
Observe = Callable[[RequestRecord], None]


class Answer:
    """What a model says to one prompt or several. Leaving the `async with` block aborts what still runs.

    Iterate over it, once, for the events of all prompts as they come. Choices are counted through: with `n` choices a
    prompt, choice `p * n + i` is the i-th of prompt p.
    """

    def __init__(self) -> None:
        self._generations: list[_Generation] = []

    @classmethod
    async def to(cls, text: TextEngine, specs: Iterable[GenerationSpec], observe: Observe | None = None) -> "Answer":
        """Queues all of them or none; `observe` is called with each when it has ended.

        Raises RequestError, Overloaded or EngineStopped.
        """
        answer, first = cls(), 0
        try:
            for number, spec in enumerate(specs):
                answer._generations.append(_Generation(text, spec, number, first, observe))
                first += spec.n
        except BaseException:
            await answer.aclose()
            raise
        return answer

    @property
    def engine_ids(self) -> list[str]:
        """Of the prompts, in the engine."""
        return [generation.engine_id for generation in self._generations]

    @property
    def active(self) -> list[bool]:
        """Of an activated adapter: whether each prompt switches it on. Empty for all other models."""
        return [generation.active for generation in self._generations if generation.active is not None]

    @property
    def usage(self) -> Usage:
        """Of all prompts so far."""
        return sum((generation.usage for generation in self._generations), Usage())

    @property
    def lookups(self) -> list[Lookup]:
        """Of the prompts that have been read and were to be reported of."""
        return [lookup for generation in self._generations if (lookup := generation.lookup) is not None]

    @property
    def shared(self) -> list[Shared]:
        """Of the prompts that have been read, where a loss is allowed, or entries came from another model."""
        return [shared for generation in self._generations if (shared := generation.shared) is not None]

    async def __aiter__(self) -> AsyncIterator[Events]:
        if len(self._generations) == 1:
            async for events in self._generations[0]:
                yield events
            return
        queue: asyncio.Queue[Events | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(generation, queue)) for generation in self._generations]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        for generation in self._generations:
            await generation.aclose()


class _Generation:
    """One spec in the engine."""

    def __init__(
        self, text: TextEngine, spec: GenerationSpec, number: int, first_choice: int, observe: Observe | None
    ) -> None:
        """Queues the request. Raises RequestError, Overloaded or EngineStopped."""
        self._number = number
        self._prompt = spec.prompt
        self._reports = spec.reports
        self.active = text.active_from(spec.prompt) is not None if text.invocation else None
        self._tokens: list[int] = spec.prompt.tokens.tolist()
        self._output = PromptOutput(cached_tokens=0, written_tokens=0)
        self._has_begun = False
        self._num_generated = 0
        hidden = _hidden(text.tokenizer, spec)

        def detokenizer() -> Detokenizer:
            return Detokenizer(text.tokenizer, self._tokens, hidden)

        self._choices = [_Choice(first_choice + i, spec, detokenizer()) for i in range(spec.n)]
        self._stream = text.engine.submit(
            Request(
                id=_engine_id(spec.request_id),
                prompt=spec.prompt,
                sampling=spec.sampling,
                n=spec.n,
                namespace=spec.namespace,
                cache_mode=spec.cache_mode,
                make_stopper=_stopper(detokenizer, spec),
                make_constraint=spec.grammar.start if spec.grammar else None,
                arrangement=spec.arrangement,
                tenant=spec.tenant,
                commits=spec.talk is None,
                session=spec.session,
                user=spec.user,
                tools=spec.form.tools is not None,
                template=spec.template,
                kind=spec.kind,
                owner=spec.owner,
                model=text.model,
                max_loss=spec.max_loss,
            )
        )
        self._text, self._spec = text, spec
        self._watch = Stopwatch(spec.n, spec.session)
        self._observe = observe

    @property
    def engine_id(self) -> str:
        return self._stream.request.id

    @property
    def usage(self) -> Usage:
        output, thought = self._output, sum(choice.num_thought for choice in self._choices)
        return Usage(len(self._tokens), self._num_generated, output.cached_tokens, output.written_tokens, thought)

    @property
    def lookup(self) -> Lookup | None:
        if not (self._reports and self._has_begun):
            return None
        return Lookup(self._prompt, self._output.cached_tokens, self._output.found, self._output.loaded_tokens)

    @property
    def shared(self) -> Shared | None:
        spec, received = self._spec, self._output.received
        if not self._has_begun or (spec.max_loss is None and received is None):
            return None
        return Shared(spec.max_loss, received, spec.first_model)

    def __aiter__(self) -> "_Generation":
        return self

    async def __anext__(self) -> Events:
        try:
            output = await anext(self._stream)
        except StopAsyncIteration:
            self._record()
            raise
        if isinstance(output, TokenOutput):
            return self._events(output)
        self._output, self._has_begun = output, True
        return (Begin(self._number, self._tokens, output.logprobs),)

    def _events(self, output: TokenOutput) -> Events:
        if output.token is not None:
            self._num_generated += 1
            self._watch.token(output.index)
        choice = self._choices[output.index]
        said, stop = choice.push(output)
        if output.finish is None:
            return said
        finish = FinishReason.TOOL_CALL if output.finish is FinishReason.STOP and choice.called else output.finish
        self._watch.end(output.index, finish.value)
        self._end_turn(finish, choice.called)
        if choice.said is not None:
            self._text.expect(self._spec, choice.said)
        return (*said, End(choice.number, finish, stop, self.usage, self._output.plan))

    def _end_turn(self, finish: FinishReason, called: Sequence[str]) -> None:
        """Tells the engine whether an answer has called tools. Several are over when the slowest is."""
        request_id, engine = self._stream.request.id, self._text.engine
        if self._spec.n > 1:
            return
        if finish is FinishReason.TOOL_CALL:
            engine.pause(request_id, ",".join(called)[:MOST_TOOL_NAME], self._spec.tool_s)
        else:
            engine.end_task(request_id)

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._record()

    def _record(self) -> None:
        """Calls the observer, once."""
        observe, self._observe = self._observe, None
        if observe is not None:
            observe(self._watch.record(self.usage, self._output.queued_s if self._has_begun else None))


class _Choice:
    """One continuation as it grows."""

    def __init__(self, number: int, spec: GenerationSpec, detokenizer: Detokenizer) -> None:
        self.number = number
        self._text = ChoiceText(
            detokenizer,
            spec.stops,
            spec.sampling.stop_token_ids,
            spec.named_stop_ids,
            include_stop=spec.include_stop,
        )
        self._parser = AnswerParser(spec.form) if spec.form.marks or spec.form.tools else None
        self.said = None if spec.talk is None else Said()
        self.called: list[str] = []  # names of tools, of calls that are complete
        self._calling = ""
        self.num_thought = 0  # tokens of thoughts, and of the marks around them
        self._num_held = 0  # tokens that may be the beginning of such a mark

    def push(self, output: TokenOutput) -> tuple[Events, str | int | None]:
        """Takes the next output of this choice -> what it adds, and what the client named that has ended it."""
        piece = self._text.push(output)
        token = None if output.token is None else Token(output.token, piece.offset, output.logprob)
        first, *others = ([piece.text] if self._parser is None else self._parsed(self._parser, piece, token)) or [""]
        events = self._event(first, token), *(self._event(item, None) for item in others)
        if self.said is not None:
            for event in events:
                self.said.take(event)
        return events, piece.stop

    def _parsed(self, parser: AnswerParser, piece: Piece, token: Token | None) -> list[Item]:
        was_thinking, found = parser.thinking, parser.push(piece.text)
        if token is not None:
            self._num_held += 1
            if was_thinking or parser.thinking:
                self.num_thought += self._num_held
                self._num_held = 0
            elif not parser.may_begin_mark:
                self._num_held = 0
        return found if piece.output.finish is None else found + parser.finish()

    def _event(self, item: Item, token: Token | None) -> Part:
        match item:
            case str():
                return Text(self.number, item, token)
            case ThoughtItem():
                return Thought(self.number, item.text, token)
            case CallBegun():
                self._calling = item.name
                return CallBegin(self.number, item.name, token, item.id or f"call_{uuid.uuid4().hex[:24]}")
            case Arguments():
                return CallArguments(self.number, item.text, token)
        if item.complete:
            self.called.append(self._calling)
        return CallEnd(self.number, item.complete, token)


def _engine_id(request_id: str) -> str:
    """A name that no other request has, and that begins with the one that the client knows."""
    return f"{request_id}{APART}{uuid.uuid4().hex[:16]}" if request_id else uuid.uuid4().hex


def request_id_in(engine_id: str) -> str | None:
    """The name that the client knows; None if it knows none."""
    return engine_id.rpartition(APART)[0] or None


async def _pump(generation: _Generation, queue: "asyncio.Queue[Events | Exception | None]") -> None:
    """Puts the events of a generation into a queue, then None or what ended it."""
    try:
        async for events in generation:
            queue.put_nowait(events)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


def _hidden(tokenizer: Tokenizer, spec: GenerationSpec) -> frozenset[int]:
    """Tokens that have no text: special ones, except those that mark thoughts and tool calls."""
    if spec.show_special:
        return frozenset()
    return tokenizer.special_ids.difference(tokenizer.id_of(mark) for mark in spec.form.marks)


def _stopper(detokenizer: Callable[[], Detokenizer], spec: GenerationSpec) -> Callable[[], Stopper] | None:
    """Ends a choice at a stop string, or with its first call if there is to be one only."""
    at_strings = make_stopper(detokenizer, spec.stops) if spec.stops else None
    if not spec.one_call or spec.form.tools is None:
        return at_strings

    def new() -> Stopper:
        at_string = at_strings() if at_strings is not None else None
        text, parser = detokenizer(), AnswerParser(spec.form)

        def stops(token: int) -> bool:
            called = any(isinstance(item, CallDone) and item.complete for item in parser.push(text.push(token)))
            return called or (at_string is not None and bool(at_string(token)))

        return stops

    return new
