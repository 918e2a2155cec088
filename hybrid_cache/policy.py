"""What is kept when not everything fits: value per byte, for states and KV pages alike.

    value(x) = predicted rate of reuse * cost saved by x / bytes freed with x

A policy gives every kept state a score; the lowest score goes first. KV pages have no score of their own: a page that
no kept state needs saves nothing and goes before anything else, and a page that one needs counts among its bytes.
"""

from typing import Protocol

from hybrid_cache.errors import ConfigError
from hybrid_cache.tree import CheckpointKind


class Policy(Protocol):
    """Scores kept states. The same object runs in the server and in a simulation."""

    name: str

    @property
    def clock(self) -> float:
        """Stored with a state when it is made or used, and handed back to `score`."""
        ...

    def score(self, base: float, kind: CheckpointKind, flops_saved: float, num_bytes: int) -> float:
        """The score of a state last used when the clock said `base`. May only rise while it is not used."""
        ...

    def used(self) -> None:
        """Something was used or made."""
        ...

    def evicted(self, score: float) -> None:
        """Something with this score went."""
        ...


# Prior odds that a boundary of a kind is returned to, relative to a message end.
RATE = {
    CheckpointKind.EXPLICIT: 2.0,
    CheckpointKind.BRANCH: 1.5,
    CheckpointKind.MESSAGE_END: 1.0,
    CheckpointKind.TURN_END: 1.0,
    CheckpointKind.PROMPT_END: 0.5,
    CheckpointKind.INTERIOR: 0.25,
}


class FlopsPerByte:
    """GreedyDual-Size (Cao and Irani 1997) with replay FLOPs as the cost: score = L + rate * FLOPs saved / bytes.

    L is the score of the last victim. It rises as things are evicted, so what is not used grows old without anybody
    counting hits; counts would pin anchors that were popular once.
    """

    name = "flops-per-byte"

    def __init__(self) -> None:
        self._inflation = 0.0

    @property
    def clock(self) -> float:
        return self._inflation

    def score(self, base: float, kind: CheckpointKind, flops_saved: float, num_bytes: int) -> float:
        return base + RATE[kind] * flops_saved / num_bytes

    def used(self) -> None:
        pass

    def evicted(self, score: float) -> None:
        self._inflation = max(self._inflation, score)


class LRU:
    """Least recently used goes first, whatever it saves."""

    name = "lru"

    def __init__(self) -> None:
        self._uses = 0

    @property
    def clock(self) -> float:
        return float(self._uses)

    def score(self, base: float, kind: CheckpointKind, flops_saved: float, num_bytes: int) -> float:
        return base

    def used(self) -> None:
        self._uses += 1

    def evicted(self, score: float) -> None:
        pass


POLICIES: dict[str, type[FlopsPerByte] | type[LRU]] = {policy.name: policy for policy in (FlopsPerByte, LRU)}


def make_policy(name: str) -> Policy:
    """A fresh policy by name. Raises ConfigError for an unknown one."""
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}, must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
