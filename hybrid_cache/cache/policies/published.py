"""What policies from papers and other servers share.

None of them knows ends of prompts, marks of clients or odds of return, and none refuses what it has asked for.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, ScoredPolicy, Wish, Worth, branch_and_end
from hybrid_cache.cache.policies.signals import Ending
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node

Floats = NDArray[np.float64]

LAST, VALUE, CANDIDATE = range(3)  # rows of `Ranked._columns`


def places(outline: Outline) -> Iterable[Wish]:
    """Marconi's two places; none when the client wants states at marks of its own only."""
    return () if outline.only_marked else branch_and_end(outline)


def admit(kind: CheckpointKind) -> float | None:
    """The score of a candidate: it always gets in, whatever has to go, unless these systems have no such thing."""
    return None if kind in (CheckpointKind.PROMPT_END, CheckpointKind.LAYER_INPUTS) else math.inf


def normalised(values: Floats) -> Floats:
    """Shifted and scaled to [0, 1]; all ones when all are equal."""
    low, high = values.min(), values.max()
    return np.ones_like(values) if low == high else (values - low) / (high - low)


class PublishedPolicy(ScoredPolicy):
    """States at the two places, and a score that a heap can hold."""

    def propose(self, outline: Outline) -> Iterable[Wish]:
        return places(outline)

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        return admit(kind)


class RankedPolicy:
    """States at the two places, and scores that depend on all states at once, so that no heap can hold them.

    A state is a column of numbers; each victim takes one pass over all columns. Only the state that a request resumes
    from counts as used. The clock ticks when a prefix is looked up, a state added, or one evicted.
    """

    name = ""
    keeps_states = True
    wants_rises = True

    _worth_of: Callable[[Kept], Worth]

    def __init__(self) -> None:
        self._now = 0.0
        self._rows: dict[Kept, int] = {}
        self._kept: list[Kept] = []
        self._columns = np.zeros((3, 64))

    def value(self, kept: Kept) -> float:
        """What is ranked together with recency; it may fall only when the cache reports it."""
        raise NotImplementedError

    def is_candidate(self, kept: Kept) -> bool:
        """Whether a state may go while there are others that may."""
        return True

    def scores(self, age: Floats, value: Floats) -> Floats:
        """Scores of all candidates by ticks since their last use, at least 1, and value."""
        raise NotImplementedError

    def open(self, worth_of: Callable[[Kept], Worth], clock: Callable[[], float]) -> None:
        self._worth_of = worth_of

    def propose(self, outline: Outline) -> Iterable[Wish]:
        if outline.start == 0:  # nothing was found; else `used` has ticked
            self._now += 1
        return places(outline)

    def ended(self, ending: Ending) -> None:
        if not ending.again:
            self.finished(ending.name, ending.num_output_tokens)

    def finished(self, name: Name, num_output_tokens: int) -> None:
        """What there was before `ended`, for policies that are written for it."""

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        return admit(kind)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._now += 1
        kept.base = self._now

    def add(self, kept: Kept) -> None:
        row = self._rows.setdefault(kept, len(self._kept))
        if row == len(self._kept):
            self._kept.append(kept)
            if row == self._columns.shape[1]:
                self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._refresh(row)

    def remove(self, kept: Kept) -> None:
        row = self._rows.pop(kept, None)
        if row is None:
            return
        last = self._kept.pop()
        if last is not kept:
            self._kept[row] = last
            self._columns[:, row] = self._columns[:, self._rows[last]]
            self._rows[last] = row

    def lowest(self) -> tuple[float, Kept] | None:
        while self._kept:
            columns = self._columns[:, : len(self._kept)]
            rows = np.flatnonzero(columns[CANDIDATE])
            if not len(rows):
                rows = np.arange(len(self._kept))
            scores = self.scores(self._now + 1 - columns[LAST, rows], columns[VALUE, rows])
            lowest = int(scores.argmin())
            row = int(rows[lowest])
            if not self._refresh(row):
                return float(scores[lowest]), self._kept[row]
        return None

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        if math.isfinite(score):  # neither refused nor dropped
            self._now += 1

    def items(self) -> Iterable[Kept]:
        for row, kept in enumerate(self._kept):
            assert self._columns[VALUE, row] <= self.value(kept), "a fall that was not reported"
            assert self._columns[CANDIDATE, row] or not self.is_candidate(kept), "a candidate that was not reported"
        return list(self._kept)

    def score_of(self, kept: Kept) -> float | None:
        row, columns = self._rows.get(kept), self._columns[:, : len(self._kept)]
        return None if row is None else float(self.scores(self._now + 1 - columns[LAST], columns[VALUE])[row])

    def _refresh(self, row: int) -> bool:
        """Brings a column up to date -> whether it was not."""
        kept = self._kept[row]
        fresh = kept.base, self.value(kept), float(self.is_candidate(kept))
        stale = fresh != tuple(self._columns[:, row].tolist())
        if stale:
            self._columns[:, row] = fresh
        return stale
