"""What is measured of a request once it has ended."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One engine request: one prompt and its choices. Times in seconds on the server's clock."""

    endpoint: str  # "chat" or "completions"
    finish_reasons: tuple[str, ...]  # one a choice: "stop", "length" or "abort"
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all choices together
    queued_s: float  # from submission to the first step
    first_token_s: float | None  # from submission; None when no token came
    inter_token_s: tuple[float, ...]  # between consecutive tokens of one choice
    total_s: float
