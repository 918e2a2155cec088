"""States that a running request could leave behind: what they would be worth, and whether they get room."""

import math

from hybrid_cache.cache.fates import End
from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Worth
from hybrid_cache.cache.pool import Pool, nearest_checkpoint
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.spec import PrefillCost


class Candidates:
    """Checkpoints and prompt ends before there are any."""

    def __init__(self, pool: Pool, cost: PrefillCost, *, stateless: bool) -> None:
        """stateless: a model of attention layers only, which may resume from any page"""
        self._pool = pool
        self._cost = cost
        self._page_tokens = pool.tree.page_tokens
        self._stateless = stateless

    def take(
        self, lease: Lease, position: int, kind: CheckpointKind, num_pages: int = 0
    ) -> tuple[int, list[int]] | None:
        """A slot and pages for the state of a lease at `position`; None if something better would have to go, or
        something that is spared.
        """
        score = self._score(lease, position, kind)
        keeps, taken = self._pool.claims.keeps, None
        if score is not None:
            taken = self._pool.take(num_slots=1, num_pages=num_pages, ceiling=score, spare=keeps)
        if taken is None:
            self._decline(lease, position, kind, score)
            return None
        return taken[0][0], taken[1]

    def _decline(self, lease: Lease, position: int, kind: CheckpointKind, score: float | None) -> None:
        """The policy sees the candidate come and go; otherwise the scores of what is kept would never age."""
        self._pool.declines[kind.value] += 1
        last = min(position // self._page_tokens, len(lease.nodes)) - 1
        above = nearest_checkpoint(lease.nodes[last]) if last >= 0 else None
        name = self._name(lease, position, kind)
        self._pool.policy.lost(name, -math.inf if score is None else score, above)
        self._pool.fates.lost(name, kind, score, End.DECLINED)

    def _name(self, lease: Lease, position: int, kind: CheckpointKind) -> Name:
        """Names the prefix of a lease's prompt that a state at `position` would stand for."""
        if kind is CheckpointKind.PROMPT_END:
            return lease.keys.ending_at(position).end_name
        return lease.keys.names[position // self._page_tokens]

    def _score(self, lease: Lease, position: int, kind: CheckpointKind) -> float | None:
        """The score that a state of a lease at `position` would have."""
        above = max((r.position for r in lease.reserved if r.position < position), default=0)
        nodes = (n for n in reversed(lease.nodes) if n.checkpoint and n.num_tokens < position)
        if (node := next(nodes, None)) is not None:
            above = max(above, node.num_tokens)
        if self._stateless:
            above = (position - 1) // self._page_tokens * self._page_tokens
        num_pages = -(-(position - max(above, min(lease.shared, position))) // self._page_tokens)
        flops, share = self._cost.flops(above, position), self._pool.share(above, position)
        worth = Worth(flops, self._pool.bytes_of(1, num_pages), share)
        return self._pool.policy.candidate(kind, self._name(lease, position, kind), worth)
