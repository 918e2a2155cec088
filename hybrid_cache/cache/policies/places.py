"""What the policy remembers of prompts: places where a state could be kept, whether or not one was.

A place is *returned to* by the next prompt that runs through it and through no deeper place that is known: that prompt
would go on from there. Only names and small numbers are kept, and of the latest places only.

Prompts of which each goes on where the last one ended are a *chain*, and where it ends now is its *tip*. The prospects
of a conversation go with its tip; whoever returns to a place behind one *branches off* there.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hybrid_cache.cache.keys import NAME_BYTES, Keys, Name
from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.returns import MOST_AGE_S, MOST_COUNT, Array, ReturnModel, checked
from hybrid_cache.cache.policies.signals import Ending
from hybrid_cache.cache.tree import CheckpointKind, Kept

MOST_PLACES = 1 << 17
MOST_SAVED = 1 << 13  # places that a later process hears of

KINDS = list(CheckpointKind)
ROLES = {"system": 1, "developer": 1, "user": 2, "assistant": 3, "tool": 4, "function": 4}
FRESH, FRESH_INTERIOR, FRESH_PROMPT_END, ONCE, OFTEN = range(5)  # groups of lives
ODDS = (1.0, 0.1, 0.3, 0.1, 3.0)  # of a return in each group, before anything is known
GROUPS = {CheckpointKind.INTERIOR: FRESH_INTERIOR, CheckpointKind.PROMPT_END: FRESH_PROMPT_END}
# What is known of a place, and how many values that has.
SIZES = {
    "kind": len(KINDS),
    "role": 5,  # of the message that ends there
    "from_end": 16,  # messages after it in the prompt that made it; 15: it is inside a message
    "shared": 6,  # share of that prompt that was known already
    "length": 12,  # log2 of tokens / 512
    "output": 15,  # log2 of tokens generated from it, once known
    "pace": 14,  # log2 of seconds since the place before it on the same path was made or returned to; 13: there is none
    "turns": 8,  # known places on the path, one for each prompt that was longer than the one before
}


@dataclass(slots=True, eq=False)
class Place:
    name: Name  # of the prefix that ends here
    features: list[int]  # in the order of SIZES
    since: float  # when it was made or last returned to
    uses: int = 0
    life: int = 0
    kept: Kept | None = None  # the state that is kept there
    chain: int = 0  # the one that passed last; 0: not known, after a restart or for what no prompt has shown
    branched: bool = False  # more than one has passed
    passed: bool = False  # a prompt went on from here, or through here; else its chain may go on here
    onward: "Place | None" = None  # a deeper place on the way of the chain that passed last; None at its tip
    source: Name = b""  # what the latest prompt through here was resumed from

    @property
    def group(self) -> int:
        if self.uses:
            return ONCE if self.uses == 1 else OFTEN
        return GROUPS.get(KINDS[self.features[0]], FRESH)

    @property
    def turns(self) -> int:
        return self.features[-1]


class PlaceMemory:
    """Finds the place that a prompt returns to, makes new ones, and reports lives to the model."""

    def __init__(self, model: ReturnModel) -> None:
        self._model = model
        self._places: OrderedDict[Name, Place] = OrderedDict()
        self._num_chains = 0
        self.num_returns = self.num_branches = 0

    def get(self, name: Name) -> Place | None:
        return self._places.get(name)

    def visit(self, outline: Outline, wishes: Iterable[Wish], now: float) -> Place | None:
        """Remembers a prompt and the places wished for in it -> the place that it returned to, if any."""
        asked = not outline.generated and not outline.again
        found, deepest = self._deepest(outline) if asked else (None, 0)
        resumed = self.get(outline.start_name) if outline.start else None
        chain = self._chain(found if asked else resumed, outline)
        pace, turns = 13, 0
        if found is not None:
            pace, turns = log2_bin(now - found.since, 12), min(found.turns + 1, 7)
            self.num_returns += 1
            self.num_branches += found.passed
            self.returned_to(found, now)
        if asked and resumed is not None and resumed is not found:
            self.returned_to(resumed, now)
        new = [(outline.name(w.position), w.position, w.kind) for w in wishes]
        if not outline.generated:
            wholes = filter(None, (outline.keys, _stem(outline)))
            new += [(keys.end_name, keys.num_tokens, CheckpointKind.PROMPT_END) for keys in wholes]
        new = [place for place in new if place[0] not in self._places]
        if new:
            known = outline.shared / outline.num_tokens
            shared = 5 if known > 0.9 else math.ceil(min(known, 0.75) * 4)
            ends = sorted({outline.floor(b.position) for b in outline.boundaries} | {outline.end}, reverse=True)
            from_end = {position: min(i, 14) for i, position in enumerate(ends)}
            roles = {outline.floor(b.position): ROLES.get(b.role, 0) for b in outline.boundaries}
            if outline.generated:
                roles[outline.end] = ROLES["assistant"]
            for name, position, kind in new:
                position_on_grid = outline.floor(position)
                role, after = roles.get(position_on_grid, 0), from_end.get(position_on_grid, 15)
                length = log2_bin(position / 512, 11)
                self.add(name, [KINDS.index(kind), role, after, shared, length, 0, pace, turns], now).chain = chain
        passed = [(at, place) for at, place in ((deepest, found), (outline.start, resumed)) if place is not None]
        self._lead_on(passed, outline, wishes, chain)
        return found

    def tip(self, place: Place) -> Place:
        """Where the chain that passed a place last ends now."""
        way = []
        while (onward := place.onward) is not None:
            way.append(place)
            place = onward
        for behind in way:  # it is shorter next time
            behind.onward = place
        return place

    @property
    def branching(self) -> float:
        """The share of returns that are to a place behind the tip of its chain."""
        return self.num_branches / (self.num_returns + 1)

    def _chain(self, before: Place | None, outline: Outline) -> int:
        """That of a prompt which goes on after `before`."""
        if before is not None and before.chain and (outline.generated or not before.passed):
            return before.chain
        self._num_chains += 1
        return self._num_chains

    def _lead_on(self, passed: list[tuple[int, Place]], outline: Outline, wishes: Iterable[Wish], chain: int) -> None:
        """Notes that a chain has passed places and ends at the last of those that are wished for.

        passed: with the last grid position up to each. One that lies behind that end, as when a client wants states
        only at an earlier mark, leads on as before: `onward` never leads back, or `tip` would not end.
        """
        for _, place in passed:
            place.branched |= place.chain not in (0, chain)
            place.chain = chain
            place.passed |= not outline.generated
        found = ((wish.position, self.get(outline.name(wish.position))) for wish in wishes)
        wished = [(position, place) for position, place in found if place is not None]
        if not wished:
            return
        end, last = wished[-1]
        for position, place in (*passed, *wished[:-1]):
            if position <= end and place is not last:
                place.onward = last
        for _, place in wished[:-1]:
            place.passed = True
        for _, place in wished:
            place.source = outline.start_name if outline.start else b""

    def returned_to(self, place: Place, now: float) -> None:
        """One life ends, the next begins."""
        if place.name in self._places:
            self._places.move_to_end(place.name)  # what is returned to is not forgotten
        self._model.end(place.group, place.life, now)
        place.uses += 1
        place.features[6] = log2_bin(now - place.since, 12)
        place.since = now
        place.life = self._model.begin(place.group, place.features, now)

    def add(self, name: Name, features: list[int], now: float) -> Place:
        place = self._places[name] = Place(name, features, now)
        place.life = self._model.begin(place.group, features, now)
        if len(self._places) > MOST_PLACES:
            self._places.popitem(last=False)
        return place

    def place_of(self, kept: Kept, now: float) -> Place:
        """The place of a state, made again if it was forgotten."""
        place = self.get(kept.name)
        if place is None:
            place = self.add_unseen(kept.kind, kept.name, kept.num_tokens, now)
        return place

    def add_unseen(self, kind: CheckpointKind, name: Name, num_tokens: int, now: float) -> Place:
        """A place that no prompt has shown: a forgotten one, or a message outside the tree."""
        features = [KINDS.index(kind), 0, 0, 0, log2_bin(num_tokens / 512, 11), 0, 13, 0]
        return self.add(name, features, now)

    def answered(self, place: Place, ending: Ending) -> None:
        """The prompt that ends at a place got an answer."""
        place.features[5] = 1 + log2_bin(ending.num_output_tokens, 13)
        self._model.change(place.group, place.life, place.features)

    # For a process that comes later

    def arrays(self, now: float) -> dict[str, Array]:
        """The latest places, and what the model has learned; times as ages."""
        places = list(self._places.values())[-MOST_SAVED:]
        names = np.frombuffer(b"".join(place.name for place in places), np.uint8)
        features = np.array([place.features for place in places], np.int16)
        return self._model.arrays(now) | {
            "places.names": names.reshape(len(places), NAME_BYTES),
            "places.features": features.reshape(len(places), len(SIZES)),
            "places.since": np.array([now - place.since for place in places]),
            "places.uses": np.array([place.uses for place in places], np.int64),
            "places.lives": np.array([place.life for place in places], np.int64),
            "places.passed": np.array([place.passed for place in places], np.int8),
            "places.branched": np.array([place.branched for place in places], np.int8),
        }

    def take(self, arrays: Mapping[str, Array], now: float) -> None:
        """The opposite. Raises ValueError, and changes nothing, for what cannot come from `arrays`."""
        places = list(_places_of(arrays, now))
        self._model.take(arrays, now)
        self._places.update((place.name, place) for place in places)

    def _deepest(self, outline: Outline) -> tuple[Place | None, int]:
        """The whole prompt if it is known, otherwise the last known place that leaves something to compute; and the
        last grid position up to it.
        """
        if (whole := self.get(outline.end_name)) is not None:
            return whole, outline.end
        names, stem = outline.keys.names, _stem(outline)
        last = len(names) - 1 - (outline.num_tokens % outline.page_tokens == 0)
        for num_pages in range(last, -1, -1):
            if stem is not None and num_pages == len(stem.pages) and (place := self.get(stem.end_name)) is not None:
                return place, num_pages * outline.page_tokens
            if num_pages and (place := self.get(names[num_pages])) is not None:
                return place, num_pages * outline.page_tokens
        return None, 0


def _stem(outline: Outline) -> Keys | None:
    """What comes before a prompt's mark, if that ends off the grid; on it a checkpoint is kept like any other."""
    return outline.keys.stem if outline.keys.stem is not None and outline.keys.stem.tail else None


def _places_of(arrays: Mapping[str, Array], now: float) -> Iterator[Place]:
    """Those that another process remembered. Raises ValueError."""
    n = min(arrays["places.since"].size, MOST_SAVED) if "places.since" in arrays else 0
    names = checked(arrays, "places.names", (n, NAME_BYTES), 0, 255).astype(np.uint8)
    features = checked(arrays, "places.features", (n, len(SIZES)), 0, np.array([*SIZES.values()]) - 1)
    since = now - checked(arrays, "places.since", (n,), -MOST_AGE_S, MOST_AGE_S)
    uses, lives = (checked(arrays, f"places.{each}", (n,), 0, MOST_COUNT) for each in ("uses", "lives"))
    passed, branched = (checked(arrays, f"places.{each}", (n,), 0, 1) for each in ("passed", "branched"))
    rows = features.astype(int), since, uses.astype(int), lives.astype(int), passed, branched
    for name, some, then, used, life, *flags in zip(names, *(each.tolist() for each in rows), strict=True):
        place = Place(name.tobytes(), some, then, used, life)
        place.passed, place.branched = map(bool, flags)
        yield place


def log2_bin(value: float, most: int) -> int:
    """0 to `most`; a clock that went back counts as one that stood still."""
    return min(int(math.log2(min(max(0.0, value), 2.0**most) + 1.0)), most)
