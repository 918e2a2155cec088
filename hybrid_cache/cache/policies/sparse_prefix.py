"""States where a dynamic programme over the depths of overlaps puts them."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.sglang_radix import SGLangRadix
from hybrid_cache.cache.tree import CheckpointKind

NUM_STATES = 4  # of a prompt, besides its end
REMEMBERED = 1024  # latest overlaps
PLANNED_EVERY = 64  # requests
MOST_DEPTHS = 256  # that are told apart

Ints = NDArray[np.int64]


class SparsePrefix(SGLangRadix):
    """A few states a prompt, where they save most if overlaps are as deep as before; least recently used path.

    Sparse prefix caching (Shirokikh and Nikolenko 2026, arXiv 2605.05219): of all ways to put M states, the one that
    leaves fewest tokens to compute, given how deep requests overlap with earlier ones. A dynamic programme finds it,
    `best_places`; here over the depths of the latest 1,024 overlaps, again after every 64 requests. The paper studies
    where states lie within what is kept, for requests that share much of a document, and says little of eviction: that
    is `SGLangRadix`'s. The end of a prompt gets a state too, for conversations, and there are four others; the paper's
    number follows from the budget of an entry.
    """

    name = "sparse-prefix"

    def __init__(self) -> None:
        super().__init__()
        self._overlaps: deque[int] = deque(maxlen=REMEMBERED)
        self._places: list[int] = []
        self._num_requests = 0

    def propose(self, outline: Outline) -> Iterable[Wish]:
        if outline.only_marked:
            return []
        if not outline.generated and not outline.again:
            self._learn(outline.shared)
        kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.MESSAGE_END
        places = {outline.floor(place): CheckpointKind.INTERIOR for place in self._places} | {outline.end: kind}
        return [Wish(at, places[at]) for at in sorted(places) if outline.start < at <= outline.end]

    def _learn(self, overlap: int) -> None:
        self._num_requests += 1
        if overlap:
            self._overlaps.append(overlap)
        if self._num_requests % PLANNED_EVERY == 0:
            self._places = best_places(self._overlaps, NUM_STATES)


def best_places(overlaps: Iterable[int], num_states: int) -> list[int]:
    """The depths of at most `num_states` states that leave least to compute: the sum of `d - deepest state <= d`.

    A state lies at one of the overlaps, or it could move on to the next one for less. cost[i] is the least for the
    overlaps before the i-th when the next state lies there.
    """
    depths, counts = np.unique(np.fromiter(overlaps, np.int64), return_counts=True)
    if not len(depths):
        return []
    depths, counts = coarser(depths, counts)
    number = np.concatenate(([0], np.cumsum(counts)))
    tokens = np.concatenate(([0], np.cumsum(counts * depths)))
    cost, came_from = tokens.astype(np.float64), list[Ints]()  # without a state, all is computed from zero
    for _ in range(min(num_states, len(depths))):
        # [last state, end]: the overlaps from the state to the end are computed from there
        spans = tokens[None, :] - tokens[:-1, None] - depths[:, None] * (number[None, :] - number[:-1, None])
        total = np.where(np.arange(len(depths))[:, None] <= np.arange(len(number)), cost[:-1, None] + spans, np.inf)
        came_from.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    places, end = list[int](), len(depths)
    for source in reversed(came_from):
        end = int(source[end])
        places.append(int(depths[end]))
    return sorted(set(places))


def coarser(depths: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """At most MOST_DEPTHS depths, the lowest of each group of neighbours."""
    size = -(-len(depths) // MOST_DEPTHS)
    starts: Sequence[int] = range(0, len(depths), size)
    return depths[::size], np.add.reduceat(counts, starts)
