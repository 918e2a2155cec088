"""What came of the sessions of one run, simulated or real."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Served:
    """By what server, and who came when."""

    model: str
    policy: str
    memory_bytes: int
    host_bytes: int  # of a second tier
    prefix_cache: bool
    seed: int


@dataclass(frozen=True, slots=True)
class SessionResult:
    """One session that has ended. Seconds."""

    arrival_s: float
    end_s: float
    paused_s: float  # of this, with tools or a person
    first_token_s: float  # of the first turn, since it was asked
    longest_wait_s: float  # of a turn for its first token


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of at least one session. None: nobody could see it from outside of the server."""

    sessions: tuple[SessionResult, ...]
    first_tokens_s: tuple[float, ...]  # of turns after a pause
    waited_s: float  # for the first token of all turns
    decoded_s: float  # from there to the last one
    prompt_tokens: int
    new_tokens: int  # of these, that no earlier turn of the session had
    computed_tokens: int | None
    generated_tokens: int
    num_returns: int
    num_resident: int | None  # of these, with a state at the end of the prompt before still there
    end_s: float
    num_preemptions: int | None = None
    busy_s: float | None = None
    steps: int | None = None
    running_byte_s: float | None = None  # bytes that running requests held, times seconds
