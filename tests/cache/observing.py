"""A policy that notes down what it is told, and else is LRU."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.signals import Ending


class Observing(LRU):
    def __init__(self) -> None:
        super().__init__()
        self.outlines: list[Outline] = []
        self.endings: list[Ending] = []

    def propose(self, outline: Outline) -> Iterable[Wish]:
        self.outlines.append(outline)
        return super().propose(outline)

    def ended(self, ending: Ending) -> None:
        self.endings.append(ending)
        super().ended(ending)


NAME = f"{__name__}:{Observing.__name__}"
