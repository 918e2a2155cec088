"""The values of a GGUF file by their names, checked as they are read."""

from collections.abc import Mapping

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.config import LARGEST
from hybrid_cache.models.files import shown
from hybrid_cache.models.gguf.header import Value

MOST = (1 << 31) - 1


class Metadata:
    """Values of one file. Names without `general.` or `tokenizer.` belong to its architecture."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values
        self.arch = self.text("general.architecture")

    def has(self, name: str) -> bool:
        return self._full(name) in self.values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected a whole number in [0, {MOST}]")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A float32 of the file as the shortest decimal that means it, as it stood in a config.json."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected a number")
        return float(f"{value:.7g}")

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected a string")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected strings")
        return value

    def numbers(self, name: str) -> list[float]:
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise ModelError(f"{self._full(name)} is {shown(value)}, expected numbers")
        return value

    def largest(self, name: str, default: int | None = None) -> int:
        """Of a value that each layer may have for itself, with 0 where it has none; all others must be equal."""
        value = self._get(name, default)
        if not isinstance(value, list):
            return self.integer(name, default)
        others = {item for item in value if item}
        if len(others) > 1 or not all(isinstance(item, int) and 0 <= item <= MOST for item in value):
            raise UnsupportedModel(f"{self._full(name)} is {shown(value)}: layers of several sizes are not supported")
        return int(max(others, default=0))

    def refuse(self, name: str, neutral: object) -> None:
        """Raises UnsupportedModel where a value is there that changes what a model computes."""
        value = self.values.get(self._full(name), neutral)
        if value != neutral:
            raise UnsupportedModel(f"{self._full(name)} is {shown(value)}, which is not supported")

    def _get(self, name: str, default: Value | None) -> Value:
        value = self.values.get(self._full(name), default)
        if value is None:
            raise ModelError(f"{self._full(name)} is missing")
        return value

    def _full(self, name: str) -> str:
        return name if name.startswith(("general.", "tokenizer.", "split.")) else f"{self.arch}.{name}"
