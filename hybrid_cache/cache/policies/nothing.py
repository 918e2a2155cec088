"""No states at all."""

from collections.abc import Iterable

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, ScoredPolicy, Wish, Worth
from hybrid_cache.cache.tree import CheckpointKind


class Nothing(ScoredPolicy):
    """Keeps no state. A model without states, which resumes from any page, still finds pages not yet evicted."""

    name = "none"
    keeps_states = False

    def propose(self, outline: Outline) -> Iterable[Wish]:
        return ()

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        return None
