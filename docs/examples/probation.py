"""A cache policy of your own: a state that was used again outlives all that were not.

cd docs/examples
hybrid-cache bench policy --policy probation:Probation,lru,learned
hybrid-cache serve --policy probation:Probation
"""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import Outline, ScoredPolicy, Wish, Worth, branch_and_end
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node

PROTECTED = 1e9  # more uses than a cache will see


class Probation(ScoredPolicy):
    """Segmented least recently used (Karedla et al. 1994), without a limit on the protected segment."""

    name = "probation"

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    @property
    def clock(self) -> float:
        """What `used` notes down as `kept.base`."""
        return float(self._uses)

    def propose(self, outline: Outline) -> Iterable[Wish]:
        """Two states a prompt: where it leaves an earlier one, and at its end."""
        return branch_and_end(outline)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        """A state was made, or a request resumed from it."""
        self._uses += 1
        kept.base = self.clock + (PROTECTED if kept.uses else 0.0)

    def score(self, base: float, kind: CheckpointKind, worth: Worth) -> float:
        """The lowest goes first."""
        return base
