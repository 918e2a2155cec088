"""Which transfers from a sender to a receiver are worth having: searched from what taking each layer alone costs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybrid_cache.models.tools.pairs import Measured, Pair
from hybrid_cache.profile import Plan, frontier
from hybrid_cache.spec import LayerSpec
from hybrid_cache.transfer import Transfer, Way, projected, upper

FEW_LAYERS = 8  # up to so many, all contiguous groups are tried
SEARCHED = 200  # examples that candidates are compared on, before the best of them are measured on all

Progress = Callable[[str, int, int], None]  # what is measured, examples done, of how many


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has measured."""

    alone: tuple[Measured, ...]  # by layer: it is taken, all others are the receiver's own
    zeroed: Measured  # the control: the receiver's own entries without states
    measured: dict[Transfer, Measured]  # on all examples
    plans: tuple[Plan, ...]  # on the frontier of loss and FLOPs


def group(num_layers: int, first: int, last: int) -> Transfer:
    """Contiguous layers are recomputed, and the others taken: DroidSpeak's way."""
    ways = (Way.RECOMPUTE if first <= index <= last else Way.TAKE for index in range(num_layers))
    return Transfer(tuple(ways))


def candidates(layers: Sequence[LayerSpec], losses: Sequence[float]) -> list[Transfer]:
    """Transfers worth a try, from what taking each layer alone loses; everything taken comes first."""
    num = len(layers)
    writing = [index for index, layer in enumerate(layers) if layer.entries]
    attention = [index for index in writing if layers[index].kind.startswith("attention")]
    worst = sorted(writing, key=lambda i: -losses[i] / max(layers[i].write_cost.per_token, 1.0))
    found = [upper(num, num)]
    found += [projected(num, worst[:count]) for count in range(1, len(worst) + 1)]
    found += [projected(num, attention), projected(num, set(writing) - set(attention))]
    found += [group(num, first, last) for first, last in groups(num, losses)]
    for last in {int(num * share) for share in (0.25, 0.5, 0.75)}:  # computed below, projected above
        found.append(Transfer((Way.RECOMPUTE,) * last + (Way.PROJECT,) * (num - last)))
    return list(dict.fromkeys(each.for_layers(layers) for each in found))


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


def search(pair: Pair, progress: Progress = lambda what, done, total: None) -> Found:
    """Measures layers alone, then candidates, and the best of these on all examples."""
    few, every = range(min(SEARCHED, len(pair.examples))), range(len(pair.examples))
    alone = latest(pair.measure_layers(few), "layers alone", few, progress)
    zeroed = latest(pair.measure_without_states(few), "control", few, progress)[0]
    tried = candidates(pair.receiver.layers, [each.kl for each in alone])
    first = latest(pair.measure(tried, few), "candidates", few, progress)
    plans = [pair.plan(transfer, measured) for transfer, measured in zip(tried, first, strict=True)]
    best = {plan.transfer for plan in (*frontier(plans), *frontier([p for p in plans if is_group(p.transfer)]))}
    kept = [transfer for transfer in tried if transfer in best or transfer is tried[0]]
    measured = dict(zip(kept, latest(pair.measure(kept, every), "the best of them", every, progress), strict=True))
    return Found(tuple(alone), zeroed, measured, frontier([pair.plan(*each) for each in measured.items()]))


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
