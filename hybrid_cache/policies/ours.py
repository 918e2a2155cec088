"""Predicted returns a second * FLOPs saved a return / bytes held."""

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from hybrid_cache.policies.base import Outline, Wish, Worth, every_place
from hybrid_cache.policies.returns import GRID, NUM_BUCKETS, ReturnModel, bucket_of
from hybrid_cache.tree import CheckpointKind, Kept, Node, PromptEnd

KINDS = list(CheckpointKind)
ROLES = {"": 0, "system": 1, "developer": 1, "user": 2, "assistant": 3, "tool": 4}
SIZES = (len(KINDS) * 5, 2, 6, 12, 15, 15, 8)  # values of each feature
OFFSETS = tuple(sum(SIZES[:i]) for i in range(len(SIZES)))
MOST_PLACES = 1 << 17
FIT_EVERY = 256


def log_bin(value: float, most: int) -> int:
    return min(int(math.log2(value + 1.0)), most)


@dataclass(slots=True, eq=False)
class Place:
    kind: int
    role: int
    at_end: bool
    hit: int
    length: int
    output: int
    pace: int
    turns: int
    uses: int
    since: float
    life: int
    level: int = 0
    heir: "Place | None" = None  # the best place that this one stands in for

    def features(self) -> list[int]:
        values = (
            self.kind * 5 + self.role,
            int(self.at_end),
            self.hit,
            self.length,
            self.output,
            self.pace,
            self.turns,
        )
        return [offset + value for offset, value in zip(OFFSETS, values, strict=True)]

    @property
    def group(self) -> int:
        return 1 + min(self.uses, 2) if self.uses else int(KINDS[self.kind] is CheckpointKind.INTERIOR)


class Ours:
    name = "ours"
    wants_rises = False

    def __init__(self) -> None:
        self.model = ReturnModel(sum(SIZES), len(SIZES))
        self._places: OrderedDict[tuple[str, int], Place] = OrderedDict()
        self._requests = 0
        self._rows: dict[Kept, int] = {}
        self._kept: list[Kept] = []
        self._place: list[Place] = []
        self._value = np.zeros(64)
        self._level = np.zeros(64, np.int64)
        self._group = np.zeros(64, np.int64)
        self._since = np.zeros(64)
        self._short: list[tuple[float, int, Kept]] = []
        self._serial = 0

    def open(self, worth_of: Callable[[Kept], Worth], clock: Callable[[], float]) -> None:
        self._worth_of, self._clock = worth_of, clock

    # learning

    def plan(self, outline: Outline) -> Iterable[Wish]:
        wishes = list(every_place(outline))
        now, names, ns = self._clock(), outline.keys.names, outline.namespace
        found: Place | None = None
        if not outline.generated and not outline.again:
            last = len(names) if outline.num_tokens % outline.page_tokens else len(names) - 1
            for index in range(last - 1, -1, -1):
                found = self._places.get((ns, names[index]))
                if found is not None:
                    break
            self._requests += 1
            if self._requests % FIT_EVERY == 0 or self._requests in (32, 64, 128):
                self._fit(now)
        pace, turns = 13, 0
        if found is not None:
            pace = log_bin(now - found.since, 12)
            turns = min(found.turns + 1, 7)
            self.model.end(found.life, now)
            found.uses += 1
            found.pace = pace
            found.since = now
            found.life = self.model.begin(found.features(), found.group, now)
            found.level = self.model.level(found.features(), found.group)
        hit = min(int(outline.shared / outline.num_tokens * 4 + 0.999), 4) + (outline.shared > 0.9 * outline.num_tokens)
        roles = {outline.floor(b.position): ROLES.get(b.role, 0) for b in outline.boundaries}
        for wish in wishes:
            key = (ns, outline.name(wish.position))
            place = self._places.get(key)
            if place is not None:
                continue
            place = Place(
                KINDS.index(wish.kind),
                3 if outline.generated else roles.get(wish.position, 0),
                wish.position == outline.end,
                hit,
                log_bin(wish.position / 512, 11),
                0,
                pace,
                turns,
                0,
                now,
                0,
            )
            place.life = self.model.begin(place.features(), place.group, now)
            place.level = self.model.level(place.features(), place.group)
            self._places[key] = place
        while len(self._places) > MOST_PLACES:
            self._places.popitem(last=False)
        return wishes

    def finished(self, namespace: str, name: int, num_output_tokens: int) -> None:
        place = self._places.get((namespace, name))
        if place is not None and place.output == 0:
            place.output = 1 + log_bin(num_output_tokens, 13)
            self.model.change(place.life, place.features())
            place.level = self.model.level(place.features(), place.group)
            kept = self._kept_at.get(place) if hasattr(self, "_kept_at") else None

    def _fit(self, now: float) -> None:
        self.model.fit(now)
        for place in self._places.values():
            place.level = self.model.level(place.features(), place.group)
        for row, place in enumerate(self._place):
            self._level[row] = place.level
        self._short.clear()

    # ordering

    def candidate(self, kind: CheckpointKind, namespace: str, name: int, worth: Worth) -> float:
        place = self._places.get((namespace, name))
        if place is None:
            return 0.0
        return float(self.model.table[place.level, place.group, 0] * worth.flops / worth.num_bytes)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        pass

    def add(self, kept: Kept) -> None:
        place = self._place_of(kept)
        row = self._rows.get(kept)
        if row is None:
            row = self._rows[kept] = len(self._kept)
            self._kept.append(kept)
            self._place.append(place)
            if row == len(self._value):
                for column in ("_value", "_level", "_group", "_since"):
                    old = getattr(self, column)
                    setattr(self, column, np.concatenate([old, np.zeros_like(old)]))
        else:
            self._place[row] = place
        worth = self._worth_of(kept)
        self._value[row] = worth.flops / worth.num_bytes
        self._level[row] = place.level
        self._group[row] = place.group
        self._since[row] = place.since
        if self._short:
            score = self._score_row(row)
            if score < self._short[-1][0]:
                self._serial += 1
                insort(self._short, (score, self._serial, kept))

    def _place_of(self, kept: Kept) -> Place:
        key = (kept.node.namespace, self._name(kept))
        place = self._places.get(key)
        if place is None:
            place = Place(
                KINDS.index(kept.kind), 0, True, 0, log_bin(kept.num_tokens / 512, 11), 0, 13, 0, 0, self._clock(), 0
            )
            place.life = self.model.begin(place.features(), place.group, self._clock())
            place.level = self.model.level(place.features(), place.group)
            self._places[key] = place
        return place

    def _name(self, kept: Kept) -> int:
        return kept.name

    def remove(self, kept: Kept) -> None:
        row = self._rows.pop(kept, None)
        if row is None:
            return
        last = len(self._kept) - 1
        if row != last:
            self._kept[row] = self._kept[last]
            self._place[row] = self._place[last]
            self._rows[self._kept[row]] = row
            for column in (self._value, self._level, self._group, self._since):
                column[row] = column[last]
        self._kept.pop()
        self._place.pop()

    def _score_row(self, row: int) -> float:
        return float(
            self.model.at(self._level[row], self._group[row], self._clock() - self._since[row]) * self._value[row]
        )

    def lowest(self) -> tuple[float, Kept] | None:
        while True:
            while self._short:
                score, _, kept = self._short[0]
                row = self._rows.get(kept)
                if row is not None and self._score_row(row) <= score * 1.0000001:
                    return score, kept
                self._short.pop(0)
            if not self._kept:
                return None
            self._rebuild()

    def _rebuild(self) -> None:
        n = len(self._kept)
        now = self._clock()
        for row in range(n):
            place = self._place[row]
            self._since[row] = place.since
            self._group[row] = place.group
            self._level[row] = place.level
        scores = self.model.at(self._level[:n], self._group[:n], now - self._since[:n]) * self._value[:n]
        k = min(n, max(8, n // 64))
        rows = np.argpartition(scores, k - 1)[:k]
        self._short = []
        bound = scores[rows].max() if k < n else math.inf
        for row in rows:
            kept = self._kept[row]
            worth = self._worth_of(kept)
            self._value[row] = worth.flops / worth.num_bytes
            own = self._places.get((kept.node.namespace, kept.name))
            if (
                own is not None
                and own is not self._place[row]
                and self._index(own, now) > self._index(self._place[row], now)
            ):
                self._place[row] = own
            self._serial += 1
            score = self._score_row(int(row))
            if score <= bound:
                self._short.append((score, self._serial, kept))
        self._short.sort()

    def lost(self, namespace: str, name: int, score: float, above: Kept | None) -> None:
        place = self._places.get((namespace, name))
        row = self._rows.get(above) if above is not None else None
        if place is None or row is None:
            return
        now = self._clock()
        mine = self._place[row]
        if self._index(place, now) > self._index(mine, now):
            self._place[row] = place
            self._level[row] = place.level
            self._group[row] = place.group
            self._since[row] = place.since

    def _index(self, place: Place, now: float) -> float:
        return float(self.model.at(place.level, place.group, now - place.since))

    def items(self) -> Iterable[Kept]:
        return list(self._kept)
