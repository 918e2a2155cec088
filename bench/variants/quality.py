"""What answers lose when one model of a pair reads what the other has cached: contenders side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models import loading
from hybrid_cache.models.tools.pairs import Measured, Pair
from hybrid_cache.models.tools.plans import group, is_group
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.profile import Plan
from hybrid_cache.transfer import Transfer, Way, projected, upper

BUDGETS = (1 / 24, 1 / 12, 1 / 8, 1 / 4.5, 1 / 2)  # FLOPs of the receiver, of computing everything
CHOREO = "embedded+embedded-choreo"
BOTH_WAYS = (
    ("embedded", CHOREO),
    ("embedded", "embedded-style"),
    ("embedded", "embedded-half"),
    ("recall", "recall-style"),
)
PAIRS = tuple(f"{a}:{b}" for one, other in BOTH_WAYS for a, b in ((one, other), (other, one)))
RANDOM_SETS = 3
CONTROLS = ("states of what is shared zeroed", "attention blind to what is shared")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contender in one direction of a pair."""

    name: str
    plan: Plan
    measured: Measured
    sender_pays: float = 0.0  # beyond its own prefill, as a part of it

    @property
    def is_group(self) -> bool:
        """DroidSpeak's way; taking everything is nobody's."""
        return is_group(self.plan.transfer) and self.plan.flops > 0

    @property
    def is_set(self) -> bool:
        """Any other way; one layer by itself is both."""
        return not self.is_group or Way.RECOMPUTE not in self.plan.transfer.ways

    def written_twice(self) -> "Outcome":
        """The same entries, projected by the sender in its own prefill: the receiver finds them."""
        plan = replace(self.plan, flops=0.0, input_bytes=0)
        return Outcome(f"double writing ({self.name})", plan, self.measured, self.plan.flops)


@dataclass(frozen=True, slots=True)
class Layers:
    """What taking one layer alone loses in one direction of a pair, all others being the receiver's own."""

    sender: str
    receiver: str
    kinds: list[str]  # of layers
    alone: list[Measured]


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured in one direction of a pair."""

    layers: Layers
    outcomes: list[Outcome]
    controls: list[Measured]  # everything recomputed, and CONTROLS

    def values(self) -> dict[str, object]:
        """For a file."""
        return {
            "sender": self.layers.sender,
            "receiver": self.layers.receiver,
            "contenders": [
                {"name": e.name, "transfer": str(e.plan.transfer), **asdict(e.measured), "flops": e.plan.flops}
                for e in self.outcomes
            ],
            "controls": {
                name: asdict(each) for name, each in zip(("recompute all", *CONTROLS), self.controls, strict=True)
            },
            "taken alone": [
                {"layer": kind, **asdict(each)} for kind, each in zip(self.layers.kinds, self.layers.alone, strict=True)
            ],
        }


def load_pair(name: str, ops: Ops, num: int, seed: int) -> Pair | None:
    """name: SENDER:RECEIVER. None with an activated adapter: it reads what comes before its invocation as its base."""
    sender, _, receiver = name.partition(":")
    one, other = (loading.load_named(each, ops=ops) for each in (sender, receiver))
    if one.model.invocation or other.model.invocation:
        return None
    return Pair(one.model, other.model, [*dialogues(loading.embedded_path(), num, seed, other.own_folder)])


def layers_of(name: str, pair: Pair, alone: list[Measured]) -> Layers:
    sender, _, receiver = name.partition(":")
    return Layers(sender, receiver, [layer.kind for layer in pair.receiver.layers], alone)


def contenders(pair: Pair, seed: int) -> Iterator[tuple[str, Transfer]]:
    """Everything taken, all projected sets of a small model, random ones of a large one, and all contiguous groups."""
    layers = pair.receiver.layers
    num, every = len(layers), range(len(layers))
    attention = [index for index in every if layers[index].kind.startswith("attention")]
    states = [index for index in every if index not in attention and layers[index].entries]
    yield "take all", upper(num, num)
    if pair.common:
        yield f"exact band: recompute {pair.common}-{num - 1}", upper(num, pair.common)
    yield "project all", projected(num, every)
    yield "project states", projected(num, states)
    yield "project attention", projected(num, attention)
    choose = Random(seed)
    for number in range(RANDOM_SETS):
        yield f"random set {number + 1}", projected(num, choose.sample(every, num // 2))
    for index in every:
        yield f"project {index}", projected(num, [index])
    for one in states:
        for other in states:
            if one < other:
                yield f"project {one} and {other}", projected(num, [one, other])
    for first in every:
        for last in range(first, num):
            if last - first + 1 < num:
                yield f"recompute {first}-{last}", group(num, first, last)
    for last in every[1:]:
        yield (
            f"recompute 0-{last - 1}, project the rest",
            Transfer((Way.RECOMPUTE,) * last + (Way.PROJECT,) * (num - last)),
        )


def outcomes(pair: Pair, seed: int) -> Iterator[list[Outcome]]:
    """Of all contenders; comes again and again, with the latest example added."""
    named = {transfer.for_layers(pair.receiver.layers): name for name, transfer in reversed([*contenders(pair, seed)])}
    transfers = [*named][::-1]
    for measured in pair.measure(transfers, range(len(pair.examples))):
        rows = zip(transfers, measured, strict=True)
        yield [Outcome(named[transfer], pair.plan(transfer, each), each) for transfer, each in rows]


def best(found: Sequence[Outcome], budget: float, *, groups: bool) -> Outcome | None:
    """The least loss for no more FLOPs, among contiguous groups or among other sets of layers."""
    some = [each for each in found if (each.is_group if groups else each.is_set)]
    some = [each for each in some if 0 < each.plan.flops <= budget * (1 + 1e-9)]
    return min(some, key=lambda each: each.measured.kl, default=None)
