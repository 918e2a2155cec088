"""Which parts of a prompt are reused, moved, composed or computed, and what that costs: decided before anything runs.

Of the ways that a fidelity allows, the one with the fewest FLOPs is taken:

    from the longest prefix    that the cache has a state for, and stored messages after it
    from stored messages only  when that prefix ends inside a message that is stored as a whole
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from hybrid_cache.choreography.arrangement import Arrangement, Fidelity, Positions
from hybrid_cache.spec import PrefillCost


class Action(StrEnum):
    """What becomes of a part."""

    REUSED = "reused"  # inside the prefix that the cache has a state for
    RELOCATED = "relocated"  # keys and values are copied to their new position
    COMPOSED = "composed"  # and what it does to the states is composed with what came before
    COMPUTED = "computed"


MOVED = (Action.RELOCATED, Action.COMPOSED)


@dataclass(frozen=True, slots=True)
class Item:
    """One part of a plan: tokens [start, end) of the prompt."""

    id: str
    action: Action
    start: int
    end: int
    computed: int  # tokens: the seam of a part that is moved; of another, what the prefix does not hold
    flops: float
    why: str

    @property
    def taken(self) -> int:
        """Tokens that are not computed."""
        return self.end - self.start - self.computed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will do. `fidelity` is what its answer will really be; `asked` what was asked for."""

    asked: Fidelity
    fidelity: Fidelity
    why: str  # where the two differ, or an order was chosen
    prefix: int  # tokens of a state in the cache
    items: tuple[Item, ...]
    flops: float
    flops_of_encoding: float  # of computing everything

    @property
    def num_tokens(self) -> int:
        return self.items[-1].end if self.items else 0

    @property
    def computed(self) -> int:
        return sum(item.computed for item in self.items)

    def tokens(self, action: Action) -> int:
        """Tokens with this action. Where the prefix holds the start of a part, that start counts as reused."""
        moved = {a: sum(item.taken for item in self.items if item.action is a) for a in MOVED}
        if action is Action.COMPUTED:
            return self.computed
        return moved[action] if action in moved else self.num_tokens - self.computed - sum(moved.values())

    def __str__(self) -> str:
        saved = 1.0 - self.flops / self.flops_of_encoding if self.flops_of_encoding else 0.0
        head = f"{self.fidelity}: {self.computed} of {self.num_tokens} tokens computed, {saved:.0%} of the FLOPs saved"
        lines = [f"{head} ({self.why})" if self.why else head]
        for item in self.items:
            name = item.id or "new"
            lines.append(f"  {name:28} {item.action:9} {item.end - item.start:6} tokens  {item.flops:9.2e}  {item.why}")
        return "\n".join(lines)


def exact_plan(
    asked: Fidelity, ids: Sequence[str], lengths: Sequence[int], prefix: int, cost: PrefillCost, why: str = ""
) -> Plan:
    """Everything after the prefix is computed."""
    items = []
    for name, start, end in _places(ids, lengths):
        first = min(max(start, prefix), end)
        action = Action.REUSED if first == end else Action.COMPUTED
        reason = "in the cache as this prefix" if action is Action.REUSED else "not in the cache behind this prefix"
        items.append(Item(name, action, start, end, end - first, cost.flops(first, end), reason))
    num_tokens = sum(lengths)
    flops = cost.flops(prefix, num_tokens)
    return Plan(asked, Fidelity.EXACT, why, prefix, tuple(items), flops, cost.flops(0, num_tokens))


def make_plan(
    arrangement: Arrangement, prefix: int, is_stored: Callable[[str], bool], cost: PrefillCost, *, states: bool
) -> Plan:
    """The cheapest plan. `is_stored` takes an id; `states`: the model has recurrent states.

    prefix: tokens of the longest prefix of the prompt that the cache has a state for
    """
    plans = [plan_after(arrangement, start, is_stored, cost, states=states) for start in sorted({0, prefix})]
    return min(plans, key=lambda plan: plan.flops)


def plan_after(
    arrangement: Arrangement, prefix: int, is_stored: Callable[[str], bool], cost: PrefillCost, *, states: bool
) -> Plan:
    """What `make_plan` finds for one prefix: only what follows it is moved."""
    moved = Action.COMPOSED if states else Action.RELOCATED
    if prefix and arrangement.positions is Positions.LEFTMOST:
        prefix = 0  # in the cache a message stands after the one before it
    items = []
    ids, lengths = [p.id for p in arrangement.parts], [p.num_tokens for p in arrangement.parts]
    num_tokens = sum(lengths)
    for name, start, end in _places(ids, lengths):
        seam = min(arrangement.seam, end - start)
        if end <= prefix:
            items.append(Item(name, Action.REUSED, start, end, 0, 0.0, "in the cache as this prefix"))
        elif start >= prefix and name and start + seam < end < num_tokens and is_stored(name):
            why = "stored" if not seam else f"stored; the first {seam} tokens again"
            items.append(Item(name, moved, start, end, seam, cost.flops(start, start + seam), why))
        else:
            first = max(start, prefix)
            why = "new" if not name else "not stored" if end - start > seam else "not longer than the seam"
            why = "the answer begins after it" if name and end == num_tokens else why
            items.append(Item(name, Action.COMPUTED, start, end, end - first, cost.flops(first, end), why))
    flops = sum(item.flops for item in items)
    is_exact = all(item.action in (Action.REUSED, Action.COMPUTED) for item in items)
    is_exact = is_exact and arrangement.positions is Positions.CONSECUTIVE
    fidelity = arrangement.fidelity
    why = "nothing is stored yet: all parts are computed in their order" if is_exact else ""
    return Plan(fidelity, fidelity, why, prefix, tuple(items), flops, cost.flops(0, num_tokens))


def _places(ids: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int, int]]:
    ends = list(accumulate(lengths))
    return [(name, end - length, end) for name, length, end in zip(ids, lengths, ends, strict=True)]
