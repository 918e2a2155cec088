"""Reuse learned by type of message, from what becomes of states."""

import math
from collections.abc import Iterable

import numpy as np

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.published import Floats, RankedPolicy
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node

LEARNED = 0.05  # of a weight at each use and each eviction
FIRST_WEIGHT = 0.5
FORGOTTEN = 0.02  # of the timing at each return
FIRST_TICKS = 256.0  # until a return, before any was seen


class SAELike(RankedPolicy):
    """A weight for each type of message x the chance of a return later than now, both learned online.

    After SAECache (Fang et al. 2026, arXiv 2605.18825), which learns how often tokens of each type (system prompts,
    questions, tool results, answers) are used again from the fate of cached blocks, and the time of returns as a
    log-normal. A type here is the role of the message that ends at a state, or that requests diverge there. Its weight
    rises by a twentieth of what is missing to one when a state of the type is resumed from, and falls by a twentieth
    when one goes that never was. Made from the paper's abstract: its queues by task, its decay by position and its
    rates of learning that adapt are not here, and time is counted in ticks of the cache. It is for attention KV in
    equal blocks, so neither FLOPs nor bytes are looked at. Two states a prompt.
    """

    name = "sae-like"

    def __init__(self) -> None:
        super().__init__()
        self._types: dict[str, int] = {}
        self._weights: list[float] = []
        self._type_of: dict[Name, int] = {}
        self._used_again: set[Name] = set()
        self._mean, self._square = math.log(FIRST_TICKS), math.log(FIRST_TICKS) ** 2 + 1.0  # of log ticks

    def propose(self, outline: Outline) -> Iterable[Wish]:
        roles = {outline.floor(boundary.position): boundary.role for boundary in outline.boundaries}
        wishes = list(super().propose(outline))
        for wish in wishes:
            kind = "branch" if wish.kind is CheckpointKind.BRANCH else roles.get(wish.position, "")
            type = "answer" if outline.generated else kind
            self._type_of.setdefault(outline.name(wish.position), self._number(type))
        return wishes

    def add(self, kept: Kept) -> None:
        self._type_of.setdefault(kept.name, self._number(""))
        super().add(kept)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        if kept.uses:
            self._teach(kept.name, 1.0)
            self._used_again.add(kept.name)
            log = math.log(max(self._now + 1 - kept.base, 1.0))
            self._mean += FORGOTTEN * (log - self._mean)
            self._square += FORGOTTEN * (log * log - self._square)
        super().used(kept, path)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        super().lost(name, score, above)
        if math.isfinite(score) and name not in self._used_again:
            self._teach(name, 0.0)
        self._used_again.discard(name)
        self._type_of.pop(name, None)

    def value(self, kept: Kept) -> float:
        """The number of its type."""
        return float(self._type_of[kept.name])

    def scores(self, age: Floats, value: Floats) -> Floats:
        deviation = math.sqrt(max(self._square - self._mean**2, 0.01))
        later = 0.5 - 0.5 * error_function((np.log(age) - self._mean) / (deviation * math.sqrt(2.0)))
        weights = np.array(self._weights)[value.astype(np.int64)]
        return np.asarray(weights * later)

    def _number(self, type: str) -> int:
        if type not in self._types:
            self._types[type] = len(self._types)
            self._weights.append(FIRST_WEIGHT)
        return self._types[type]

    def _teach(self, name: Name, outcome: float) -> None:
        type = self._type_of.get(name)
        if type is not None:
            self._weights[type] += LEARNED * (outcome - self._weights[type])


def error_function(x: Floats) -> Floats:
    """erf, to 5e-4 (Abramowitz and Stegun 7.1.27)."""
    a = np.abs(x)
    rest = (1 + a * (0.278393 + a * (0.230389 + a * (0.000972 + a * 0.078108)))) ** -4.0
    return np.asarray(np.sign(x) * (1 - rest))
