"""How long a step may take, in tiles: from the rate at which steps before it were computed."""

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost, total_cost

NEWEST = 0.2  # weight of the newest step in a moving average
FIRST_TILES = 4  # in a step before any rate is known
NOTHING = total_cost(())


class Pace:
    """Bounds the tiles of a step by time."""

    def __init__(self, cost: PrefillCost, max_step_s: float | None) -> None:
        """max_step_s: seconds that a step should take at most; None for any number"""
        self._cost = cost
        self._max_step_s = max_step_s
        self.s_per_flop = 0.0
        self.step_s = 0.0  # of any step
        self.row_s = 0.0  # of a step that only decodes, for each of its rows
        self._decode_s = 0.0  # of a step that only decodes

    def note(self, seconds: float, flops: float, num_decodes: int) -> None:
        """A step has taken so many seconds. flops: of its prefill   num_decodes: sequences that decoded in it"""
        self.step_s = _moved(self.step_s, seconds)
        if not flops:
            if num_decodes:
                self._decode_s = _moved(self._decode_s, seconds)
                self.row_s = _moved(self.row_s, seconds / num_decodes)
            return
        rate = max(seconds - self._decode_s * bool(num_decodes), seconds / 4) / flops
        self.s_per_flop = _moved(self.s_per_flop, rate)

    def room(self, *, decodes: bool) -> "Room":
        """What one step has room for."""
        if self._max_step_s is None:
            return Room(self._cost, None)
        if not self.s_per_flop:
            return Room(self._cost, self._cost.flops(0, FIRST_TILES * TILE))
        seconds = max(self._max_step_s - self._decode_s * decodes, 0.0)
        return Room(self._cost, seconds / self.s_per_flop)


def _moved(mean: float, value: float) -> float:
    """A moving average that starts from the first value."""
    return mean + NEWEST * (value - mean) if mean else value


class Room:
    """FLOPs of prefill that are left of a step. Its first tile is always computed."""

    def __init__(self, cost: PrefillCost, flops: float | None) -> None:
        """flops: None for any number"""
        self._cost = cost
        self._flops = flops
        self._empty = True

    def tiles(self, start: int, most: int, beside: PrefillCost = NOTHING) -> int:
        """How many of a prompt's next tiles still fit, when its first `start` tokens are there.

        beside: cost of what the same pass makes of them
        """
        if self._flops is None:
            return most
        cost = total_cost((self._cost, beside))
        low, high = int(self._empty), most
        while low < high:
            middle = (low + high + 1) // 2
            if cost.flops(start, start + middle * TILE) <= self._flops:
                low = middle
            else:
                high = middle - 1
        return min(low, most)

    def take(self, start: int, end: int, beside: PrefillCost = NOTHING) -> None:
        """These tokens are computed in the step. beside: as in `tiles`"""
        self._empty = False
        if self._flops is not None:
            self._flops -= total_cost((self._cost, beside)).flops(start, end)
