"""Least recently used, as SGLang does it."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import refresh
from hybrid_cache.cache.policies.published import PublishedPolicy
from hybrid_cache.cache.tree import Kept, Node

PER_TOKEN = 2.0**-24  # so that the depth of a state weighs less than one use


class SGLangRadix(PublishedPolicy):
    """Least recently used, where a use counts for every state along the request's path; the deepest is evicted first.

    So in effect it works on the leaves of the tree. This is the baseline "SGLang+" of the Marconi paper (arXiv
    2411.19379, section 5): states where requests diverge and at ends, eviction from the leaves. SGLang's own tree for
    hybrid models (sgl-project/sglang PR 11214, from October 2025 to July 2026) differs in two ways: states and KV pages
    have a pool each, and among states of one path the one nearest to the root goes first. Here both share one budget,
    states at ends lie on the page grid, and a branch counts as seen when its pages are still there.
    """

    name = "sglang-radix"

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    @property
    def clock(self) -> float:
        return float(self._uses)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._uses += 1
        refresh(path, self.clock)

    def _score(self, kept: Kept) -> float:
        return kept.base - kept.num_tokens * PER_TOKEN


class SGLangUnified(SGLangRadix):
    """Least recently used, where a use counts for the one state that is resumed from.

    SGLang since July 2026 (sgl-project/sglang PRs 31643 and 31648). Any state may go, not only leaves; what lies above
    a state in use grows old. One budget for states and pages, as in `SGLangRadix`.
    """

    name = "sglang-unified"

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._uses += 1
        kept.base = self.clock
