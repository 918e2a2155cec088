"""Who may hand entries of the cache to whom among the models of an engine, and in which way; see `transfer`.

What is exact goes among a model's own entries. What is not stays in a *lane*: a namespace for one receiver, sender and
transfer, whose entries no other request ever sees, and from which nothing is handed on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from hybrid_cache.errors import ConfigError
from hybrid_cache.profile import Profile
from hybrid_cache.spec import LayerSpec, PrefillCost, total_cost
from hybrid_cache.transfer import Transfer, Way, equal_layers, upper


class Layered(Protocol):
    """What has to be known of a model, as in `HybridModel`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def chain(self) -> tuple[str, ...]: ...

    @property
    def layers(self) -> tuple[LayerSpec, ...]: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """A way for one model to make entries from another's."""

    sender: str  # the other's fingerprint
    name: str  # and its name, as requests say it
    transfer: Transfer
    cost: PrefillCost  # of what the receiver runs
    spares: PrefillCost  # what it does not run
    entries: tuple[int, ...]  # that it takes as they are, in the order of `CacheSpec.layers`
    loss: float = 0.0  # expected, in nats a token; 0: none, to the bit
    lane: str = ""  # where what is made belongs; empty: among its own entries
    receiver: str = ""  # its own fingerprint


@dataclass(slots=True)
class Senders:
    """The models of one engine by fingerprint."""

    _models: dict[str, Layered] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _offers: dict[str, tuple[Offer, ...]] = field(default_factory=dict)
    _kept: dict[tuple[str, frozenset[str]], Mapping[int, PrefillCost]] = field(default_factory=dict)
    _profiles: dict[tuple[str, str], Profile] = field(default_factory=dict)  # by sender and receiver
    _wanted: set[tuple[str, str]] = field(default_factory=set)  # lanes by receiver that requests have asked for

    def learn(self, profile: Profile) -> None:
        """Raises ConfigError for a profile of models that are not here."""
        for fingerprint in (profile.sender, profile.receiver):
            if fingerprint not in self._models:
                raise ConfigError(f"a profile of other weights: {fingerprint}, here are {', '.join(self._models)}")
        layers = len(self._models[profile.receiver].layers)
        if profile.num_layers != layers:
            raise ConfigError(f"a profile of {profile.num_layers} layers, the models have {layers}")
        self._profiles[profile.sender, profile.receiver] = profile
        self._make_offers()

    def update(self, models: Mapping[str, Layered]) -> None:
        """To be called when a model has come or gone; profiles wait for models that come back. models: by name"""
        self._names = {model.fingerprint: name for name, model in reversed([*models.items()])}
        self._models = {model.fingerprint: model for model in models.values()}
        self._make_offers()

    def _make_offers(self) -> None:
        self._offers = {name: (*self._exact(model), *self._profiled(model)) for name, model in self._models.items()}
        self._kept.clear()

    def exact(self, receiver: str) -> Sequence[Offer]:
        """From what a model may make entries of its own."""
        return [offer for offer in self._offers.get(receiver, ()) if not offer.lane]

    def profiled(self, receiver: str, max_loss: float) -> Sequence[Offer]:
        """From what a model may make entries that lose no more than this, in nats a token: the cheapest of each sender.

        From now on senders keep what these read.
        """
        cheapest = dict[str, Offer]()
        for each in self._offers.get(receiver, ()):
            best = cheapest.get(each.sender)
            cheaper = best is None or each.cost.per_token < best.cost.per_token
            if each.lane and each.loss <= max_loss and cheaper:
                cheapest[each.sender] = each
        lanes = {(receiver, each.lane) for each in cheapest.values()}
        if not lanes <= self._wanted:
            self._wanted |= lanes
            self._kept.clear()
        return list(cheapest.values())

    def read_from(self, sender: str) -> Sequence[Offer]:
        """In which ways requests have asked to read a model with a loss."""
        offers = (each for some in self._offers.values() for each in some)
        return [each for each in offers if each.sender == sender and (each.receiver, each.lane) in self._wanted]

    def kept_inputs(self, sender: str, but: frozenset[str] = frozenset()) -> Mapping[int, PrefillCost]:
        """Layers of a model whose inputs others read, with what having them spares these.

        What is kept for entries of a model's own always is; for others once such entries were asked for.
        but: not what is read for these lanes
        """
        if (sender, but) not in self._kept:
            self._kept[sender, but] = self._inputs(sender, but)
        return self._kept[sender, but]

    def _inputs(self, sender: str, but: frozenset[str]) -> dict[int, PrefillCost]:
        exact = (each for some in self._offers.values() for each in some if each.sender == sender and not each.lane)
        kept: dict[int, list[PrefillCost]] = {}
        for each in (*exact, *(each for each in self.read_from(sender) if each.lane not in but)):
            reads = each.transfer.reads
            for layer in reads:
                kept.setdefault(layer, []).append(each.spares.part(1 / len(reads)))
        return {layer: max(costs, key=lambda cost: cost.per_token) for layer, costs in sorted(kept.items())}

    def lanes(self, fingerprint: str) -> set[str]:
        """Those that a model has anything to do with."""
        offers = ((name, each) for name, offers in self._offers.items() for each in offers)
        return {each.lane for name, each in offers if each.lane and fingerprint in (name, each.sender)}

    def _profiled(self, receiver: Layered) -> Iterable[Offer]:
        for (sender, name), profile in self._profiles.items():
            if name == receiver.fingerprint and sender in self._models:
                for plan in profile.plans:
                    lane = lane_of(sender, name, plan.transfer)
                    more = plan.loss, lane, name
                    yield offer(sender, self._names[sender], receiver.layers, plan.transfer, *more)

    def _exact(self, receiver: Layered) -> Iterable[Offer]:
        """Layers that are the same in both from the first one on are taken, those above are computed."""
        for name, sender in self._models.items():
            common = 0 if sender is receiver else equal_layers(sender.chain, receiver.chain) or 0
            if common:
                yield offer(name, self._names[name], receiver.layers, upper(len(receiver.layers), common))


def lane_of(sender: str, receiver: str, transfer: Transfer) -> str:
    """Of two models by their fingerprints: what others make in the same way is apart."""
    return blake2b(f"{sender} {receiver} {transfer}".encode(), digest_size=8).hexdigest()


def offer(
    sender: str,
    name: str,
    layers: Sequence[LayerSpec],
    transfer: Transfer,
    loss: float = 0.0,
    lane: str = "",
    receiver: str = "",
) -> Offer:
    """layers: of the receiver"""
    transfer = transfer.for_layers(layers)
    ways = list(enumerate(zip(layers, transfer.ways, strict=True)))
    runs = (spec.cost if transfer.goes_on(i) else spec.write_cost for i, (spec, way) in ways if way is not Way.TAKE)
    taken = tuple(entry for _, (spec, way) in ways if way is Way.TAKE for entry in spec.entries)
    cost = total_cost(runs)
    whole = total_cost(spec.cost for spec in layers)
    spares = PrefillCost(whole.per_token - cost.per_token, whole.per_token_per_position - cost.per_token_per_position)
    return Offer(sender, name, transfer, cost, spares, taken, loss, lane, receiver)
