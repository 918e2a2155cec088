"""Typed reading of config.json: every value is checked when read, and remembered for the model's fingerprint."""

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import shown

T = TypeVar("T")

_KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",  # what transformers 5 writes
    "attention": "attention",
    "full_attention": "attention",
    "hybrid": "hybrid",
}


# What a whole number may be at most: MOST, for what is a size, unless it is named here.
MOST = 1 << 20
MOST_OF = {
    "vocab_size": 1 << 24,
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers"), 1024),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4096),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "original_max_position_embeddings",
            "model_max_length",
            "sliding_window",
            "attention_window_size",
        ),
        (1 << 31) - 1,
    ),
}
LARGEST = 1e30  # number, and one over it the smallest where a number must be positive: float32 holds both


class Config:
    """The fields of one config.json. `used` holds the values that were read, defaults included."""

    def __init__(self, values: Mapping[str, object], inside: str = "") -> None:
        """`inside`: begins the names of the fields in messages."""
        self._values = values
        self._inside = inside
        self.used: dict[str, object] = {}

    def integer(self, name: str, default: int | None = None, *, at_least: int = 1, at_most: int | None = None) -> int:
        """Between `at_least` and `at_most`, and never above `MOST_OF`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            self._refuse(name, value, f"a whole number of at least {at_least}")
        bound = MOST_OF.get(name, MOST)
        if value > (bound := bound if at_most is None else min(at_most, bound)):
            self._refuse(name, value, f"at most {bound}")
        return self._note(name, value)

    def divisor(self, name: str, total: int, default: int) -> int:
        value = self.integer(name, default)
        if total % value:
            self._refuse(name, value, f"a divisor of {total}")
        return value

    def integer_or_auto(self, name: str, auto: int) -> int:
        """A whole number, or "auto" for the value given here."""
        return self._note(name, auto) if self._values.get(name) == "auto" else self.integer(name, auto)

    def number(self, name: str, default: float | None = None) -> float:
        value = _plain_float(self._get(name, default))
        if value is None or not abs(value) <= LARGEST:
            self._refuse(name, self._values.get(name, default), f"a number between {-LARGEST:g} and {LARGEST:g}")
        return self._note(name, value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if not value >= 1 / LARGEST:
            self._refuse(name, value, f"a positive number, from {1 / LARGEST:g} on")
        return value

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def says(self, name: str, word: str) -> bool:
        return self._values.get(name) == word

    def either(self, *names: str) -> str:
        """Of several names of one field, the one that is used here; the first where none is."""
        return next((name for name in names if self.has(name)), names[0])

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return self._note(name, value)

    def choice(self, name: str, default: str | None, allowed: Sequence[str | None]) -> str | None:
        """A setting of which we support the `allowed` values only. Raises UnsupportedModel for others."""
        value = self._values.get(name)
        value = default if value is None else value
        if value not in allowed:
            names = ", ".join("null" if a is None else repr(a) for a in allowed)
            raise UnsupportedModel(f"config.json: {self._inside}{name} is {shown(value)}, supported: {names}")
        return self._note(name, None if value is None else str(value))

    def refuse(self, name: str) -> None:
        """Raises if the setting is switched on."""
        if self._values.get(name):
            raise UnsupportedModel(f"config.json: {name} is {shown(self._values[name])}, which is not supported")

    def layer_kinds(self, num_layers: int, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """'mamba', 'attention' or 'hybrid' for each layer, from either spelling of the field and of its values.

        Raises UnsupportedModel for other values.
        """
        name = "layer_types" if self._values.get("layer_types") is not None else "layers_block_type"
        value = self._get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != num_layers:
            self._refuse(name, value, f"a list of {num_layers} layer kinds")
        for kind in value:
            if not isinstance(kind, str) or kind not in _KINDS:
                raise UnsupportedModel(f"config.json: {name} contains {shown(kind)}, supported: {', '.join(_KINDS)}")
        return self._note("layer_types", tuple(_KINDS[kind] for kind in value))

    def each_layer(
        self, name: str, num_layers: int, allowed: Sequence[str], default: Sequence[str] | None = None
    ) -> tuple[str, ...]:
        """One of the `allowed` words for each layer. Raises UnsupportedModel for others."""
        value = self._get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != num_layers:
            self._refuse(name, value, f"a list of {num_layers} layer kinds")
        for kind in value:
            if kind not in allowed:
                raise UnsupportedModel(
                    f"config.json: {self._inside}{name} contains {shown(kind)}, supported: {', '.join(allowed)}"
                )
        return self._note(name, tuple(value))

    def words(self, name: str, allowed: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
        """A list of some of the `allowed` words."""
        value = self._get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            self._refuse(name, value, "a list of words")
        return self.each_layer(name, len(value), allowed, default)

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """A list of whole numbers, none of them negative."""
        value = self._get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is_index(v) for v in value):
            self._refuse(name, value, "a list of whole numbers")
        return self._note(name, tuple(value))

    def pattern(self, name: str, words: Mapping[str, str]) -> tuple[str, ...]:
        """A string with a letter for each layer -> the word for each letter.

        Raises UnsupportedModel for other letters.
        """
        value = self._get(name, None)
        if not isinstance(value, str) or not value:
            self._refuse(name, value, "a letter for each layer")
        for letter in value:
            if letter not in words:
                raise UnsupportedModel(f"config.json: {name} contains {shown(letter)}, supported: {', '.join(words)}")
        return self._note(name, tuple(words[letter] for letter in value))

    def numbers(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """As many numbers as `default` has."""
        value = self._get(name, default)
        found = [_plain_float(v) for v in value] if isinstance(value, list | tuple) else []
        numbers = tuple(v for v in found if v is not None and abs(v) <= LARGEST)
        if not len(found) == len(numbers) == len(default):
            self._refuse(name, value, f"a list of {len(default)} numbers")
        return self._note(name, numbers)

    def section(self, name: str) -> "Config":
        """The fields of an object inside, none where it is missing. What is read of them counts as used here."""
        nested = self._values.get(name) or {}
        if not isinstance(nested, Mapping):
            self._refuse(name, nested, "an object")
        section = Config(nested, f"{self._inside}{name}.")
        section.used = self.used
        return section

    def text(self) -> "Config":
        """The text model's part of a multimodal config; a text model's own config as it is."""
        nested = self._values.get("text_config")
        if nested is None:
            return self
        if not isinstance(nested, Mapping):
            self._refuse("text_config", nested, "an object")
        return Config(nested, "text_config.")

    def interval(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        value = self._values.get(name)
        if value is None:
            value = default
        bounds = [_plain_float(v) for v in value] if isinstance(value, list | tuple) else []
        low, high = bounds if len(bounds) == 2 else (None, None)
        if low is None or high is None or not low <= high:
            self._refuse(name, value, "a pair of increasing numbers")
        return self._note(name, (low, high))

    def rope(self, layer_kind: str | None = None, default: Mapping[str, object] | None = None) -> "Config":
        """The settings of rotary positions, as published (`rope_theta` beside `rope_scaling`) or as transformers 5
        nests them all (`rope_parameters`). What is read of them counts as used here.

        layer_kind  whose settings, where each kind of layer has its own
        default     where there are none at all
        """
        nested = self._values.get("rope_parameters") or self._values.get("rope_scaling") or default or {}
        if not isinstance(nested, Mapping):
            self._refuse("rope_parameters", nested, "an object")
        place = f"{self._inside}rope_parameters."
        if layer_kind is not None and any(isinstance(value, Mapping) for value in nested.values()):
            settings = nested.get(layer_kind)
            if not isinstance(settings, Mapping):
                self._refuse(f"rope_parameters.{layer_kind}", settings, "an object")
            nested, place = settings, f"{place}{layer_kind}."
        beside = {name: self._values.get(name) for name in ("rope_theta", "max_position_embeddings")}
        kind = {"rope_type": nested.get("rope_type") or nested.get("type")}
        trained = "original_max_position_embeddings"
        first = {trained: self._values[trained]} if self._values.get(trained) is not None else {}
        rope = Config({**beside, **nested, **kind, **first}, place)
        rope.used = self.used
        return rope

    def rope_is_off(self) -> bool:
        """Whether the base of rotary positions is there and null (OLMo hybrid)."""
        nested = self._values.get("rope_parameters")
        place = nested if isinstance(nested, Mapping) and "rope_theta" in nested else self._values
        return self._note("rope_is_off", "rope_theta" in place and place["rope_theta"] is None)

    def used_json(self) -> str:
        return json.dumps(self.used, sort_keys=True)

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"config.json: {self._inside}{name} is missing")
        return value

    def _note(self, name: str, value: T) -> T:
        self.used[self._inside + name] = value
        return value

    def _refuse(self, name: str, value: object, expected: str) -> NoReturn:
        raise ModelError(f"config.json: {self._inside}{name} is {shown(value)}, expected {expected}")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _plain_float(value: object) -> float | None:
    """JSON has no infinity; transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
        return float(value) if value in ("Infinity", "-Infinity") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
