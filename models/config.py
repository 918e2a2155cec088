"""Typed reading of config.json: every value is checked when read, and remembered for the model's fingerprint."""

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import NoReturn, TypeVar

from hybrid_cache.errors import ModelError, UnsupportedModel

T = TypeVar("T")

_KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",  # what transformers 5 writes
    "attention": "attention",
    "full_attention": "attention",
    "hybrid": "hybrid",
}


class Config:
    """The fields of one config.json. `used` holds the values that were read, defaults included."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self.used: dict[str, object] = {}

    def integer(self, name: str, default: int | None = None, *, at_least: int = 1, at_most: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            self._refuse(name, value, f"a whole number of at least {at_least}")
        if at_most is not None and value > at_most:
            self._refuse(name, value, f"at most {at_most}")
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
        if value is None or value != value:
            self._refuse(name, self._values.get(name), "a number")
        return self._note(name, value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return self._note(name, value)

    def choice(self, name: str, default: str | None, allowed: Sequence[str | None]) -> str | None:
        """A setting of which we support the `allowed` values only."""
        value = self._values.get(name)
        value = default if value is None else value
        if value not in allowed:
            names = ", ".join("null" if a is None else repr(a) for a in allowed)
            raise UnsupportedModel(f"config.json: {name} is {value!r}, supported: {names}")
        return self._note(name, None if value is None else str(value))

    def refuse(self, name: str) -> None:
        """Raises if the setting is switched on."""
        if self._values.get(name):
            raise UnsupportedModel(f"config.json: {name} is {self._values[name]!r}, which is not supported")

    def layer_kinds(self, num_layers: int, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """'mamba', 'attention' or 'hybrid' for each layer, from either spelling of the field and of its values."""
        name = "layer_types" if self._values.get("layer_types") is not None else "layers_block_type"
        value = self._get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != num_layers:
            self._refuse(name, value, f"a list of {num_layers} layer kinds")
        for kind in value:
            if not isinstance(kind, str) or kind not in _KINDS:
                raise UnsupportedModel(f"config.json: {name} contains {kind!r}, supported: {', '.join(_KINDS)}")
        return self._note("layer_types", tuple(_KINDS[kind] for kind in value))

    def interval(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        value = self._values.get(name)
        if value is None:
            value = default
        bounds = [_plain_float(v) for v in value] if isinstance(value, list | tuple) else []
        low, high = bounds if len(bounds) == 2 else (None, None)
        if low is None or high is None or not low <= high:
            self._refuse(name, value, "a pair of increasing numbers")
        return self._note(name, (low, high))

    def rope_theta(self) -> float:
        """The base of plain rotary positions, as published (`rope_theta`) or as transformers 5 nests it."""
        nested = self._values.get("rope_parameters") or self._values.get("rope_scaling") or {}
        if not isinstance(nested, Mapping):
            self._refuse("rope_parameters", nested, "an object")
        kind = nested.get("rope_type") or nested.get("type") or "default"
        if kind != "default":
            raise UnsupportedModel(f"config.json: rope_type is {kind!r}, supported: 'default'")
        theta = _plain_float(nested.get("rope_theta", self._values.get("rope_theta", 10000.0)))
        if theta is None or not 0 < theta < inf:
            self._refuse("rope_theta", theta, "a positive number")
        return self._note("rope_theta", theta)

    def used_json(self) -> str:
        return json.dumps(self.used, sort_keys=True)

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"config.json: {name} is missing")
        return value

    def _note(self, name: str, value: T) -> T:
        self.used[name] = value
        return value

    def _refuse(self, name: str, value: object, expected: str) -> NoReturn:
        raise ModelError(f"config.json: {name} is {value!r}, expected {expected}")


def _plain_float(value: object) -> float | None:
    """JSON has no infinity; transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
        return float(value) if value in ("Infinity", "-Infinity") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
