"""A checking mode: what every published page and state held, remembered and compared.

The cache tells when an item is published, moved, used and given back. A write to it in between is found at its next
use, or by one of the random comparisons before that.
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from hybrid_cache.arena import Kind
from hybrid_cache.errors import PublishedBytesChanged

Item = tuple[Kind, int]  # a page or a slot, by its number

VERIFY_VARIABLE = "HYBRID_CACHE_VERIFY"


def verify_by_default() -> bool:
    """Whether the environment asks for the checking mode: HYBRID_CACHE_VERIFY is set, and not to 0."""
    return os.environ.get(VERIFY_VARIABLE, "0") not in ("", "0")


class Witness(Protocol):
    """Whom the cache tells what becomes of its published items."""

    def published(self, items: Iterable[Item], what: str) -> None:
        """All bytes of these items have been written, and never change from now on. `what` is for error messages."""
        ...

    def moved(self, kind: Kind, moves: Sequence[tuple[int, int]]) -> None: ...

    def gone(self, items: Iterable[Item]) -> None:
        """They belong to nobody, or to one request."""
        ...

    def used(self, items: Iterable[Item]) -> None:
        """Somebody is about to read them. Raises PublishedBytesChanged."""
        ...

    def look_around(self) -> None:
        """Time to compare a few items that nobody has asked for. Raises PublishedBytesChanged."""
        ...

    def check(self, items: set[Item]) -> None:
        """Proves that exactly these items are published, and compares all. Raises PublishedBytesChanged."""
        ...


class NoWitness:
    """Looks at nothing."""

    def published(self, items: Iterable[Item], what: str) -> None: ...
    def moved(self, kind: Kind, moves: Sequence[tuple[int, int]]) -> None: ...
    def gone(self, items: Iterable[Item]) -> None: ...
    def used(self, items: Iterable[Item]) -> None: ...
    def look_around(self) -> None: ...
    def check(self, items: set[Item]) -> None: ...


class Digests:
    """The witness that remembers a digest of each item."""

    def __init__(self, digest: Callable[[Kind, int], bytes], num_at_random: int = 1) -> None:
        """digest: of all bytes of an item, as they are now   num_at_random: items that `look_around` compares"""
        self._digest = digest
        self._num_at_random = num_at_random
        self._known: dict[Item, tuple[bytes, str]] = {}
        self._order: list[Item] = []  # the same items, to choose from at random
        self._place: dict[Item, int] = {}  # in `_order`
        self._random = random.Random(0)
        self.num_compared = 0

    def published(self, items: Iterable[Item], what: str) -> None:
        for item in items:
            self._enter(item, (self._digest(*item), what))

    def moved(self, kind: Kind, moves: Sequence[tuple[int, int]]) -> None:
        for source, target in moves:
            self._enter((kind, target), self._remove((kind, source)))
            self._compare((kind, target))

    def gone(self, items: Iterable[Item]) -> None:
        for item in items:
            self._compare(item)
            self._remove(item)

    def used(self, items: Iterable[Item]) -> None:
        for item in items:
            self._compare(item)

    def look_around(self) -> None:
        for _ in range(self._num_at_random if self._order else 0):
            self._compare(self._random.choice(self._order))

    def check(self, items: set[Item]) -> None:
        assert items == self._known.keys()
        self.used(items)

    def _enter(self, item: Item, known: tuple[bytes, str]) -> None:
        assert item not in self._known
        self._known[item] = known
        self._place[item] = len(self._order)
        self._order.append(item)

    def _remove(self, item: Item) -> tuple[bytes, str]:
        place, last = self._place.pop(item), self._order.pop()
        if last != item:
            self._order[place], self._place[last] = last, place
        return self._known.pop(item)

    def _compare(self, item: Item) -> None:
        digest, what = self._known[item]
        self.num_compared += 1
        if self._digest(*item) != digest:
            kind, number = item
            raise PublishedBytesChanged(f"{kind.value} {number} was written to after it was published: {what}")
