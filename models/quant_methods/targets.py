"""Which modules a group of `quantization_config.config_groups` means: names, `re:` patterns, or classes of layers.

A pattern comes with a file from anywhere, and may take years to find out that it does not match: each try has a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid_cache.errors import ModelError
from hybrid_cache.models.files import shown

if TYPE_CHECKING:
    import regex

FIELD = "quantization_config.config_groups: targets"
PATTERN = "re:"
MAX_PATTERNS = 1024  # of one group
MAX_CHARACTERS = 1024  # of one pattern
MAX_SECONDS = 1.0  # of one try


class Targets:
    def __init__(self, targets: Sequence[str]) -> None:
        """Raises ModelError for a pattern that is none or beyond the bounds."""
        import regex  # `re` has no bound on time; transformers brings it

        patterns = [target.removeprefix(PATTERN) for target in targets if target.startswith(PATTERN)]
        if len(patterns) > MAX_PATTERNS:
            raise ModelError(f"{FIELD} has {len(patterns)} patterns, at most {MAX_PATTERNS} are read")
        if longest := next((each for each in patterns if len(each) > MAX_CHARACTERS), None):
            raise ModelError(f"{FIELD} has a pattern of {len(longest)} characters, at most {MAX_CHARACTERS} are read")
        self._names = frozenset(targets)
        self.has_class = any(target.isidentifier() for target in targets)
        try:
            self._patterns = [regex.compile(each) for each in patterns]
        except (regex.error, RecursionError, OverflowError, ValueError) as e:
            raise ModelError(f"{FIELD} has a pattern that is none: {' '.join(str(e).split())[:100]}") from e

    def names(self, module: str) -> bool:
        """Whether it is named, or a pattern fits the beginning of its name. Raises ModelError if that takes long."""
        return module in self._names or any(_fits(pattern, module) for pattern in self._patterns)


def _fits(pattern: regex.Pattern[str], module: str) -> bool:
    try:
        return pattern.match(module, timeout=MAX_SECONDS) is not None
    except TimeoutError as e:
        raise ModelError(f"{FIELD} has {shown(pattern.pattern)}, which takes too long on {module}") from e
