"""Least recently used."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import ScoredPolicy, Worth
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node


class LRU(ScoredPolicy):
    """The least recently used state is evicted first, whatever it saves; states anywhere, as the server offers them."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    @property
    def clock(self) -> float:
        return float(self._uses)

    def score(self, base: float, kind: CheckpointKind, worth: Worth) -> float:
        return base

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._uses += 1
        super().used(kept, path)
