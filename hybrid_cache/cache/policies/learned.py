"""The default policy: expected FLOPs saved per byte and second.

    score = returns a second (returns.py) * FLOPs that a return saves / bytes that are freed

In real traffic three quarters of all prompts never come back, so most of what can be gained lies in not keeping them.
Which ones come back shows in what a server sees anyway: how long the last answer was, how much of the prompt was
known, how many turns it has had, whose message ended it, how far from its end the next one diverges. places.py turns
that into features, returns.py into a rate that is learned while the server runs, and the rate into what a second of
memory is worth now. A state enters if it is worth more than what has to go for it.

Two rules complete it. The cost of a state is that of computing again from the nearest state that is *still there*.
And when a state is evicted, the one above it stands in for it: it takes over its prospects if they are better, and
what is resumed from it from then on counts for it.

No state is walked to for a decision: the scores of all are computed at once, in one vectorised pass, and the lowest
64th is a shortlist from which victims are taken until it is empty or old. A state on it whose score has risen is
dropped from it; a state that is made or changed and scores less than its last is put in.
"""

from bisect import insort
from collections.abc import Callable, Iterable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, Wish, Worth, every_place
from hybrid_cache.cache.policies.places import FRESH, ODDS, SIZES, Place, PlaceMemory
from hybrid_cache.cache.policies.returns import MOST_LIVES, ReturnModel
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node, Outside

FIT_EARLY = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448)  # requests after which the model is fitted,
FIT_EVERY = 512  # and requests between two fits after that
SHORTLIST_SHARE = 64
OUTSIDE = (CheckpointKind.EXPLICIT, CheckpointKind.LAYER_INPUTS)  # may be kept outside the tree
STALE_SCORES = 512  # scores computed in vain a second, at most: a shortlist of n states lives for n / 512 seconds


def new_model(most_lives: int = MOST_LIVES) -> ReturnModel:
    """Knows nothing yet."""
    return ReturnModel(ODDS, tuple(SIZES.values()), most_lives)


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
        self._places: list[Place] = []  # the state's own, or the one it stands in for
        self._value = np.zeros(64)  # FLOPs a byte
        self._since = np.zeros(64)
        self._group = np.zeros(64, np.int64)
        self._features = np.zeros((64, len(SIZES)), np.int64)
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

    def finished(self, name: Name, num_output_tokens: int) -> None:
        place = self._memory.get(name)
        if place is not None:
            self._memory.answered(place, num_output_tokens)
            if place.kept in self._rows:
                self.add(place.kept)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        place = self._memory.get(name)
        row = self._rows.get(above) if above is not None else None
        if place is not None:
            place.kept = None
            if row is not None and self._index(place) > self._index(self._places[row]):
                self._file(row, place)

    # Ordering

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        place = self._memory.get(name)
        if place is None and kind in OUTSIDE:
            place = self._memory.add_unseen(kind, name, 0, self._now)
        return 0.0 if place is None else self._index(place) * worth.flops / worth.num_bytes

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
            self._places.append(place)
            if row == len(self._value):
                self._grow()
        self._file(row, self._places[row])

    def remove(self, kept: Kept) -> None:
        row = self._rows.pop(kept, None)
        if row is None:
            return
        last, place = self._kept.pop(), self._places.pop()
        if last is not kept:
            end = len(self._kept)
            self._kept[row], self._places[row], self._rows[last] = last, place, row
            for column in (self._value, self._since, self._group, self._features):
                column[row] = column[end]

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
        now = self._clock()
        return save(self._model.arrays(now) | self._memory.arrays(now))

    def recall(self, data: bytes, elapsed_s: float) -> None:
        """See `Remembers`."""
        try:
            arrays, then = load(data), self._clock() - elapsed_s
            self._model.take(arrays, then)  # places name lives of it
            self._memory.take(arrays, then)
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(str(error)) from error

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
        worth = self._worth_of(self._kept[row])
        self._places[row] = place
        self._value[row] = worth.flops / worth.num_bytes
        self._since[row] = place.since
        self._group[row] = place.group
        self._features[row] = place.features

    def _grow(self) -> None:
        self._value = np.concatenate([self._value, np.zeros_like(self._value)])
        self._since = np.concatenate([self._since, np.zeros_like(self._since)])
        self._group = np.concatenate([self._group, np.zeros_like(self._group)])
        self._features = np.concatenate([self._features, np.zeros_like(self._features)])

    def _make_shortlist(self) -> None:
        """The states with the lowest scores, by what they were worth when filed; rises since then are noticed now.

        May stay empty when all of them have risen; but what was noticed is filed, so that the next pass knows it.
        """
        n = len(self._kept)
        group = self._group[:n]
        level = self._model.level(group, self._features[:n])
        scores = self._model.index(group, level, self._now - self._since[:n]) * self._value[:n]
        k = min(n, max(8, n // SHORTLIST_SHARE))
        rows = np.argpartition(scores, k - 1)[:k]
        bound = scores[rows].max() * (1 + 1e-9) if k < n else np.inf
        for row in rows.tolist():
            self._write(row, self._places[row])
            score = self._score(row)
            if score <= bound:
                self._num_added += 1
                self._shortlist.append((score, self._num_added, self._kept[row]))
        self._shortlist.sort()
        self._stale_at = self._now + n / STALE_SCORES

    def _score(self, row: int) -> float:
        return self._index(self._places[row]) * self._value.item(row)

    def _index(self, place: Place) -> float:
        return self._model.index_of(place.group, place.features, self._now - place.since)
