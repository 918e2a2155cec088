"""Least recently used, as SGLang does it."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import Outline, Wish, refresh
from hybrid_cache.cache.policies.published import PublishedPolicy
from hybrid_cache.cache.tree import CheckpointKind, Kept, Node

CHUNK_TOKENS = 8192  # of a prompt that SGLang computes at a time

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


class PathLRU(SGLangRadix):
    """Least recently used with two states a prompt, where a use counts for every state along the path; the one nearest
    to the root goes first.

    SGLang's own tree for hybrid models until July 2026 (sgl-project/sglang PR 11214). It differs from `SGLangRadix`
    only in the order within a path: leaves outlive what is above them. One budget for states and pages.
    """

    name = "path-lru"

    def _score(self, kept: Kept) -> float:
        return kept.base + kept.num_tokens * PER_TOKEN


class ConsumedLRU(SGLangRadix):
    """Least recently used, where a use counts for the one state that is resumed from; any state may go."""

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        self._uses += 1
        kept.base = self.clock


class SGLangUnified(ConsumedLRU):
    """Least recently used, where a use counts for the one state that is resumed from; also states at chunks.

    SGLang's unified radix cache since July 2026 (sgl-project/sglang PRs 31643 and 31648). Any state may go, not only
    leaves; what lies above a state in use grows old. A state is left wherever the server's prefill stops: after every
    8,192 tokens that are computed, at the branch, and at the end; all get in. Not here: the optional cap on states of
    one path (PR 31230), states kept during decoding (the end of an answer stands for them), and lists of their own for
    states and pages: there is one budget, as in `SGLangRadix`.
    """

    name = "sglang-unified"

    def propose(self, outline: Outline) -> Iterable[Wish]:
        wishes = {wish.position: wish for wish in super().propose(outline)}
        if not outline.only_marked:
            for position in range(outline.start + CHUNK_TOKENS, outline.end, CHUNK_TOKENS):
                chunk = outline.floor(position)
                wishes.setdefault(chunk, Wish(chunk, CheckpointKind.INTERIOR))
        return [wishes[position] for position in sorted(wishes)]
