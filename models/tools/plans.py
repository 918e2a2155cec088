"""Which transfers from a sender to a receiver are worth having: searched from what taking each layer alone costs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from hybrid_cache.models.tools.pairs import Measured, Pair
from hybrid_cache.profile import Plan, frontier
from hybrid_cache.spec import LayerSpec
from hybrid_cache.transfer import Transfer, Way, projected

FEW_LAYERS = 8  # up to so many, all contiguous groups are tried, and what differs from a good plan in one layer
SEARCHED = 120  # examples that candidates are compared on; the best of them are measured on all others
RANDOM_SETS = 3
WORTH = 2 / 3  # of the FLOPs of computing everything: what takes more is not measured further

Progress = Callable[[str, int, int], None]  # what is measured, examples done, of how many


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has measured."""

    alone: tuple[Measured, ...]  # by layer: it is taken, all others are the receiver's own; where the search was
    controls: tuple[Measured, ...]  # the receiver by itself, without states, and blind; on all other examples
    measured: dict[Transfer, Measured]  # on these, too
    plans: tuple[Plan, ...]  # on the frontier of loss and FLOPs
    random: tuple[Transfer, ...]  # were drawn, for comparison
    num_searched: int


def group(num_layers: int, first: int, last: int) -> Transfer:
    """Contiguous layers are recomputed, and the others taken: DroidSpeak's way."""
    ways = (Way.RECOMPUTE if first <= index <= last else Way.TAKE for index in range(num_layers))
    return Transfer(tuple(ways))


def candidates(layers: Sequence[LayerSpec], losses: Sequence[float]) -> list[Transfer]:
    """Transfers worth a try, from what taking each layer alone loses; everything taken comes first."""
    num = len(layers)
    writing = [index for index, layer in enumerate(layers) if layer.entries]
    worst = sorted(writing, key=lambda i: -losses[i] / max(layers[i].write_cost.per_token, 1.0))
    found = by_kind(layers)
    found += [projected(num, worst[:count]) for count in range(1, len(worst) + 1)]
    found += [group(num, first, last) for first, last in groups(num, losses)]
    for last in range(1, num) if num <= FEW_LAYERS else {int(num * share) for share in (0.25, 0.5, 0.75)}:
        found.append(Transfer((Way.RECOMPUTE,) * last + (Way.PROJECT,) * (num - last)))  # computed below
    return list(dict.fromkeys(each.for_layers(layers) for each in found))


def by_kind(layers: Sequence[LayerSpec]) -> list[Transfer]:
    """Everything taken; everything, state-space layers, and attention layers projected. These are always measured."""
    num = len(layers)
    attention = {index for index, layer in enumerate(layers) if layer.kind.startswith("attention")}
    sets = ((), range(num), {*range(num)} - attention, attention)
    return [projected(num, some).for_layers(layers) for some in sets]


def neighbours(transfer: Transfer) -> Iterator[Transfer]:
    """Those that take one layer more, or project one more."""
    ways, other = transfer.ways, {Way.TAKE: Way.PROJECT, Way.PROJECT: Way.TAKE}
    for index, way in enumerate(ways):
        if way in other:
            yield Transfer((*ways[:index], other[way], *ways[index + 1 :]))


def random_sets(layers: Sequence[LayerSpec], seed: int = 1) -> tuple[Transfer, ...]:
    """Half of the layers are projected."""
    num, choose = len(layers), Random(seed)
    return tuple(projected(num, choose.sample(range(num), num // 2)).for_layers(layers) for _ in range(RANDOM_SETS))


def groups(num_layers: int, losses: Sequence[float]) -> list[tuple[int, int]]:
    """First and last layers of contiguous groups: all of them, or for each length the one that loses most if taken."""
    if num_layers <= FEW_LAYERS:
        return [(a, b) for a in range(num_layers) for b in range(a, num_layers) if b - a + 1 < num_layers]
    found = []
    for length in range(1, num_layers):
        sums = [sum(losses[a : a + length]) for a in range(num_layers - length + 1)]
        first = max(range(len(sums)), key=sums.__getitem__)
        found += [(first, first + length - 1), (0, length - 1)]
    return list(dict.fromkeys(found))


def num_for(num_measured: int) -> int:
    """How many examples a search needs for measuring on so many: those that it chooses on are others."""
    return num_measured + min(SEARCHED, -(-num_measured // 4))


def search(pair: Pair, progress: Progress = lambda what, done, total: None) -> Found:
    """Measures layers alone, then candidates, on a fifth of the examples; and the best of these on all others."""
    num, layers = len(pair.examples), pair.receiver.layers
    few = range(min(SEARCHED, -(-num // 5)))
    others = range(len(few), num) or few
    alone = latest(pair.measure_layers(few), "layers alone", few, progress)
    tried = dict[Transfer, Measured]()
    _try(pair, ("candidates", candidates(layers, [each.kl for each in alone])), tried, few, progress)
    if len(layers) <= FEW_LAYERS:
        near = (other.for_layers(layers) for plan in _frontier(pair, tried) for other in neighbours(plan.transfer))
        _try(pair, ("more like the best", [*dict.fromkeys(near)]), tried, few, progress)
    groups_tried = {transfer: measured for transfer, measured in tried.items() if is_group(transfer)}
    best = [plan.transfer for some in (tried, groups_tried) for plan in _frontier(pair, some) if plan.flops < WORTH]
    drawn = random_sets(layers)
    kept = [*dict.fromkeys((*by_kind(layers), *best, *drawn))]
    measured = dict(zip(kept, latest(pair.measure(kept, others), "the best of them", others, progress), strict=True))
    controls = latest(pair.measure_alone(others), "controls", others, progress)
    return Found(tuple(alone), tuple(controls), measured, _frontier(pair, measured), drawn, len(few))


def _try(
    pair: Pair,
    some: tuple[str, Sequence[Transfer]],
    tried: dict[Transfer, Measured],
    examples: range,
    progress: Progress,
) -> None:
    what, transfers = some
    new = [each for each in transfers if each not in tried]
    tried.update(zip(new, latest(pair.measure(new, examples), what, examples, progress), strict=True))


def _frontier(pair: Pair, measured: Mapping[Transfer, Measured]) -> tuple[Plan, ...]:
    return frontier([pair.plan(*each) for each in measured.items()])


def is_group(transfer: Transfer) -> bool:
    """Whether it is DroidSpeak's way: groups of layers are recomputed, and the others taken."""
    ways = transfer.ways
    return Way.PROJECT not in ways or (Way.RECOMPUTE not in ways and ways.count(Way.PROJECT) == 1)


def latest(steps: Iterable[list[Measured]], what: str, examples: range, progress: Progress) -> list[Measured]:
    """What a measurement has come to on all examples; `progress` hears of each."""
    found: list[Measured] = []
    for number, measured in enumerate(steps, start=1):
        progress(what, number, len(examples))
        found = measured
    return found
