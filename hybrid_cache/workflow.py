"""Calls that share messages: encode once, attend in any order, run side by side.

with a workflow `wf`
    facts = [wf.encode(text) for text in texts]
    votes = wf.parallel([Call([facts[i] for i in order] + ["Which is best?"]) for order in orders])
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hybrid_cache.choreography.arrangement import Encoding, Fidelity, Style, closed
from hybrid_cache.choreography.assembly import Piece, arranged
from hybrid_cache.choreography.book import Message, MessageBook
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import RequestError, RequestFailed
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.request import FailedOutput, FinishReason, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams, TokenLogprob
from hybrid_cache.tokens import Boundary, TokenArray

if TYPE_CHECKING:
    from torch import Tensor

MOST_MESSAGES = 1024  # in one call


class Renderer(Protocol):
    """How messages become tokens, and tokens text. Each message is rendered by itself."""

    closing: tuple[int, ...]  # what ends an answer's message; begins with the token that ends an answer

    def message(self, role: str, text: str) -> TokenArray:
        """A whole message."""
        ...

    def opening(self, role: str) -> TokenArray:
        """What an answer follows on."""
        ...

    def text(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One answer that is wanted. `attend`: messages of the workflow, or texts, which become new messages of `asker`."""

    attend: Sequence[Message | str]
    role: str = "assistant"
    asker: str = "user"
    style: Style | None = None
    sampling: SamplingParams | None = None
    keep: bool = True  # the answer becomes a message that others may attend to


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave. `message` is the answer to attend to; `attended` what it was made from, in the order used."""

    text: str
    tokens: tuple[int, ...]
    message: Message
    attended: tuple[Message, ...]
    plan: Plan
    finish: FinishReason
    first_token_s: float  # from when the call was made
    total_s: float
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Running:
    call: Call
    messages: list[Message]
    started_s: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    plan: Plan | None = None
    first_s: float | None = None
    ended_s: float | None = None
    finish: FinishReason | None = None


class Workflow:
    """Messages and calls on one engine. Workflows with the same namespace share what they store."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        *,
        style: Style | None = None,
        sampling: SamplingParams | None = None,
        namespace: str = "",
        book: MessageBook | None = None,
    ) -> None:
        """style, sampling: of calls that name none; namespace: no message is ever used in two of them

        `others` gets the engine's outputs for requests that are not the workflow's, for whoever submitted them.
        """
        self.engine = engine
        self.renderer = renderer
        self.style = style or Style()
        self.sampling = sampling or SamplingParams(temperature=0.0, max_tokens=64, stop_token_ids=renderer.closing[:1])
        self._tenant = namespace
        self._book = book or MessageBook()
        self._numbers = itertools.count()
        self._running: dict[str, _Running] = {}
        self.others: Outputs = []

    # Messages

    def message(self, text: str, parents: Sequence[Message] = (), role: str = "user") -> Message:
        """A message that others may attend to, to be encoded from zero or after its parents. Nothing is computed yet.

        Raises UnknownMessage or MessageGone for a parent that cannot be found.
        """
        context = tuple(parent.id for parent in self._known(parents))
        tokens = self.renderer.message(role, text)
        return self._book.add(self._namespace, role, tokens, context, text=text)

    def encode(
        self, text: str, parents: Sequence[Message] = (), role: str = "user", style: Style | None = None
    ) -> Message:
        """Computes a message now: from zero, or after its parents. Raises what `encode_all` raises."""
        return self.encode_all([text], parents, role, style)[0]

    def encode_all(
        self, texts: Sequence[str], parents: Sequence[Message] = (), role: str = "user", style: Style | None = None
    ) -> list[Message]:
        """Computes several messages in one batch, none of which sees another.

        Raises RequestError for one that can never be computed, UnknownMessage or MessageGone for a parent.
        """
        style = style or self.style
        messages = [self.message(text, parents, role) for text in texts]
        call = Call([], style=style, keep=False, sampling=SamplingParams(max_tokens=0))
        missing = [message for message in messages if not self.is_stored(message, style)]
        self._run([self._new(call, [*parents, message], []) for message in missing])
        return messages

    def find(self, name: str) -> Message:
        """The message with an id. Raises UnknownMessage or MessageGone."""
        return self._book.find(self._namespace, name)

    def is_stored(self, message: Message, style: Style | None = None) -> bool:
        """Whether rows and effect of a message are in the cache for use at another position."""
        return self.engine.is_stored(message.id, (style or self.style).seam, namespace=self._tenant)

    def effects(self, message: Message, style: Style | None = None) -> "list[tuple[Tensor, Tensor]]":
        """(P, S) of a stored message for each state of the model, in the order of its layers; copies.

        P as its `Transition` writes it down, S [*state_shape], both float32. Raises RequestError if it is not stored.
        """
        effects = self.engine.effects(message.id, (style or self.style).seam, namespace=self._tenant)
        if effects is None:
            raise RequestError(f"message {message.id} is not stored")
        return effects

    # Calls

    def generate(
        self,
        role: str = "assistant",
        *,
        attend: Sequence[Message | str],
        style: Style | None = None,
        fidelity: Fidelity | str | None = None,
        **options: object,
    ) -> Answer:
        """One answer of `role` to what it attends to. `fidelity` in place of that of the style; options: see `Call`.

        A last message of a few words, which no other call waits for, is computed with the answer and not stored.
        Raises what `parallel` raises.
        """
        call = Call(attend, role, style=self._style(style, fidelity))
        return self.parallel([replace(call, **options)])[0]  # type: ignore[arg-type]

    def parallel(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers of calls that run in one batch.

        Raises RequestError if one can never be answered, UnknownMessage or MessageGone for what it attends to; then
        none has begun.
        """
        asked = [self._new(call, self._messages_of(call), self.renderer.opening(call.role)) for call in calls]
        self._run(asked)
        return [self._answer(request.id) for request, _ in asked]

    def settle(self) -> None:
        """Runs the canonical passes of answers, so that later exact calls find them: for when nobody waits."""
        self.engine.run_until_idle()

    def plan(
        self,
        role: str = "assistant",
        *,
        attend: Sequence[Message | str],
        style: Style | None = None,
        fidelity: Fidelity | str | None = None,
    ) -> Plan:
        """What `generate` would do now. Raises what `generate` raises."""
        call = Call(attend, role, style=self._style(style, fidelity))
        messages = self._messages_of(call)
        return self.engine.plan(self._request("plan", call, messages, self.renderer.opening(role)))

    # Inside

    def _style(self, style: Style | None, fidelity: Fidelity | str | None) -> Style:
        if fidelity is None:
            return style or self.style
        if fidelity not in list(Fidelity):
            raise RequestError(f"fidelity is {fidelity!r}, must be one of {', '.join(Fidelity)}", param="fidelity")
        return replace(style or self.style, fidelity=Fidelity(fidelity))

    @property
    def _namespace(self) -> str:
        return namespace_of(self._tenant, self.engine.model.fingerprint)

    def _known(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Raises UnknownMessage for a message of another namespace or model."""
        for message in messages:
            self._book.find(self._namespace, message.id)
        return messages

    def _messages_of(self, call: Call) -> list[Message]:
        """What a call attends to. Texts become messages, encoded from zero or after all before them."""
        if not 1 <= len(call.attend) <= MOST_MESSAGES:
            raise RequestError(f"a call attends to {len(call.attend)} messages, must be in [1, {MOST_MESSAGES}]")
        style, messages = call.style or self.style, list[Message]()
        for item in call.attend:
            if isinstance(item, str):
                context = messages if style.encoding is Encoding.IN_PLACE else ()
                messages.append(self.message(item, context, call.asker))
            else:
                messages += self._known([item])
        return messages

    def _new(
        self, call: Call, messages: Sequence[Message], opening: TokenArray | Sequence[int]
    ) -> tuple[Request, _Running]:
        """Raises RequestError for a call that can never be answered; nothing has begun then."""
        name = f"call-{id(self)}-{next(self._numbers)}"
        request = self._request(name, call, messages, opening)
        self.engine.check_request(request)
        return request, _Running(call, list(messages), time.perf_counter())

    def _request(
        self, name: str, call: Call, messages: Sequence[Message], opening: TokenArray | Sequence[int]
    ) -> Request:
        pieces = [Piece(m.tokens, (Boundary(len(m.tokens), role=m.role),), m) for m in messages]
        closing = self.renderer.closing if call.keep else None
        opened = Piece(np.asarray(opening, np.int32))
        prompt, arrangement = arranged(pieces, opened, call.style or self.style, closing)
        sampling = call.sampling or self.sampling
        return Request(name, prompt, sampling, namespace=self._tenant, arrangement=arrangement)

    def _run(self, asked: Sequence[tuple[Request, _Running]]) -> None:
        """Submits calls as the engine takes them, and steps until all are answered and their messages stored."""
        coming = deque(asked)
        while coming or not self.engine.idle:
            while coming and self.engine.has_room:
                request, running = coming.popleft()
                self._running[request.id] = running
                self.engine.submit(request)
            for name, output in self.engine.step():
                if name not in self._running:
                    self.others.append((name, output))
                    continue
                running, now = self._running[name], time.perf_counter()
                if isinstance(output, FailedOutput):
                    raise RequestFailed(f"the engine gave a call up after an error of its own: {output.why}")
                if isinstance(output, PromptOutput):
                    running.plan = output.plan
                    continue
                assert isinstance(output, TokenOutput)
                running.first_s = running.first_s or now
                if output.token is not None:
                    running.tokens.append(output.token)
                if output.logprob is not None:
                    running.logprobs.append(output.logprob)
                if output.finish is not None:
                    running.finish, running.ended_s = output.finish, now
        for name in [name for name, running in self._running.items() if not running.call.attend]:
            del self._running[name]

    def _answer(self, name: str) -> Answer:
        running = self._running.pop(name)
        assert running.plan is not None
        assert running.finish is not None
        assert running.first_s is not None
        assert running.ended_s is not None
        role, tokens = running.call.role, np.asarray(running.tokens, np.int32)
        text = self.renderer.text(running.tokens)
        whole = closed(np.concatenate([self.renderer.opening(role), tokens]), self.renderer.closing)
        by_id = {m.id: m for m in running.messages}
        used = [by_id[item.id] for item in running.plan.items if item.id]
        message = self._book.add(
            self._namespace, role, whole, tuple(m.id for m in running.messages), text=text, is_answer=True
        )
        return Answer(
            text,
            tuple(running.tokens),
            message,
            tuple(used),
            running.plan,
            running.finish,
            running.first_s - running.started_s,
            running.ended_s - running.started_s,
            tuple(running.logprobs),
        )
