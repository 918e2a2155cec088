"""The order of unordered messages that finds the longest prefix in the cache, or in what will soon be there.

Pages are known from the first one on. So what is known of the first messages of an order is known of all orders that
begin with them, and where it ends before their last full page, no order that begins with them has more:

    known       |=====|=====|
    a, b        |  a       |   b         |      settled
    a, c        |  a       | c |                not settled: the third page may be known, of a, c, b or of a, c, d
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np

from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Prompt, TokenArray

Known = tuple[int, int]
"""Tokens of a prefix that will not be computed again, and those that the cache has rows of."""

ALL_TRIED = 5  # siblings of which all orders are compared; of more, as long as that helps
MOST_IN_VAIN = 64  # beginnings of orders in a row that are no better than the best one
MOST_ASKED = 1000  # calls of `known` for one group of siblings, where nearly all of them help


def best_order(
    prompt: Prompt, arrangement: Arrangement, known: Callable[[TokenArray], Known]
) -> tuple[Prompt, Arrangement]:
    """The prompt with its siblings in the order of which most is known; the given one where that is no worse."""
    parts = arrangement.parts
    ends = list(accumulate(part.num_tokens for part in parts))
    tokens = [prompt.tokens[end - part.num_tokens : end] for part, end in zip(parts, ends, strict=True)]
    last = max((i for i, part in enumerate(parts) if part.id), default=-1)
    order: list[int] = []
    for group, run in groupby(range(len(parts)), key=lambda i: (bool(parts[i].id) and i != last, parts[i].role)):
        siblings = list(run)
        if group[0] and len(siblings) > 1:
            siblings = _Search([tokens[i] for i in order], tokens, known).best(siblings)
        order += siblings
    if order == list(range(len(parts))):
        return prompt, arrangement
    moved = replace(arrangement, parts=tuple(parts[i] for i in order), reordered=True)
    boundaries, position = [], 0
    for i in order:
        start, end = ends[i] - parts[i].num_tokens, ends[i]
        inside = [b for b in prompt.boundaries if start < b.position <= end]
        boundaries += [replace(b, position=b.position - start + position) for b in inside]
        position += parts[i].num_tokens
    return Prompt(np.concatenate([tokens[i] for i in order]), tuple(boundaries)), moved


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The first siblings of some orders, after all that comes before siblings."""

    order: tuple[int, ...]
    num_tokens: int
    known: Known

    @property
    def settled(self) -> bool:
        """As much is known of all orders that begin so, see the module docstring."""
        return max(self.known) // TILE < self.num_tokens // TILE


class _Search:
    """Looks for the order of siblings of which most is known."""

    def __init__(
        self, before: Sequence[TokenArray], tokens: Sequence[TokenArray], known: Callable[[TokenArray], Known]
    ) -> None:
        """before: all that stands before the siblings; tokens of each of these"""
        self._before = before
        self._tokens = tokens
        self._known = known
        self._asked: dict[tuple[int, ...], Known] = {}

    def best(self, siblings: Sequence[int]) -> list[int]:
        """The first one of the best orders, as `permutations` has them, or a good order where siblings are many."""
        num_before = sum(map(len, self._before))
        start = _Beginning((), num_before, self._ask(()))
        num_pages = (num_before + sum(len(self._tokens[i]) for i in siblings)) // TILE
        most_in_vain = max(MOST_IN_VAIN, len(siblings)) if len(siblings) > ALL_TRIED else None
        best, in_vain = start, 0
        for beginning in self._beginnings(start, siblings):
            in_vain += 1
            if beginning.known > best.known:
                best, in_vain = beginning, 0
            if min(best.known) // TILE >= num_pages:
                break  # there is no more to know
            if in_vain == most_in_vain or len(self._asked) >= MOST_ASKED:
                best = self._one_by_one(best, siblings)
                break
        return [*best.order, *_left(siblings, best)]

    def _beginnings(self, start: _Beginning, siblings: Sequence[int]) -> Iterator[_Beginning]:
        """Those of which more may be known than of shorter ones, in the order of `permutations`."""
        stack = [] if start.settled else [(start, iter(siblings))]
        while stack:
            beginning, following = stack[-1]
            i = next(following, None)
            if i is None:
                stack.pop()
                continue
            longer = self._longer(beginning, i)
            yield longer
            if not longer.settled:
                stack.append((longer, iter(_left(siblings, longer))))

    def _one_by_one(self, beginning: _Beginning, siblings: Sequence[int]) -> _Beginning:
        """Goes on with the sibling of which most is known, and so on."""
        left = _left(siblings, beginning)
        while left and not beginning.settled and len(self._asked) + len(left) <= MOST_ASKED:
            beginning = max((self._longer(beginning, i) for i in left), key=lambda longer: longer.known)
            left.remove(beginning.order[-1])
        return beginning

    def _longer(self, beginning: _Beginning, i: int) -> _Beginning:
        order, num_tokens = (*beginning.order, i), beginning.num_tokens + len(self._tokens[i])
        same = num_tokens // TILE == beginning.num_tokens // TILE
        return _Beginning(order, num_tokens, beginning.known if same else self._ask(order))

    def _ask(self, order: tuple[int, ...]) -> Known:
        if order not in self._asked:
            tokens = [*self._before, *(self._tokens[i] for i in order), np.zeros(1, np.int32)]  # no whole prompt
            self._asked[order] = self._known(np.concatenate(tokens))
        return self._asked[order]


def _left(siblings: Sequence[int], beginning: _Beginning) -> list[int]:
    placed = set(beginning.order)
    return [i for i in siblings if i not in placed]
