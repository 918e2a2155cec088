"""In which order waiting sequences are looked at, and running prompts are computed."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
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


def waiting_in_turn(waiting: deque[Sequence], running: Iterable[Sequence], shares: Shares) -> Iterator[Sequence]:
    """Takes waiting sequences out of the queue: always the first of the tenant for whom least is computed and under
    way.
    """
    if not shares.compares:
        while waiting:
            yield waiting.popleft()
        return
    queues: dict[str, deque[Sequence]] = {}
    for sequence in waiting:
        queues.setdefault(sequence.request.tenant, deque()).append(sequence)
    under_way = Counter({tenant: shares.served(tenant) for tenant in queues})
    for sequence in running:
        under_way[sequence.request.tenant] += sequence.prefill.num_left
    while queues:
        tenant = min(queues, key=under_way.__getitem__)  # of equal ones, whose sequence stands first
        sequence = queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]
        waiting.remove(sequence)
        yield sequence
        if sequence.phase is not Phase.WAITING:
            under_way[tenant] += sequence.prefill.num_left


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
