"""Recency and FLOPs saved a byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.published import Floats, RankedPolicy, normalised
from hybrid_cache.cache.policies.rehearsal import Rehearsal
from hybrid_cache.cache.tree import Checkpoint, Kept
from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import CacheSpec, PrefillCost

ALPHAS = tuple(i / 10 for i in range(21))
WINDOW = 5  # times the requests before the first eviction are waited for
MOST_REQUESTS = 20_000  # remembered; a window that would take longer ends here


class Marconi(RankedPolicy):
    """recency + alpha * FLOPs saved a byte, each normalised over the states whose node has at most one child.

    Marconi (Pan et al., arXiv 2411.19379). Recency is 1 / ticks since the last use, and a use counts only for the state
    that is resumed from. Without a given alpha it is 0 until five times as many requests have come as there were before
    the first eviction; then all of them are run again with each alpha in 0.0, 0.1 ... 2.0, and the one that saves most
    FLOPs in the last 500 stays for good (so does the released code; the paper says hit rate). The caller waits
    meanwhile, where the original uses other processes.

    Where this differs: FLOPs and bytes of a state are those against the nearest state that is still there, not the
    radix parent, and exactly what goes with it is counted. States lie on the page grid. The end of a prompt gets a
    state as well as the end of its answer, since the cache may never see the answer. A state with one child that goes
    hands its last use down to the next state below, as the child takes over its edge in the original. A request works
    on a copy of the state it found.
    """

    def __init__(
        self,
        alpha: float | None = None,
        spec: CacheSpec | None = None,
        cost: PrefillCost | None = None,
        budget_bytes: int = 0,
    ) -> None:
        """Without `alpha`, the other arguments must be those of the cache. Raises ConfigError when they are missing."""
        super().__init__()
        self.name = "marconi" if alpha is None else "marconi-static"
        self.alpha = alpha or 0.0
        self._removed: Kept | None = None
        self._window: int | None = None
        self._rehearsal: Rehearsal | None = None
        if alpha is None:
            if spec is None or cost is None:
                raise ConfigError("the marconi policy needs an alpha, or the model's cache spec and cost to find one")
            self._rehearsal = Rehearsal(spec, cost, budget_bytes)

    def propose(self, outline: Outline) -> Iterable[Wish]:
        if self._rehearsal is not None and not outline.again:
            self._rehearsal.record(outline)
            if self._rehearsal.num_requests >= (self._window or MOST_REQUESTS):
                savings = [self._rehearsal.saved(self.with_alpha(alpha)) for alpha in ALPHAS]
                self.alpha, self._rehearsal = ALPHAS[savings.index(max(savings))], None
        return super().propose(outline)

    def remove(self, kept: Kept) -> None:
        super().remove(kept)
        self._removed = kept

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        super().lost(name, score, above)
        if math.isfinite(score) and isinstance(self._removed, Checkpoint) and self._removed.name == name:
            self._hand_down(self._removed)
        if self._rehearsal is not None and self._window is None and math.isfinite(score):
            self._window = min(WINDOW * self._rehearsal.num_requests, MOST_REQUESTS)

    def _hand_down(self, gone: Checkpoint) -> None:
        """The next state below takes over the last use of one that was evicted, unless there are several."""
        node = gone.node
        while len(node.children) == 1:
            node = next(iter(node.children.values()))
            if node.checkpoint is not None:
                node.checkpoint.base = max(node.checkpoint.base, gone.base)
                if node.checkpoint in self._rows:
                    self.add(node.checkpoint)
                return

    def with_alpha(self, alpha: float) -> "Marconi":
        """A fresh policy of the same kind that is not tuned."""
        return Marconi(alpha)

    def is_candidate(self, kept: Kept) -> bool:
        return len(kept.node.children) <= 1

    def value(self, kept: Kept) -> float:
        worth = self._worth_of(kept)
        return worth.flops / worth.num_bytes

    def scores(self, age: Floats, value: Floats) -> Floats:
        return normalised(1 / age) + self.alpha * normalised(value)


@dataclass(frozen=True, slots=True)
class KindCosts:
    """Prefill cost of a model's layers by kind, each the sum over all layers of that kind."""

    attention: PrefillCost
    recurrent: PrefillCost
    mlp: PrefillCost
    num_attention: int
    num_mlp: int

    @property
    def total(self) -> PrefillCost:
        kinds = self.attention, self.recurrent, self.mlp
        return PrefillCost(sum(k.per_token for k in kinds), sum(k.per_token_per_position for k in kinds))


class MarconiArtifact(Marconi):
    """Marconi with the scoring errors of its released simulator (ruipeterpan/marconi), to see what they change.

    Reproduced: from the FLOPs of the MLP layers for the whole prefix, those of as many attention layers for the
    parent's prefix are taken away; and the bytes are one state and the KV of the whole prefix, whatever would be freed.

    Not reproduced: the bytes freed by a leaf follow from the length of another node (the budget would not be kept), a
    merged node's grandchildren keep their old parent (scores do not depend on it), and a state may go while its request
    is served (a server could not work). FLOPs and bytes are those of the model that runs; the simulator's states leave
    out the expansion factor.
    """

    def __init__(self, spec: CacheSpec, costs: KindCosts, alpha: float | None = None, budget_bytes: int = 0) -> None:
        super().__init__(alpha, spec, costs.total, budget_bytes)
        self.name = "marconi-artifact"
        self._spec = spec
        self._costs = costs
        self._mlps_per_attention = costs.num_mlp / costs.num_attention if costs.num_attention else 0.0

    def with_alpha(self, alpha: float) -> Marconi:
        return MarconiArtifact(self._spec, self._costs, alpha)

    def value(self, kept: Kept) -> float:
        parent, end, costs = kept.resume_without(), kept.num_tokens, self._costs
        mixers = costs.recurrent.flops(parent, end) + costs.attention.flops(parent, end)
        mlps = costs.mlp.flops(0, end) - self._mlps_per_attention * costs.attention.flops(0, parent)
        return (mixers + mlps) / (self._spec.slot_bytes + self._spec.kv_bytes_per_token * end)
