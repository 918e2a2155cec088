"""What is known of the request that is being handled, for its line in the log and its span. Nothing of its content.

Middleware makes the facts, and whoever learns something adds it. Where there are none, what is added is forgotten.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from hybrid_cache.api.text.records import RequestRecord

KEY_CHARACTERS = 8  # of a tenant's name, which is a digest of its API key


class Failure(Protocol):
    """As in `errors.Problem`."""

    @property
    def status(self) -> int: ...
    @property
    def message(self) -> str: ...
    @property
    def for_log(self) -> str: ...
    @property
    def code(self) -> str | None: ...


@dataclass(slots=True)
class Facts:
    """Of one HTTP request. Times in seconds on the monotonic clock, tokens of all its prompts and choices."""

    began_s: float = field(default_factory=time.monotonic)
    key: str | None = None  # the beginning of the tenant's name
    model: str | None = None  # as the client names it, until it is found
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    finish_reasons: tuple[str, ...] = ()
    submitted_s: float | None = None  # when its first prompt was queued
    queued_s: float | None = None  # the longest that one of its prompts waited
    first_token_s: float | None = None  # when its first token came
    ended_s: float | None = None  # when its last prompt ended
    problem: Failure | None = None  # that it ended with

    def take(self, record: RequestRecord) -> None:
        """One of its prompts has ended."""
        self.ended_s = time.monotonic()
        submitted_s = self.ended_s - record.total_s
        self.submitted_s = min(filter(None, (self.submitted_s, submitted_s)))
        self.queued_s = max(self.queued_s or 0.0, record.queued_s)
        if record.first_token_s is not None:
            self.first_token_s = min(filter(None, (self.first_token_s, submitted_s + record.first_token_s)))
        self.prompt_tokens = (self.prompt_tokens or 0) + record.prompt_tokens
        self.cached_tokens = (self.cached_tokens or 0) + record.cached_tokens
        self.generated_tokens = (self.generated_tokens or 0) + record.completion_tokens
        self.finish_reasons += record.finish_reasons

    def read(self, body: object) -> None:
        """A body has been read that may turn out to be no valid request."""
        if isinstance(body, dict):
            model, stream = body.get("model"), body.get("stream")
            self.model = model if isinstance(model, str) else None
            self.stream = stream is True


_current: ContextVar[Facts | None] = ContextVar("facts", default=None)


def new_facts() -> Facts:
    """Those of a request that begins, which are `facts()` from now on."""
    facts = Facts()
    _current.set(facts)
    return facts


def facts() -> Facts:
    """Of the request that is being handled."""
    return _current.get() or Facts()
