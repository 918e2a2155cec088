"""How long a step may take, in tiles: from the rate at which steps before it were computed."""

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost

NEWEST = 0.2  # weight of the newest step in a moving average
FIRST_TILES = 4  # in a step before any rate is known


class Pace:
    """Bounds the tiles of a step by time."""

    def __init__(self, cost: PrefillCost, max_step_s: float | None) -> None:
        """max_step_s: seconds that a step should take at most; None for any number"""
        self._cost = cost
        self._max_step_s = max_step_s
        self._s_per_flop = 0.0
        self._decode_s = 0.0  # of a step that only decodes

    @property
    def bounds(self) -> bool:
        """Whether steps are bounded at all."""
        return self._max_step_s is not None

    def note(self, seconds: float, flops: float, *, decodes: bool) -> None:
        """A step has taken so many seconds. flops: of its prefill; 0 for a step that only decodes"""
        if not flops:
            self._decode_s += NEWEST * (seconds - self._decode_s) if self._decode_s else seconds
            return
        rate = max(seconds - self._decode_s * decodes, seconds / 4) / flops
        self._s_per_flop += NEWEST * (rate - self._s_per_flop) if self._s_per_flop else rate

    def room(self, *, decodes: bool) -> "Room":
        """What one step has room for."""
        if self._max_step_s is None:
            return Room(self._cost, None)
        if not self._s_per_flop:
            return Room(self._cost, self._cost.flops(0, FIRST_TILES * TILE))
        seconds = max(self._max_step_s - self._decode_s * decodes, 0.0)
        return Room(self._cost, seconds / self._s_per_flop)


class Room:
    """FLOPs of prefill that are left of a step. Its first tile is always computed."""

    def __init__(self, cost: PrefillCost, flops: float | None) -> None:
        """flops: None for any number"""
        self._cost = cost
        self._flops = flops
        self._empty = True

    def tiles(self, start: int, most: int) -> int:
        """How many of a prompt's next tiles still fit, when its first `start` tokens are there."""
        if self._flops is None:
            return most
        low, high = int(self._empty), most
        while low < high:
            middle = (low + high + 1) // 2
            if self._cost.flops(start, start + middle * TILE) <= self._flops:
                low = middle
            else:
                high = middle - 1
        return min(low, most)

    def take(self, start: int, end: int) -> None:
        """These tokens are computed in the step."""
        self._empty = False
        if self._flops is not None:
            self._flops -= self._cost.flops(start, end)
