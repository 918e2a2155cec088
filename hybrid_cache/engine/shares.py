"""Whose turn it is: tenants get equal shares of what the engine computes, however much they ask for.

Virtual token counters (Sheng et al. 2024, arXiv 2401.00588): each tenant's counter grows with the tokens that are
computed for it, and the one with the lowest goes first. A tenant who comes, or comes back, starts from the lowest
counter of those who are there: time in which it asked for nothing is not made up for. Of tenants with equal counters
the one goes first whose last turn, or coming, is longest ago; who comes during a turn goes before the one who had it.
"""

from collections import Counter

DECODE_WEIGHT = 2.0  # a decoded token, in prompt tokens
MOST_REMEMBERED = 4096  # tenants who are gone


class Shares:
    """Counters by tenant. Holds integers and floats only."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._present: Counter[str] = Counter()  # requests that wait or run
        self._num_turns = 0
        self._since: dict[str, int] = {}  # twice the number of the turn at which a tenant came or was served

    def enter(self, tenant: str) -> None:
        """A request of this tenant has come."""
        if tenant not in self._present:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._lowest())
            self._since[tenant] = 2 * self._num_turns - 1
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One of its requests has gone."""
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant], self._since[tenant]
        if len(self._served) > MOST_REMEMBERED:  # those who would be lifted to the lowest in any case
            lowest = self._lowest()
            self._served = {t: s for t, s in self._served.items() if t in self._present or s > lowest}
        if not self._present:
            self._served.clear()

    def take_turn(self, tenant: str) -> None:
        """A step begins with work for this tenant."""
        self._num_turns += 1
        if tenant in self._since:
            self._since[tenant] = 2 * self._num_turns

    def turn(self, tenant: str) -> tuple[float, int]:
        """The lowest goes first."""
        return self._served.get(tenant, 0.0), self._since.get(tenant, 0)

    def charge(self, tenant: str, num_tokens: float) -> None:
        """So much is computed for a tenant."""
        if tenant in self._served:
            self._served[tenant] += num_tokens

    def served(self, tenant: str) -> float:
        """Tokens that count as computed for a tenant who is there."""
        return self._served.get(tenant, 0.0)

    @property
    def num_present(self) -> int:
        """Tenants with requests that wait or run."""
        return len(self._present)

    @property
    def compares(self) -> bool:
        """Whether there are several tenants; one by itself needs no charges, as others start from where it is."""
        return len(self._present) > 1

    def _lowest(self) -> float:
        return min((self._served[tenant] for tenant in self._present), default=0.0)
