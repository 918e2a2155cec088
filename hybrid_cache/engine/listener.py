"""Who wants to hear what becomes of requests, such as what records them."""

from typing import Protocol

from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.request import FinishReason


class Listener(Protocol):
    """Called on the engine's thread, which waits: methods return at once, and raise nothing."""

    def prompted(self, sequence: Sequence) -> None:
        """The prompt of a request is in its state, and in the cache: its answers begin."""

    def ended(self, sequence: Sequence, finish: FinishReason | None) -> None:
        """A choice has ended, and still has its lease. finish: None where it was aborted or given up"""

    def closed(self, request_id: str) -> None:
        """All choices of a request have ended, as far as there were any."""

    def called(self, request_id: str, tool: str, seconds: float | None) -> None:
        """The answer of a request that has ended called a tool. Arguments as in `Engine.pause`."""

    def ends(self, turn: Prefill) -> None:
        """A canonical pass ends, or gives its room and may begin again; it still has its lease. Without one it has not
        even begun: all of it is there, or has no room.
        """


class Nobody:
    """Does not listen."""

    def prompted(self, sequence: Sequence) -> None:
        pass

    def ended(self, sequence: Sequence, finish: FinishReason | None) -> None:
        pass

    def closed(self, request_id: str) -> None:
        pass

    def called(self, request_id: str, tool: str, seconds: float | None) -> None:
        pass

    def ends(self, turn: Prefill) -> None:
        pass
