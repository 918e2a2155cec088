"""What became of states and pages that are not in the tree, by the name of the prefix they stood for. Bounded."""

from collections import OrderedDict
from collections.abc import Callable
from math import isfinite
from typing import Generic, NamedTuple, TypeVar

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.tree import CheckpointKind

MOST_STATES = 1 << 14
MOST_PAGES = 1 << 15
RECORDS_BYTES = 12 << 20  # most that all records take; measured: 8.7 MiB

T = TypeVar("T")


class Fate(NamedTuple):
    """A state that is not kept."""

    kind: CheckpointKind
    declined: bool  # it never was; else it was evicted
    time: float  # of the books' clock
    score: float | None  # the policy's; None where another reason than its score decided


class Fates:
    """Remembers the latest of either kind, and forgets the oldest."""

    def __init__(
        self, clock: Callable[[], float], most_states: int = MOST_STATES, most_pages: int = MOST_PAGES
    ) -> None:
        self._clock = clock
        self._states = _Latest[Fate](most_states)
        self._pages = _Latest[float](most_pages)

    def lost(self, name: Name, kind: CheckpointKind, score: float | None, *, declined: bool) -> None:
        """A state was evicted, or not kept in the first place. score: infinite ones say nothing, as does None"""
        score = score if score is not None and isfinite(score) else None
        self._states.put(name, Fate(kind, declined, self._clock(), score))

    def lost_page(self, name: Name) -> None:
        """A page was evicted."""
        self._pages.put(name, self._clock())

    def of_state(self, name: Name) -> Fate | None:
        return self._states.get(name)

    def of_page(self, name: Name) -> float | None:
        """When the last page of a prefix was evicted."""
        return self._pages.get(name)


class _Latest(OrderedDict[Name, T], Generic[T]):
    """So many entries, those that were put last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def put(self, name: Name, value: T) -> None:
        self[name] = value
        self.move_to_end(name)
        if len(self) > self._most:
            self.popitem(last=False)
