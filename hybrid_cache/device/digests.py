"""A checking mode: what every published page and state held, remembered and compared.

The cache reports when an item is published, moved, used and given back. A write to it in between is found at its next
use, or by one of the random comparisons before that.
"""

import random
from collections.abc import Callable, Iterable, Sequence

from hybrid_cache.cache.commands import Item
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.errors import PublishedBytesChanged


class Digests:
    """Remembers a digest of each published item. Methods raise PublishedBytesChanged."""

    def __init__(self, digest: Callable[[Kind, int], bytes], num_at_random: int = 1) -> None:
        """digest: computes that of all bytes of an item   num_at_random: items that `verify_some` compares"""
        self._digest = digest
        self._num_at_random = num_at_random
        self._known: dict[Item, tuple[bytes, str]] = {}
        self._order: list[Item] = []  # the same items, to choose from at random
        self._place: dict[Item, int] = {}  # in `_order`
        self._random = random.Random(0)
        self.num_compared = 0

    def seal(self, items: Iterable[Item], what: str) -> None:
        for item in items:
            self._enter(item, (self._digest(*item), what))

    def moved(self, kind: Kind, moves: Sequence[tuple[int, int]]) -> None:
        for source, target in moves:
            self._enter((kind, target), self._remove((kind, source)))
            self._compare((kind, target))

    def unseal(self, items: Iterable[Item]) -> None:
        for item in items:
            self._compare(item)
            self._remove(item)

    def verify(self, items: Iterable[Item]) -> None:
        for item in items:
            self._compare(item)

    def verify_some(self) -> None:
        for _ in range(self._num_at_random if self._order else 0):
            self._compare(self._random.choice(self._order))

    def check(self, items: set[Item]) -> None:
        """Proves that exactly these items are published, and compares all."""
        assert items == self._known.keys()
        self.verify(items)

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
