"""Value per byte without learning: GreedyDual-Size on replay FLOPs."""

from collections.abc import Iterable

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.base import Outline, ScoredPolicy, Wish, Worth
from hybrid_cache.cache.policies.published import places
from hybrid_cache.cache.tree import CheckpointKind, Kept

# Prior odds that a boundary of a kind is returned to, relative to a message end.
RATE = {
    CheckpointKind.EXPLICIT: 2.0,
    CheckpointKind.BRANCH: 1.5,
    CheckpointKind.MESSAGE_END: 1.0,
    CheckpointKind.TURN_END: 1.0,
    CheckpointKind.PROMPT_END: 0.5,
    CheckpointKind.INTERIOR: 0.25,
    CheckpointKind.LAYER_INPUTS: 1.0,
}


class FlopsPerByte(ScoredPolicy):
    """GreedyDual-Size (Cao and Irani 1997) with replay FLOPs as the cost: score = L + rate * FLOPs saved / bytes.

    L is the score of the last victim. It rises as things are evicted, so what is not used grows old without anybody
    counting hits; counts would pin anchors that were popular once.
    """

    name = "flops-per-byte"

    def __init__(self) -> None:
        super().__init__()
        self._inflation = 0.0

    @property
    def clock(self) -> float:
        return self._inflation

    def score(self, base: float, kind: CheckpointKind, worth: Worth) -> float:
        return base + RATE[kind] * worth.flops / worth.num_bytes

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        self._inflation = max(self._inflation, score)


class FlopsPerByteTwo(FlopsPerByte):
    """`FlopsPerByte` with two states a prompt: where it leaves an earlier one, and its end (Marconi's admission)."""

    name = "flops-per-byte-two"

    def propose(self, outline: Outline) -> Iterable[Wish]:
        return places(outline)
