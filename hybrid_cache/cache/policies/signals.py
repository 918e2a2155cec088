"""What a server knows of a request beside its tokens, as a policy is told. All of it is a hint: it may be unknown, and
what a client says may be wrong.
"""

from dataclasses import dataclass
from enum import Enum

from hybrid_cache.cache.keys import Name


class Finish(Enum):
    """Why an answer ended."""

    UNKNOWN = "unknown"
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALL = "tool_call"
    GONE = "gone"  # its client went away before
    FAILED = "failed"  # after an error


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from. Empty, or None: nobody says."""

    session: str = ""  # which of a tenant's conversations it belongs to
    user: str = ""  # of the tenant's, who sent it
    tools: bool | None = None  # whether the answer may call any
    template: str = ""  # equal for prompts that one program makes


NOWHERE = Origin()


@dataclass(frozen=True, slots=True)
class Ending:
    """A request has ended. A policy may be told again once more is known of it."""

    name: Name  # of its prompt's full pages, see `Keys`
    num_output_tokens: int
    finish: Finish = Finish.UNKNOWN
    origin: Origin = NOWHERE
    connected: bool | None = None  # whether its client's connection is still open; None: nobody says
    again: bool = False  # it was told of before
