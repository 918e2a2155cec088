"""The default policy: expected FLOPs saved per byte and second.

    score = returns a second (returns.py) * FLOPs that a return saves / bytes that are freed

In real traffic three quarters of all prompts never come back, so most of what can be gained lies in not keeping them.
Which ones come back shows in what a server sees anyway: how long the last answer was, how much of the prompt was
known, how many turns it has had, whose message ended it, how far from its end the next one diverges. places.py turns
that into features, returns.py into a rate that is learned while the server runs, and the rate into what a second of
memory is worth now. A state enters if it is worth more than what has to go for it.

Four rules make one decision of what belongs together:

* The cost of a state is that of computing again from the nearest state that is *still there*.
* When a state is evicted, the one above it *stands in* for it: it takes over its prospects if they are better, and what
  is resumed from it from then on counts for it.
* Before that it *stands by*: a conversation shrinks from its end when room is needed, and goes on from the last state
  that is left. How likely that is the one after a stretch of it grows with what a request pushes out, and with the
  stretch, both as shares of the cache. So a state has part of the prospects of the tip of its chain: where a
  conversation is half of the cache, states behind its end are worth keeping; where it is a thousandth, they are not.
* A new tip *takes the place* of the state that its own prompt was resumed from, if that is what would have to go and
  nobody else has passed there: both do the same for this chain, and the tip does more. `branching` says how
  likely it is that somebody will.

No state is walked to for a decision: the scores of all are computed at once, in one vectorised pass, and the lowest
64th is a shortlist from which victims are taken until it is empty or old. A state on it whose score has risen is
dropped from it; a state that is made or changed and scores less than its last is put in.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, Wish, Worth, every_place
from hybrid_cache.cache.policies.places import FRESH, ODDS, SIZES, Place, PlaceMemory
from hybrid_cache.cache.policies.returns import MOST_LIVES, Floats, Ints, ReturnModel
from hybrid_cache.cache.policies.signals import Ending
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node, Outside

FIT_EARLY = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448)  # requests after which the model is fitted,
FIT_EVERY = 512  # and requests between two fits after that
SHORTLIST_SHARE = 64
# How likely a state is needed although there are deeper ones: so many times the share of the cache that it spans, at
# most so much, and nothing below the least. Little changes between 4 and 32; with less, trees of many branches lose.
STANDS_BY, LEAST_STANDS_BY, MOST_STANDS_BY = 16.0, 0.01, 0.5
OUTSIDE = (CheckpointKind.EXPLICIT, CheckpointKind.LAYER_INPUTS)  # may be kept outside the tree
STALE_SCORES = 512  # scores computed in vain a second, at most: a shortlist of n states lives for n / 512 seconds


def new_model(most_lives: int = MOST_LIVES) -> ReturnModel:
    """Knows nothing yet."""
    return ReturnModel(ODDS, tuple(SIZES.values()), most_lives)


class Prospects:
    """Of one place for each row, as columns: all indices in one pass."""

    def __init__(self, model: ReturnModel) -> None:
        self._model = model
        self.places: list[Place] = []
        self._since = np.zeros(64)
        self._group = np.zeros(64, np.int64)
        self._features = np.zeros((64, len(SIZES)), np.int64)

    def append(self, place: Place) -> None:
        self.places.append(place)
        if len(self.places) > len(self._since):
            self._since, self._group = doubled(self._since), doubled(self._group)
            self._features = doubled(self._features)
        self.write(len(self.places) - 1, place)

    def write(self, row: int, place: Place) -> None:
        self.places[row] = place
        self._since[row], self._group[row], self._features[row] = place.since, place.group, place.features

    def drop(self, row: int) -> None:
        """The last row takes its place."""
        end = len(self.places) - 1
        for column in (self._since, self._group, self._features):
            column[row] = column[end]
        self.places[row] = self.places[end]
        del self.places[end]

    def indices(self, now: float, rows: Ints | None = None) -> Floats:
        """Of some rows or all, by what was written."""
        some = slice(len(self.places)) if rows is None else rows
        level = self._model.level(self._group[some], self._features[some])
        return self._model.index(self._group[some], level, now - self._since[some])


def doubled(column: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([column, np.zeros_like(column)])


def stands_by(worth: Worth) -> float:
    """How likely a state is to be needed while the chain that passed it goes on after a deeper one."""
    likely = STANDS_BY * worth.share
    return min(likely, MOST_STANDS_BY) if likely >= LEAST_STANDS_BY else 0.0


class Learned:
    """See the module docstring."""

    name = "learned"
    keeps_states = True
    wants_rises = False

    def __init__(self, model: ReturnModel | None = None, *, learn: bool = True) -> None:
        """model, learn=False: for studies of what it would do with a model fitted beforehand"""
        self._model = model or new_model()
        self._learn = learn
        self._memory = PlaceMemory(self._model)
        self._num_requests = 0
        self._now = 0.0  # when a prompt was last admitted: until the next, time alone changes no score
        self._num_added = 0
        self._rows: dict[Kept, int] = {}
        # One row for each state that may be evicted.
        self._kept: list[Kept] = []
        self._own = Prospects(self._model)  # of the state's place, or of the one it stands in for
        self._tips = Prospects(self._model)  # of the chain that passed it last
        self._value = np.zeros(64)  # FLOPs a byte
        self._stands_by = np.zeros(64)
        self._shortlist: list[tuple[float, int, Kept]] = []
        self._stale_at = 0.0  # when the shortlist is too old to be believed

    def open(self, worth_of: Callable[[Kept], Worth], clock: Callable[[], float]) -> None:
        self._worth_of, self._clock = worth_of, clock
        self._now = clock()

    # Learning

    def propose(self, outline: Outline) -> Iterable[Wish]:
        self._now = self._clock()
        wishes = list(every_place(outline))
        self._memory.visit(outline, wishes, self._now)
        if self._learn and not outline.generated and not outline.again:
            self._num_requests += 1
            if self._num_requests % FIT_EVERY == 0 or self._num_requests in FIT_EARLY:
                self._model.fit(self._now)
                self._shortlist.clear()
        return wishes

    def ended(self, ending: Ending) -> None:
        place = self._memory.get(ending.name)
        if place is not None:
            self._memory.answered(place, ending)
            if place.kept in self._rows:
                self.add(place.kept)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        place = self._memory.get(name)
        row = self._rows.get(above) if above is not None else None
        if place is not None:
            place.kept = None
            if row is not None and self._index(place) > self._index(self._own.places[row]):
                self._file(row, place)

    # Ordering

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        place = self._memory.get(name)
        if place is None and kind in OUTSIDE:
            place = self._memory.add_unseen(kind, name, 0, self._now)
        if place is None:
            return 0.0
        index = max(self._index(place), stands_by(worth) * self._index(self._memory.tip(place)))
        score = index * worth.flops / worth.num_bytes
        return self._raised(score, worth, self._memory.get(place.source))

    def _raised(self, score: float, worth: Worth, source: Place | None) -> float:
        """A candidate's score, or that of what it was resumed from if that is higher, is next to go, and the candidate
        is to take its place.
        """
        kept = source.kept if source is not None and not source.branched else None
        row = None if kept is None else self._rows.get(kept)
        if kept is None or row is None:
            return score
        branching = self._memory.branching
        if worth.flops * (1.0 - branching) <= self._worth_of(kept).flops * branching:
            return score
        self._file(row, self._own.places[row])  # it may have risen
        if self._score(row) <= score:
            return score
        lowest = self.lowest()
        return lowest[0] if lowest is not None and lowest[1] is kept else score

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        if isinstance(kept, Outside) and kept.attached:  # `propose` sees the returns to what is in the tree
            place = self._memory.get(kept.name)
            if place is not None:
                self._memory.returned_to(place, self._clock())
                if kept in self._rows:
                    self.add(kept)

    def add(self, kept: Kept) -> None:
        row = self._rows.get(kept)
        if row is None:
            row = self._rows[kept] = len(self._kept)
            place = self._memory.place_of(kept, self._now)
            place.kept = kept
            self._kept.append(kept)
            self._own.append(place)
            self._tips.append(place)
            if row == len(self._value):
                self._value, self._stands_by = doubled(self._value), doubled(self._stands_by)
        self._file(row, self._own.places[row])

    def remove(self, kept: Kept) -> None:
        row = self._rows.pop(kept, None)
        if row is None:
            return
        last = self._kept.pop()
        if last is not kept:
            self._kept[row], self._rows[last] = last, row
            for column in (self._value, self._stands_by):
                column[row] = column[len(self._kept)]
        self._own.drop(row)
        self._tips.drop(row)

    def lowest(self) -> tuple[float, Kept] | None:
        if self._now > self._stale_at:
            self._shortlist.clear()
        while self._kept:
            while self._shortlist:
                filed, _, kept = self._shortlist[0]
                row = self._rows.get(kept)
                if row is not None and (score := self._score(row)) <= filed:
                    return score, kept
                del self._shortlist[0]
            self._make_shortlist()
        return None

    def items(self) -> Iterable[Kept]:
        return list(self._kept)

    def score_of(self, kept: Kept) -> float | None:
        row = self._rows.get(kept)
        return None if row is None else self._score(row)

    def remembered(self) -> bytes:
        """See `Remembers`."""
        return save(self._memory.arrays(self._clock()))

    def recall(self, data: bytes, elapsed_s: float) -> None:
        """See `Remembers`."""
        try:
            arrays = load(data)
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(str(error)) from error
        self._memory.take(arrays, self._clock() - elapsed_s)

    def standing(self, name: Name) -> float:
        """See `Foresees`."""
        place = self._memory.get(name)
        if place is None:
            return 1.0
        new = self._model.index_of(FRESH, [0] * len(SIZES), 0.0)
        return min(max(self._index(place) / max(new, 1e-300), 1 / 8), 8.0)

    def _file(self, row: int, place: Place) -> None:
        """Writes the row of a state whose place is now `place`, which may be that of another state it stands in for."""
        self._write(row, place)
        if self._shortlist:
            score = self._score(row)
            if score < self._shortlist[-1][0]:
                self._num_added += 1
                insort(self._shortlist, (score, self._num_added, self._kept[row]))

    def _write(self, row: int, place: Place) -> None:
        kept = self._kept[row]
        worth, own = self._worth_of(kept), self._memory.get(kept.name) or place
        self._own.write(row, place)
        self._tips.write(row, self._memory.tip(own))
        self._value[row] = worth.flops / worth.num_bytes
        self._stands_by[row] = 0.0 if self._tips.places[row] is own else stands_by(worth)

    def _make_shortlist(self) -> None:
        """The states with the lowest scores, by what they were worth when filed; rises since then are noticed now.

        May stay empty when all of them have risen; but what was noticed is filed, so that the next pass knows it.
        """
        n = len(self._kept)
        indices = self._own.indices(self._now)
        behind = np.flatnonzero(self._stands_by[:n])
        indices[behind] = np.maximum(indices[behind], self._stands_by[behind] * self._tips.indices(self._now, behind))
        scores = indices * self._value[:n]
        k = min(n, max(8, n // SHORTLIST_SHARE))
        rows = np.argpartition(scores, k - 1)[:k]
        bound = scores[rows].max() * (1 + 1e-9) if k < n else np.inf
        for row in rows.tolist():
            self._write(row, self._own.places[row])
            score = self._score(row)
            if score <= bound:
                self._num_added += 1
                self._shortlist.append((score, self._num_added, self._kept[row]))
        self._shortlist.sort()
        self._stale_at = self._now + n / STALE_SCORES

    def _score(self, row: int) -> float:
        index = self._index(self._own.places[row])
        if likely := self._stands_by.item(row):
            index = max(index, likely * self._index(self._tips.places[row]))
        return index * self._value.item(row)

    def _index(self, place: Place) -> float:
        return self._model.index_of(place.group, place.features, self._now - place.since)
