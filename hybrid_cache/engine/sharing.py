"""Prefixes that running prompts will have in common with others: who waits for them, and what is counted on."""

from collections.abc import Container, Iterable
from itertools import islice

import numpy as np

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.policies.base import Wish
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence, grid_floor
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray

MOST_EARLIER = 16  # prompts that an order of messages is chosen by


def someone_computes_more(
    running: Iterable[Sequence], prefill: Prefill, match: Match, namespaces: Container[str] = ()
) -> bool:
    """True while a running prompt, or one of its twins, will publish a longer shared prefix in the prompt's namespace,
    or in others where it may be looked for; asks it for a checkpoint there.
    """
    if not prefill.reuse or match.end is not None or prefill.arrangement is not None:
        return False
    for owner in (s.prefill for s in running if s.phase is Phase.PREFILL):
        for other in (owner, *(twin.prefill for twin in owner.twins)):
            if not other.publish or not (other.namespace == prefill.namespace or other.namespace in namespaces):
                continue
            alike = _alike(other, prefill)
            if other is owner and alike == len(other.tokens) == len(prefill.tokens) and not other.only_marked:
                return True
            shared = will_share(other, prefill)
            stem = len(prefill.tokens) if prefill.mark is None else prefill.mark.position
            if alike >= stem and other.leaves_stem(stem):
                shared = max(stem, shared)
            if shared > max(other.computed, match.length):
                wish_for(owner, shared)
                return True
    return False


def will_share(other: Prefill, prefill: Prefill) -> int:
    """Up to where a running prompt may leave something, as far as another one begins with the same tokens."""
    return _kept(other, min(_alike(other, prefill), len(prefill.tokens) - 1))


def wish_for(prefill: Prefill, position: int) -> None:
    """Asks a running prompt for a checkpoint at or before a position."""
    if not prefill.only_marked:
        prefill.wish(Wish(grid_floor(position), CheckpointKind.BRANCH))


def _alike(a: Prefill, b: Prefill) -> int:
    """Tokens that two prompts begin with and that the same models compute."""
    marks = () if a.mark == b.mark else (p.mark.position for p in (a, b) if p.mark is not None)
    return min(common_prefix(a.tokens, b.tokens), *marks, len(a.tokens))


def _kept(prefill: Prefill, shared: int) -> int:
    """Up to where a running prompt may leave a state in its first `shared` tokens."""
    places = [b.position for b in prefill.boundaries if b.position <= shared] if prefill.only_marked else [shared]
    return grid_floor(max(places, default=0))


def soon_known(cache: Books, sequences: Iterable[Sequence], namespace: str, tokens: TokenArray) -> tuple[int, int]:
    """Tokens of a prefix that have a state, or will have one soon; tokens that have rows."""
    match = cache.match(namespace, tokens)
    most = match.length
    for prefill in (sequence.prefill for sequence in islice(sequences, MOST_EARLIER)):
        if prefill.publish and prefill.namespace == namespace:
            needed = grid_floor(max(most, prefill.computed)) + TILE
            read = prefill.tokens if prefill.mark is None else prefill.tokens[: prefill.mark.position]
            most = max(most, _kept(prefill, common_prefix(read, tokens, needed)))
    return most, match.shared


def common_prefix(a: TokenArray, b: TokenArray, needed: int = 1) -> int:
    """Number of leading tokens that a and b share; 0 if these are fewer than `needed`."""
    n = min(len(a), len(b))
    if n < needed or a[needed - 1] != b[needed - 1]:
        return 0
    differs = np.flatnonzero(a[:n] != b[:n])
    shared = int(differs[0]) if len(differs) else n
    return shared if shared >= needed else 0
