"""GreedyDual-Size-Frequency."""

import math
from collections.abc import Iterable

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.published import PublishedPolicy
from hybrid_cache.cache.tree import Kept, Node


class GDSF(PublishedPolicy):
    """GreedyDual-Size-Frequency (Cherkasova 1998): score = L + uses * cost / size, with L the score of the last victim.

    The cost is the FLOPs that a state spares from the nearest other state that is there, the size its bytes and those
    of the pages that only it needs. In the paper a file's cost and size never change; here they do as neighbours come
    and go, and the score follows. Uses are counted while a state is kept, its arrival included. States where two
    requests diverge and at ends, as in Marconi.
    """

    name = "gdsf"

    def __init__(self) -> None:
        super().__init__()
        self._inflation = 0.0
        self._uses: dict[Name, int] = {}

    @property
    def clock(self) -> float:
        return self._inflation

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._uses[kept.name] = self._uses.get(kept.name, 0) + 1
        super().used(kept, path)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        if score == math.inf:  # a candidate found no room; there may be such a state all the same
            return
        self._uses.pop(name, None)
        self._inflation = max(self._inflation, score)

    def _score(self, kept: Kept) -> float:
        worth = self._worth_of(kept)
        return kept.base + self._uses[kept.name] * worth.flops / worth.num_bytes
