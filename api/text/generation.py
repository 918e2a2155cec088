"""What is wanted of a model in text, and what it says: the seam between a client's dialect and the engine.

A dialect parses a request into a `GenerationSpec`, and renders the events of the `Answer` to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.messages import Talk
from hybrid_cache.cache.misses import Found
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.request import CacheMode, FinishReason, Received
from hybrid_cache.sampling import Constraint, SamplingParams, TokenLogprob
from hybrid_cache.tokens import Prompt


class Form(Protocol):
    """What answers have to be, such as those of a grammar."""

    def start(self) -> Constraint:
        """For one more choice."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One prompt, and how it is to be continued."""

    prompt: Prompt
    sampling: SamplingParams
    n: int = 1  # continuations, each of which is a choice
    stops: tuple[str, ...] = ()  # strings that end a choice
    named_stop_ids: tuple[int, ...] = ()  # of the stop tokens, those that `End.stop` may name
    include_stop: bool = False  # what ends a choice is part of its text
    show_special: bool = False  # special tokens have text
    form: AnswerForm = field(default_factory=AnswerForm)  # what is separated from text: thoughts, tool calls
    grammar: Form | None = None  # what the answer has to be
    one_call: bool = False  # it ends with its first call
    namespace: str = ""
    tenant: str = ""  # whose share of the engine this takes
    cache_mode: CacheMode = CacheMode.IMPLICIT
    arrangement: Arrangement | None = None
    talk: Talk | None = None  # the conversation that goes on from here, if that is to be expected
    session: str = ""  # which of the tenant's conversations this belongs to, as the client says
    user: str = ""  # as in `Request`
    template: str = ""  # as in `Request`
    owner: str | None = ""  # as in `Request`
    kind: str = ""  # as in `Request`
    tool_s: float | None = None  # how long a tool that the answer calls takes, if the client says so
    max_loss: float | None = None  # as in `Request`
    first_model: str = ""  # what clients call the engine's own model
    request_id: str = ""  # that the client knows; logs of the engine name it
    reports: bool = False  # the client wants to know why tokens of its prompt were not cached


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a choice."""

    id: int
    offset: int  # characters of the choice's text before it
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What has been used so far, in tokens."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0  # of the prompt, not computed
    written: int = 0  # of the prompt, new in the cache
    thought: int = 0  # of the completion, in thoughts and their marks

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.written + other.written,
            self.thought + other.thought,
        )


@dataclass(frozen=True, slots=True)
class Lookup:
    """What became of a prompt in the cache."""

    prompt: Prompt
    cached: int  # tokens that were not computed
    found: Found | None  # None for an arranged prompt, whose plan says it
    loaded: int = 0  # of those that were cached, came from a disk for it


@dataclass(frozen=True, slots=True)
class Shared:
    """What became of a prompt beside another model's entries in the cache."""

    max_loss: float | None  # that the request allows, in nats a token
    received: Received | None
    first_model: str  # what clients call the engine's own model


@dataclass(frozen=True, slots=True)
class Begin:
    """A prompt has been read; its choices follow."""

    prompt: int  # which of the answer's prompts
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob | None] | None  # one a token, if they were wanted


@dataclass(frozen=True, slots=True)
class Text:
    """More text of a choice; empty if there is nothing to let out yet."""

    choice: int
    text: str
    token: Token | None  # what let this out; comes once, with the first event that it causes


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what a choice thinks before it answers."""

    choice: int
    text: str
    token: Token | None  # as in `Text`


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call in a choice: its arguments follow, then its end, before anything else of the choice that has text."""

    choice: int
    name: str
    token: Token | None  # as in `Text`
    id: str  # the model's where it gives one that no call before it in the choice has


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the call: together JSON as the model wrote it, an object."""

    choice: int
    text: str
    token: Token | None  # as in `Text`


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of the call. Where it broke off, its arguments are the beginning of an object and no JSON."""

    choice: int
    complete: bool
    token: Token | None  # as in `Text`


@dataclass(frozen=True, slots=True)
class End:
    """The end of a choice."""

    choice: int
    finish: FinishReason
    stop: str | int | None  # the stop string or stop token that was the reason, if the client named it
    usage: Usage  # of its prompt and of all choices of that
    plan: Plan | None  # of an arranged prompt: what was really done


Part = Text | Thought | CallBegin | CallArguments | CallEnd  # what tokens cause
Event = Begin | Part | End
