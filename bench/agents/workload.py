"""What agents ask of a server: sessions of turns with pauses between them, and when sessions begin."""

import hashlib
import math
import random
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal, get_args

from hybrid_cache.bench.traces.workloads import poisson
from hybrid_cache.errors import ConfigError

Half = Literal["tuning", "held-out"]

MOST_ARRIVALS = 10_000_000  # expected


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session, and what follows it.

    Nothing was edited if `kept_tokens` is at least the prompt before; what it then lacks of the answer before was not
    sent back.
    """

    prompt_tokens: int  # at least 1
    kept_tokens: int  # leading ones, less than the prompt, that the last prompt and its answer began with; first: 0
    output_tokens: int  # at least 1
    tool: str  # name or class of the tool that it calls; empty: it calls none
    pause_s: float | None  # from its end to the next turn, of a tool or a person; None: nothing follows
    num_steps: int = 0  # in which the answer is decoded, where its form leaves no choice of some tokens; 0: one each


@dataclass(frozen=True, slots=True)
class AgentSession:
    """At least one turn; the last calls no tool."""

    kind: str  # what a server sees at the first request: which tools are offered, or the endpoint
    shared_tokens: int  # that all first prompts of this kind begin with: system prompt and tools; 0 if nobody knows
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """At least one session."""

    name: str
    sessions: tuple[AgentSession, ...]
    note: str  # what was dropped, cut, estimated or made up

    def half(self, half: Half) -> "Workload":
        """About half of the sessions, by a hash of their place; the two halves have none in common.

        Raises ConfigError for another name, and where the half is empty.
        """
        if half not in get_args(Half):
            raise ConfigError(f"half {half!r}: expected one of {', '.join(get_args(Half))}")
        chosen = tuple(s for i, s in enumerate(self.sessions) if _is_held_out(i) == (half == "held-out"))
        if not chosen:
            raise ConfigError(f"half {half!r}: expected more than {len(self.sessions)} sessions, so that it has some")
        note = f"the {half} half, {len(chosen)} of {len(self.sessions)} sessions"
        return replace(self, sessions=chosen, note="; ".join(filter(None, (self.note, note))))


def arrivals(
    workload: Workload, rate: float, seconds: float, seed: int, *, half: Half | None = None
) -> list[tuple[float, AgentSession]]:
    """Sessions with the times at which they begin, `rate` a second in the mean, independent of each other (Poisson).

    Which one begins is drawn with replacement from all, or from one half. Raises ConfigError.
    """
    for name, value in (("rate", rate), ("seconds", seconds)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}: expected a finite number above 0")
    if rate * seconds > MOST_ARRIVALS:
        raise ConfigError(f"rate {rate} for {seconds} s: expected at most {MOST_ARRIVALS:,} sessions")
    sessions, rng = (workload if half is None else workload.half(half)).sessions, random.Random(seed)
    return [(time, rng.choice(sessions)) for time in takewhile(lambda time: time <= seconds, poisson(rng, rate))]


def _is_held_out(place: int) -> bool:
    return hashlib.blake2b(b"%d" % place, digest_size=1).digest()[0] % 2 == 1
