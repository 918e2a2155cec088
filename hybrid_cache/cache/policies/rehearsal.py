"""Finds the best of several policies by running the requests seen so far through each of them."""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.keys import NAME_BYTES, Keys, named_keys, pieces
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Outline, Policy, Wish
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.tokens import Boundary

CHUNK_TOKENS = 16 * TILE  # of a prompt computed at a time, as the server does when nobody decodes
MEASURED = 500  # latest requests whose savings are compared


@dataclass(frozen=True, slots=True)
class Recorded:
    """An outline without its tokens: pages by name. Tokens after the last page name no place."""

    namespace: str
    names: bytes  # NAME_BYTES for each page
    num_tokens: int
    page_tokens: int
    boundaries: tuple[Boundary, ...]
    only_marked: bool
    generated: bool

    @classmethod
    def of(cls, outline: Outline) -> "Recorded":
        return cls(
            outline.keys.namespace,
            b"".join(outline.keys.names[1:]),
            outline.num_tokens,
            outline.page_tokens,
            outline.boundaries,
            outline.only_marked,
            outline.generated,
        )

    def keys(self) -> Keys:
        return named_keys(self.namespace, pieces(self.names, NAME_BYTES), b"", self.num_tokens)


class Rehearsal:
    """Requests since the start of a cache, to be run again through empty caches of the same size, books only."""

    def __init__(self, spec: CacheSpec, cost: PrefillCost, budget_bytes: int) -> None:
        self._spec = spec
        self._cost = cost
        self._budget_bytes = budget_bytes
        self._recorded: list[Recorded] = []
        self.num_requests = 0  # recorded, canonical passes not counted

    def record(self, outline: Outline) -> None:
        self._recorded.append(Recorded.of(outline))
        self.num_requests += not outline.generated

    def saved(self, policy: Policy) -> float:
        """FLOPs that a fresh policy saves in the last `MEASURED` requests, or in all if there are fewer."""
        ticks = itertools.count()
        cache = Books(
            self._spec,
            self._cost,
            self._budget_bytes,
            policy,
            page_tokens=self._recorded[0].page_tokens,
            clock=lambda: float(next(ticks)),
        )
        hits = [(serve(cache, recorded), recorded.generated) for recorded in self._recorded]
        asked = [hit for hit, generated in hits if not generated]
        return sum(self._cost.flops(0, hit) for hit in asked[-MEASURED:])


def serve(cache: Books, recorded: Recorded) -> int:
    """One request, from match to release -> the tokens that it could skip."""
    keys = recorded.keys()
    lease = cache.acquire(cache.match(recorded.namespace, keys), keys)
    if lease is None:
        return 0
    only_marked, generated = recorded.only_marked, recorded.generated
    wishes = cache.propose(lease, recorded.boundaries, only_marked=only_marked, generated=generated)
    publish(cache, lease, wishes, recorded.page_tokens, recorded.page_tokens if generated else CHUNK_TOKENS)
    cache.release(lease)
    return lease.length


def publish(cache: Books, lease: Lease, wishes: Iterable[Wish], page_tokens: int, chunk_tokens: int) -> None:
    """Computes a prompt, as far as the books go: chunk by chunk, so that a state competes as soon as it is there."""
    waiting, total, end = deque(wishes), lease.keys.num_tokens, lease.length
    while end < total:
        end = min(end + chunk_tokens, total)
        while waiting and waiting[0].position <= end:
            wish = waiting.popleft()
            cache.reserve_checkpoint(lease, wish.position, wish.kind, ttl_s=wish.ttl_s)
        cache.publish(lease, end // page_tokens * page_tokens)
