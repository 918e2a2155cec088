"""A policy that knows the requests to come, but not what things weigh: Belady's rule on states."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.bench.policy.rows import BELADY
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, Wish, Worth
from hybrid_cache.cache.policies.published import VALUE, Floats, RankedPolicy
from hybrid_cache.cache.tree import CheckpointKind, Kept


class Belady(RankedPolicy):
    """Evicts the state whose prefix is asked for again last of all (Belady 1966); one for which that never happens is
    not kept.

    States lie only where some later request leaves the path of this one, so none is in vain. A state is asked for when
    a request runs through its prefix, whether or not it finds a deeper one. What a state saves, how many bytes it
    frees, and that one long-lived state may be worth less than ten short-lived ones do not count: a plan that weighs
    them saves more, see `bound`.
    """

    name = BELADY

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self._size = len(trace.requests) + 1
        pages, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number, r in enumerate(trace.requests):
            own = r.pages[: max(0, r.num_prompt_tokens - 1) // trace.page_tokens].astype(np.int64)
            pages.append(own)
            numbers.append(np.full(len(own), number))
        self._visits = np.sort(np.concatenate(pages) * self._size + np.concatenate(numbers))
        self._at = -1  # the request that was admitted last

    def next_visit(self, pages: NDArray[np.int64]) -> Floats:
        """[pages] The next request that runs through each; infinity if there is none."""
        found = np.searchsorted(self._visits, pages * self._size + max(self._at, 0), side="right")
        visits = np.append(self._visits, -1)[found]
        return np.where(visits // self._size == pages, visits % self._size, np.inf)

    def propose(self, outline: Outline) -> Iterable[Wish]:
        names = outline.keys.names[1 : outline.num_tokens // outline.page_tokens + 1]
        if not outline.generated and not outline.again:
            self._advance(outline)
        if outline.only_marked or not names:
            return []
        visits = self.next_visit(np.array([page_of(name) for name in names]))
        ends = np.flatnonzero((visits < np.append(visits[1:], np.inf)) & np.isfinite(visits)) + 1
        kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.BRANCH
        return [Wish(at, kind) for at in (ends * outline.page_tokens).tolist() if at > outline.start]

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        if kind in (CheckpointKind.PROMPT_END, CheckpointKind.LAYER_INPUTS):
            return None
        return -float(self.next_visit(np.array([page_of(name)]))[0])

    def value(self, kept: Kept) -> float:
        """Its next visit; later than any request, but not infinite, if there is none."""
        return min(float(self.next_visit(np.array([page_of(kept.name)]))[0]), float(self._size))

    def scores(self, age: Floats, value: Floats) -> Floats:
        return -value

    def lowest(self) -> tuple[float, Kept] | None:
        for row in np.flatnonzero(self._columns[VALUE, : len(self._kept)] <= self._at).tolist():
            self._refresh(row)
        found = super().lowest()
        return None if found is None else (-math.inf if found[0] <= -self._size else found[0], found[1])

    def _advance(self, outline: Outline) -> None:
        """Finds the request; those that did not fit were never admitted."""
        page_tokens = self._trace.page_tokens
        while self._at + 1 < len(self._trace.requests):
            self._at += 1
            r = self._trace.requests[self._at]
            num_pages = r.num_prompt_tokens // page_tokens
            last = int(r.pages[num_pages - 1]) if num_pages else None
            names = outline.keys.names[1:]
            if r.num_prompt_tokens == outline.num_tokens and (last is None or page_of(names[num_pages - 1]) == last):
                return


def page_of(name: Name) -> int:
    """The page that a replay has given a name."""
    return int.from_bytes(name, "little", signed=True)
