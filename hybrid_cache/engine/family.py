"""The models that one engine runs: its own, and variants of that which share its memory, budget and queues."""

from collections.abc import Mapping

from hybrid_cache.cache.keys import Mark
from hybrid_cache.device.adapted import trunk_of
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.errors import ConfigError, RequestError
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.tokens import TokenArray, last_occurrence

ALIKE = (
    "vocab_size",
    "max_length",
    "device",
    "packs",
    "cache_spec",
    "layers",
    "fidelities",
    "commutes",
    "prefill_cost",
)
"""What variants have in common with the model, as `HybridModel` has it."""


class Family:
    """Models of one shape by the names that requests use. The empty name is the first one's."""

    def __init__(self, base: HybridModel) -> None:
        """Raises ConfigError for a model that is nothing by itself."""
        if base.invocation:
            raise ConfigError("an activated adapter needs the model that reads what comes before it, beside it")
        self._models = {"": base}

    def __getitem__(self, name: str) -> HybridModel:
        """Raises RequestError for a name that none has."""
        model = self._models.get(name)
        if model is None:
            names = ", ".join(filter(None, self._models)) or "none"
            raise RequestError(f"there is no variant {name[:100]!r}, only {names}", param="model")
        return model

    @property
    def models(self) -> Mapping[str, HybridModel]:
        """All of them by name."""
        return self._models

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    def fingerprint(self, name: str) -> str:
        """Raises RequestError for a name that none has."""
        return self[name].fingerprint

    def namespace(self, name: str, salt: str) -> str:
        """In which prompts of a model are looked up: an activated one reads what comes before its invocation as the
        first model does. Raises RequestError for a name that none has.
        """
        return namespace_of(salt, self["" if self[name].invocation else name].fingerprint)

    def mark(self, name: str, salt: str, tokens: TokenArray) -> Mark | None:
        """From where on another model computes a prompt than its namespace says; None if none does.

        Raises RequestError for a name that none has.
        """
        model = self[name]
        position = last_occurrence(tokens, model.invocation) if model.invocation else None
        return None if position is None else Mark(position, namespace_of(salt, model.fingerprint))

    def add(self, name: str, model: HybridModel) -> None:
        """Raises ConfigError for a name that is taken, a model of another shape, or one that no prompt invokes."""
        if name in self._models:
            raise ConfigError(f"the name {name!r} is taken")
        difference = difference_of(self._models[""], model)
        if difference:
            raise ConfigError(f"{name!r} is no variant of this model: {difference}")
        if not all(0 <= token < model.vocab_size for token in model.invocation):
            raise ConfigError(f"{name!r} is invoked by {model.invocation}, tokens are below {model.vocab_size}")
        self._models[name] = model

    def remove(self, name: str) -> bool:
        """-> whether its model has no other name. Raises RequestError for a name that none has."""
        if not name:
            raise RequestError("the model that all others are variants of stays", param="model")
        fingerprint = self[name].fingerprint
        del self._models[name]
        return all(model.fingerprint != fingerprint for model in self._models.values())


def difference_of(base: HybridModel, model: HybridModel) -> str:
    """In what a model's shape differs from that of another; empty where both can share a memory."""
    base, model = trunk_of(base), trunk_of(model)
    if type(base) is not type(model):
        return f"it is a {type(model).__name__}, not a {type(base).__name__}"
    if base.ops.name != model.ops.name:
        return f"it runs on {model.ops.name}, not {base.ops.name}"
    for fact in ALIKE:
        ours, theirs = getattr(base, fact), getattr(model, fact)
        if ours != theirs:
            if fact == "prefill_cost":
                return "its layers are of other widths, or in another order"
            return _layers(base, model) if fact == "cache_spec" else f"its {fact} is {theirs}, not {ours}"
    return ""


def _layers(base: HybridModel, model: HybridModel) -> str:
    """In what the cached tensors of two models differ."""
    ours, theirs = base.cache_spec, model.cache_spec
    if ours.hidden_dtype != theirs.hidden_dtype:
        return f"its rows are {theirs.hidden_dtype}, not {ours.hidden_dtype}"
    if ours.hidden_size != theirs.hidden_size:
        return f"its rows are {theirs.hidden_size} numbers wide, not {ours.hidden_size}"
    if len(ours.layers) != len(theirs.layers):
        return f"it keeps {len(theirs.layers)} layers, not {len(ours.layers)}"
    for index, (own, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if own != other:
            return f"cached layer {index} is {other}, not {own}"
    return "what it keeps in the cache differs"
