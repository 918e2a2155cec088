"""How long tools take, learned from how long they took.

For each tool the latest times are kept, and what is asked of them is the mean residual life: the mean time that is left
of those that took longer than this one has taken so far. Beyond the longest time seen, as much is left as has passed
(Lindy's law, true of a Pareto tail with exponent 2): tool times have heavy tails, and a call may never be answered.
"""

from bisect import bisect_right, insort
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import accumulate

MOST_TIMES = 400  # of a tool, the latest
MOST_TOOLS = 4096  # the one whose last time is longest ago is forgotten
FEWEST_TIMES = 5  # of a tool, before these say more than those of all tools
UNKNOWN_S = 10.0  # of a pause about which nothing is known
LEAST_S = 0.02  # of what is left
EVERY = 16  # times, between two sums


@dataclass(slots=True)
class Times:
    """The latest times of one tool."""

    rising: list[float] = field(default_factory=list)
    _latest: deque[float] = field(default_factory=deque)
    _summed: list[float] = field(default_factory=list)  # the rising times when they were last summed
    _sums: list[float] = field(default_factory=list)  # _sums[i]: sum of the first i of these
    _due: int = 1  # times until the next sums

    def __len__(self) -> int:
        return len(self.rising)

    def add(self, seconds: float) -> None:
        self._latest.append(seconds)
        insort(self.rising, seconds)
        if len(self.rising) > MOST_TIMES:
            self.rising.remove(self._latest.popleft())
        self._due -= 1
        if not self._due:
            self._due = min(1 + len(self.rising) // 8, EVERY)
            self._summed = list(self.rising)
            self._sums = list(accumulate(self._summed, initial=0.0))

    def left(self, elapsed: float) -> float:
        """Seconds that are left in the mean of a call that has taken `elapsed`."""
        first = bisect_right(self._summed, elapsed)
        longer = len(self._summed) - first
        if not longer:
            return max(elapsed, LEAST_S)
        return max((self._sums[-1] - self._sums[first]) / longer - elapsed, LEAST_S)


class ToolTimes:
    """Those of all tools, each under a name of its tenant's."""

    def __init__(self) -> None:
        self._tools: OrderedDict[tuple[str, str], Times] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tools)

    def add(self, tenant: str, tool: str, seconds: float) -> None:
        """A call was answered after so many seconds."""
        for key in ((tenant, tool), (tenant, "")):
            times = self._tools.setdefault(key, Times())
            times.add(seconds)
            self._tools.move_to_end(key)
        while len(self._tools) > MOST_TOOLS:
            self._tools.popitem(last=False)

    def left(self, tenant: str, tool: str, elapsed: float) -> float:
        """Seconds that are left in the mean of a call that has taken `elapsed` so far."""
        for key in ((tenant, tool), (tenant, "")):
            times = self._tools.get(key)
            if times is not None and len(times) >= FEWEST_TIMES:
                return times.left(elapsed)
        return max(UNKNOWN_S, elapsed)

    def times(self, tenant: str, tool: str) -> list[float]:
        """The known times of a tool, rising."""
        times = self._tools.get((tenant, tool))
        return [] if times is None else times.rising
