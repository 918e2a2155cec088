"""How much of the server requests may take before any work is done for them, in all and by API key.

The bound of one key moves: it may take as much as is left, so that one alone gets half of everything, two a third
each, and whoever comes finds room (dynamic thresholds: Choudhury and Hahne 1998, "Dynamic queue length thresholds for
shared-memory packet switches", with alpha 1). Without keys, or with one, there is only the bound of all.
"""

from collections import Counter
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid_cache.api.server.connections import CONNECTION, current_connection
from hybrid_cache.api.server.errors import problem_of
from hybrid_cache.api.server.refusal import refuse
from hybrid_cache.api.server.tenants import current_tenant
from hybrid_cache.errors import Overloaded, OverShare

MOST_BODIES = 16  # of the largest size, held at once
LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that ask for no work, and whose body nobody reads


class Bound:
    """Something that is shared out. Holds integers only."""

    def __init__(self, what: str, limit: int, *, by_tenant: bool) -> None:
        self._what = what
        self._limit = limit
        self._by_tenant = by_tenant
        self._taken: Counter[str] = Counter()
        self.total = 0

    def take(self, tenant: str, amount: int, held: int = 0) -> None:
        """More for a request that has `held` already, which does not count against it.

        Raises OverShare where others should have what is left, Overloaded where too little is left at all.
        """
        own, left = self._taken[tenant], self._limit - self.total
        if self._by_tenant and own + amount > left and own > held:
            raise OverShare(
                f"this API key has {own} {self._what} here, and of {self._limit} only {left} are left for others"
            )
        if amount > left:
            raise Overloaded(f"there are {self.total} {self._what} here, limit {self._limit}")
        self._taken[tenant] += amount
        self.total += amount

    def give_back(self, tenant: str, amount: int) -> None:
        self._taken[tenant] -= amount
        self.total -= amount
        if not self._taken[tenant]:
            del self._taken[tenant]


class Gate:
    """Counts requests that have come and are not answered, and the bytes of their bodies."""

    def __init__(self, max_requests: int, max_bytes: int, *, by_tenant: bool) -> None:
        self.requests = Bound("requests", max_requests, by_tenant=by_tenant)
        self.bytes = Bound("bytes of request bodies", max_bytes, by_tenant=by_tenant)
        self.num_over_share = 0
        self.num_overloaded = 0


class Visit:
    """What one request takes of the server, until it leaves."""

    def __init__(self, gate: Gate, tenant: str) -> None:
        self._gate = gate
        self._tenant = tenant
        self.num_requests = 0
        self.num_bytes = 0

    def add_requests(self, number: int) -> None:
        """It asks for so many more prompts. Raises OverShare or Overloaded."""
        self._take(self._gate.requests, number, self.num_requests)
        self.num_requests += number

    def add_bytes(self, number: int) -> None:
        """So much more of its body has come. Raises OverShare or Overloaded."""
        self._take(self._gate.bytes, number, self.num_bytes)
        self.num_bytes += number

    def leave(self) -> None:
        """Gives back all that it has taken. Idempotent."""
        self._gate.requests.give_back(self._tenant, self.num_requests)
        self._gate.bytes.give_back(self._tenant, self.num_bytes)
        self.num_requests = self.num_bytes = 0

    def _take(self, bound: Bound, amount: int, held: int) -> None:
        try:
            bound.take(self._tenant, amount, held)
        except OverShare:
            self._gate.num_over_share += 1
            raise
        except Overloaded:
            self._gate.num_overloaded += 1
            raise


current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)


def body_size() -> int:
    """Bytes of the body of the request that is being handled."""
    visit = current_visit.get()
    return visit.num_bytes if visit else 0


class Admission:
    """Lets requests in by way of the gate. What only looks, does no work and is never kept waiting."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in LOOKING:
            return await self._app(scope, receive, send)
        visit = Visit(self._gate, current_tenant.get())
        try:
            visit.add_requests(1)
        except Overloaded as error:
            return await refuse(problem_of(error), scope, receive, send)
        try:
            current_visit.set(visit)
            current_connection.set(scope.get("state", {}).get(CONNECTION))
            await self._app(scope, receive, send)
        finally:
            visit.leave()
