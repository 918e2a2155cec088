"""What became of states and pages that are not in the tree, by the name of the prefix they stood for. Bounded."""

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from itertools import islice
from math import isfinite
from typing import Generic, NamedTuple, TypeVar

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.tree import CheckpointKind

MOST_STATES = 1 << 14
MOST_PAGES = 1 << 15
RECORDS_BYTES = 12 << 20  # most that all records take; measured: 8.7 MiB

T = TypeVar("T")


class End(Enum):
    """What became of something that is not kept."""

    EVICTED = "evicted"  # it had to make room
    DECLINED = "declined"  # the policy never kept it
    DROPPED = "dropped"  # someone asked for that


class Fate(NamedTuple):
    """A state that is not kept, or a page, which has no kind."""

    kind: CheckpointKind | None
    end: End
    time: float  # of the books' clock
    score: float | None  # the policy's; None where another reason than its score decided


class Fates:
    """Remembers the latest of either kind, and forgets the oldest."""

    def __init__(
        self, clock: Callable[[], float], most_states: int = MOST_STATES, most_pages: int = MOST_PAGES
    ) -> None:
        self._clock = clock
        self._states = _Latest[Fate](most_states)
        self._pages = _Latest[Fate](most_pages)

    def lost(self, name: Name, kind: CheckpointKind, score: float | None, end: End) -> None:
        """A state went, or was not kept in the first place. score: infinite ones say nothing, as does None"""
        score = score if score is not None and isfinite(score) else None
        self._states.put(name, Fate(kind, end, self._clock(), score))

    def lost_page(self, name: Name, end: End) -> None:
        """A page went."""
        self._pages.put(name, Fate(None, end, self._clock(), None))

    def latest_states(self, most: int) -> list[Fate]:
        """Of those that went, or were not kept, the last first."""
        return [self._states[name] for name in islice(reversed(self._states), most)]

    def of_state(self, name: Name) -> Fate | None:
        return self._states.get(name)

    def of_page(self, name: Name) -> Fate | None:
        """What became of the last page of a prefix."""
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
