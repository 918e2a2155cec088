"""Least recently used, but first what a next turn would hardly miss."""

import math

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.sglang_radix import ConsumedLRU
from hybrid_cache.cache.tree import Kept

SPARE_TOKENS = 2048  # that may be computed again without a tail: its threshold less a usual question
NEEDED = 1e12  # more uses than a cache will see


class TailLRU(ConsumedLRU):
    """Evicts first, least recently used of them, states without which at most 2,048 more tokens would be computed.

    Tail-Optimized LRU (Zhang et al. 2025, arXiv 2510.15152): a conversation needs no more cached than keeps the tokens
    of its next turn that are not cached under a threshold; what exceeds that goes before anything else, and then the
    least recently used. What is missed counts from the deepest place that the conversation had, also when states there
    have gone. The paper converts a threshold of latency into tokens; here it is a number of tokens. It trims attention
    KV block by block from a conversation's end; a hybrid's states cannot be trimmed, so those that are not needed go as
    a whole. It is made for the tail of latencies, not for FLOPs. States where two requests diverge and at ends; a use
    counts for the state that is resumed from.
    """

    name = "tail-lru"

    def __init__(self) -> None:
        super().__init__()
        self._reach: dict[Name, int] = {}  # the deepest position that stands on a state

    def add(self, kept: Kept) -> None:
        self._reach.setdefault(kept.name, kept.num_tokens)
        super().add(kept)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        reach = self._reach.pop(name, 0)
        if above is not None and math.isfinite(score):
            self._reach[above.name] = max(self._reach.get(above.name, above.num_tokens), reach)

    def _score(self, kept: Kept) -> float:
        missed = self._reach.get(kept.name, kept.num_tokens) - kept.resume_without()
        return kept.base + (NEEDED if missed > SPARE_TOKENS else 0.0)
