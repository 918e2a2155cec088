"""Who wants to hear what becomes of requests, such as what records them."""

from typing import Protocol

from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.request import FinishReason


class Listener(Protocol):
    """Called on the engine's thread, which waits: methods return at once, and raise nothing."""

    def ended(self, sequence: Sequence, finish: FinishReason | None) -> None:
        """A choice has ended, and still has its lease. finish: None where it was aborted or given up"""

    def closed(self, request_id: str) -> None:
        """All choices of a request have ended, as far as there were any."""

    def called(self, request_id: str, tool: str, seconds: float | None) -> None:
        """The answer of a request that has ended called a tool. Arguments as in `Engine.pause`."""

    def computes(self, turn: Prefill) -> None:
        """A canonical pass is about to begin, or need not: all of it is there, or has no room."""


class Nobody:
    """Does not listen."""

    def ended(self, sequence: Sequence, finish: FinishReason | None) -> None:
        pass

    def closed(self, request_id: str) -> None:
        pass

    def called(self, request_id: str, tool: str, seconds: float | None) -> None:
        pass

    def computes(self, turn: Prefill) -> None:
        pass
