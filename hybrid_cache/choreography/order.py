"""The order of unordered messages that finds the longest prefix in the cache, or in what is on its way there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, permutations

import numpy as np

from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.request import Prompt, TokenArray

Known = tuple[int, int]
"""Tokens of a prefix that will not be computed again, and those that the cache has rows of."""

MOST_TRIED = 5  # siblings of which all orders are tried; more are chosen one by one


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
        order = _extended(order, siblings, tokens, known) if group[0] and len(siblings) > 1 else order + siblings
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


def _extended(
    order: list[int], siblings: list[int], tokens: Sequence[TokenArray], known: Callable[[TokenArray], Known]
) -> list[int]:
    """`order` with the siblings behind it."""

    def found(candidate: Sequence[int]) -> Known:
        return known(np.concatenate([*(tokens[i] for i in candidate), np.zeros(1, np.int32)]))  # not a whole prompt

    if len(siblings) <= MOST_TRIED:
        return max(([*order, *some] for some in permutations(siblings)), key=found)
    left = list(siblings)
    while left:
        chosen = max(left, key=lambda i: found([*order, i]))
        left.remove(chosen)
        order = [*order, chosen]
    return order
