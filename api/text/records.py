"""What is measured of a request."""

import time
from dataclasses import dataclass

from hybrid_cache.api.text.generation import Usage


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One engine request that has ended: one prompt and its choices. Times in seconds on the server's clock."""

    finish_reasons: tuple[str, ...]  # one a choice: "stop", "tool_call", "length" or "abort"
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all choices together
    queued_s: float  # from submission to the first step
    first_token_s: float | None  # from submission; None when no token came
    inter_token_s: tuple[float, ...]  # between consecutive tokens of one choice
    total_s: float
    session: str = ""  # as in `GenerationSpec`


class Stopwatch:
    """When the tokens of a request came, and how its choices ended."""

    def __init__(self, n: int, session: str = "") -> None:
        self._session = session
        self._finish_reasons = ["abort"] * n
        self._start = time.monotonic()
        self._first: float | None = None
        self._latest: list[float | None] = [None] * n
        self._gaps: list[float] = []

    def token(self, choice: int) -> None:
        now, before = time.monotonic(), self._latest[choice]
        if self._first is None:
            self._first = now - self._start
        if before is not None:
            self._gaps.append(now - before)
        self._latest[choice] = now

    def end(self, choice: int, reason: str) -> None:
        self._finish_reasons[choice] = reason

    def record(self, usage: Usage, queued_s: float | None) -> RequestRecord:
        """queued_s: None for a request that had no step: then all its life"""
        total_s = time.monotonic() - self._start
        return RequestRecord(
            finish_reasons=tuple(self._finish_reasons),
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            queued_s=total_s if queued_s is None else queued_s,
            first_token_s=self._first,
            inter_token_s=tuple(self._gaps),
            total_s=total_s,
            session=self._session,
        )
