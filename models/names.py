"""Names of weights: the same text model lies under several prefixes, by the class or the tool that wrote it.

model.layers.0...                    the text class
model.language_model.layers.0...     inside of a multimodal one, as transformers 5 writes it
language_model.model.layers.0...     as transformers 4 and MLX do
"""

import re
from collections.abc import Iterable

# Of multimodal checkpoints, all that is not the text model.
TOWERS = r"^(?:model\.)?(?:visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\."
_OUTER = re.compile(r"^(?:(?:model|language_model|text_model)\.)+")


def core(name: str) -> str:
    """A name without what says where the text model lies."""
    return _OUTER.sub("", name)


class Names:
    """The names of one checkpoint, found under any prefix where that leads to one weight only."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        found: dict[str, str | None] = {}
        for name in self._names:
            found[core(name)] = None if core(name) in found else name
        self._by_core = {inner: name for inner, name in found.items() if name is not None}

    def find(self, name: str) -> str:
        """As the checkpoint has it; a name that it does not have as it is."""
        return name if name in self._names else self._by_core.get(core(name), name)
