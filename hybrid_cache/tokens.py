"""Prompts as token ids."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]


def last_occurrence(tokens: TokenArray, part: tuple[int, ...]) -> int | None:
    """Where `part`, at least one token, begins the last time that `tokens` hold all of it; None if they do not."""
    starts = np.arange(len(tokens) - len(part) + 1)
    for place, token in enumerate(part):
        starts = starts[tokens[starts + place] == token]
    return int(starts[-1]) if len(starts) else None


class BoundaryKind(Enum):
    """Why a position in a prompt may be worth a checkpoint."""

    MESSAGE_END = "message_end"
    EXPLICIT = "explicit"  # the client marked it


@dataclass(frozen=True, slots=True)
class Boundary:
    """A position at which other requests may diverge from this one."""

    position: int  # tokens before it
    kind: BoundaryKind = BoundaryKind.MESSAGE_END
    ttl_s: float | None = None  # keep at least this long, if the budget allows
    role: str = ""  # of the message that ends here, if that is known


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of one request as rendered, with the ends of its messages."""

    tokens: TokenArray
    boundaries: tuple[Boundary, ...] = ()
    ends: tuple[int, ...] = ()  # tokens before the end of each message, where there are messages
