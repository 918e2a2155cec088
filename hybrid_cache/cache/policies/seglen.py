"""Replay length and recency."""

from hybrid_cache.cache.policies.published import Floats, RankedPolicy, normalised
from hybrid_cache.cache.tree import Kept

LENGTH_WEIGHT = 0.85


class SegLen(RankedPolicy):
    """0.85 * tokens to replay without the state + 0.15 * recency, each normalised over all states.

    SegLen (sgl-project/sglang PR 22172, `--seglen-eff-weight 0.85`; abdelfattah-lab.github.io/blogs/seglen): Marconi's
    score without the model's FLOPs and bytes. The tokens are those from the nearest state above that is still there,
    any state may go, and only the one that is resumed from counts as used. The descriptions do not say how recency is
    measured; here it is the time of the last use, so that 0.15 is a share of the whole time span. One budget for states
    and pages instead of a pool each, and states on the page grid.
    """

    name = "seglen"

    def value(self, kept: Kept) -> float:
        return float(kept.num_tokens - kept.resume_without())

    def scores(self, age: Floats, value: Floats) -> Floats:
        return LENGTH_WEIGHT * normalised(value) + (1 - LENGTH_WEIGHT) * normalised(-age)
