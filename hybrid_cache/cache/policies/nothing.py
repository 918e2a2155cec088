"""No states at all."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import Outline, ScoredPolicy, Wish, Worth
from hybrid_cache.cache.tree import CheckpointKind


class Nothing(ScoredPolicy):
    """Keeps no state. A model without states, which can resume from any page, still finds pages nobody has needed."""

    name = "none"

    def plan(self, outline: Outline) -> Iterable[Wish]:
        return ()

    def candidate(self, kind: CheckpointKind, namespace: str, name: int, worth: Worth) -> float | None:
        return None
