"""In which order running prompts are computed, and what fits between the layers of a pass."""

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_cache.engine.sequence import Phase, Sequence
from hybrid_cache.engine.shares import Shares

MOST_PASSED_OVER = 8  # steps in which a prompt may see others computed that came later, or are shorter


@dataclass(slots=True)
class Gap:
    """Between two layers of a pass: what prompts that came since may take.

    flops      left for them, at first as many as the pass itself has, so that it takes twice its time at most
    tiles      left for them, at first as many as any step may have: a tile deep in a prompt has the FLOPs of many
    under_way  the sequences of the pass: nothing is taken from them
    """

    flops: float
    tiles: int
    under_way: frozenset[Sequence]

    def may_enter(self, sequence: Sequence, shares: Shares) -> bool:
        """Not if more was computed for its tenant than for all tenants whom the pass serves.

        Nor an arranged prompt: what it asks of the store is for a whole step.
        """
        most = max(shares.served(s.request.tenant) for s in self.under_way)
        return sequence.prefill.arrangement is None and shares.served(sequence.request.tenant) <= most

    def take(self, flops: float, tiles: int) -> None:
        """A prompt has entered."""
        self.flops -= flops
        self.tiles -= tiles


def prompts_in_turn(running: Iterable[Sequence], shares: Shares, *, aged_first: bool) -> list[Sequence]:
    """Running prompts: those of the tenant whose turn it is, the shortest of them first.

    aged_first: of one tenant's, those that were passed over too often come before, in the order of their arrival. Not
    in two steps in a row: where many are long, a short one would wait for all of them
    """
    prompts = [s for s in running if s.phase is Phase.PREFILL]
    if len(prompts) < 2:
        return prompts

    def turn(sequence: Sequence) -> tuple[tuple[float, int], bool, int]:
        prefill = sequence.prefill
        aged = aged_first and prefill.passed_over >= MOST_PASSED_OVER
        return shares.turn(sequence.request.tenant), not aged, sequence.arrival if aged else prefill.tiles_left

    return sorted(prompts, key=turn)
