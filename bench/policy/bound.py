"""How much of all prefill any cache could save in a number of bytes, even one that knows the future.

Requests run one after the other. One that resumes at depth d needs d pages and the state behind the last of them. Each
must have been kept ever since the last earlier request that passed it: it takes room in all gaps between the two, and
serves nobody else meanwhile. Let a byte cost `prices[g]` in the gap after request g, and let every request resume where
benefit less rent is largest. Then, whatever the prices are (Lagrangian duality),

    best saving  <=  sum of prices * capacity  +  sum over requests of max(0, max over depths of benefit - rent)

because a choice that fits pays at most prices * capacity in rent. The search for good prices only makes the bound
lower; it can never make it wrong.

The bound grants a policy two things that it does not have: a request may resume half for half the room, and a visitor
leaves all its states, also those above the depth at which it resumed itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.spec import PrefillCost

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LIMIT = np.iinfo(np.int64).max
TOKENS = PrefillCost(per_token=1.0, per_token_per_position=0.0)
STEP = 0.3  # of the logarithm of a price, at first
ROUNDING = 1e-12  # of the capacity: less than a byte
SOFTEST, HARDEST = 0.3, 0.01  # how sharply requests choose, in mean benefits


@dataclass(frozen=True, slots=True)
class Bound:
    """Shares of all prefill, 0 to 1. The best policy saves from `reached_flops_saved` to `flops_saved`."""

    flops_saved: float
    reached_flops_saved: float  # by one choice of options that is allowed and fits, made with knowledge of the future
    infinite_flops_saved: float  # if everything is kept
    token_hit_rate: float  # of a policy that only cares for tokens
    infinite_token_hit_rate: float
    iterations: int

    @property
    def gap(self) -> float:
        """The best saving is known up to this."""
        return self.flops_saved - self.reached_flops_saved


@dataclass(frozen=True, slots=True)
class Visits:
    """Where the requests of a trace could resume, and which request passed there last.

    The pages that a prompt shares with earlier requests form runs with the same last visitor, who came the longer ago
    the deeper the run is. Deeper in a run each page saves at least as much as the one before, at the same rent, so a
    request resumes at the end of a run or not at all. There are far fewer runs than pages.

    request, previous, depth [runs]   by request, then by depth; `depth` counts the pages up to the end of the run
    prompt_tokens [requests]
    """

    page_tokens: int
    prompt_tokens: Ints
    request: Ints
    previous: Ints
    depth: Ints

    @staticmethod
    def of(trace: Trace) -> "Visits":
        last = np.full(1 + max((int(r.pages.max(initial=-1)) for r in trace.requests), default=-1), -1, np.int64)
        request, previous, depth = [], [], []
        for now, r in enumerate(trace.requests):
            seen = last[r.pages[: max(0, r.num_prompt_tokens - 1) // trace.page_tokens]]
            seen = seen[seen >= 0]
            last[r.pages] = now
            ends = np.flatnonzero(np.diff(seen, append=-1)) + 1
            request.append(np.full(len(ends), now))
            previous.append(seen[ends - 1])
            depth.append(ends)
        empty = [np.empty(0, np.int64)]
        return Visits(
            trace.page_tokens,
            np.array([r.num_prompt_tokens for r in trace.requests], np.int64),
            np.concatenate(request or empty),
            np.concatenate(previous or empty),
            np.concatenate(depth or empty),
        )

    def no_deeper_than(self, limit: int) -> "Visits":
        """The same with all runs cut off at a depth."""
        depth = np.minimum(self.depth, limit)
        new = depth > _before(self.request, depth)
        return Visits(self.page_tokens, self.prompt_tokens, self.request[new], self.previous[new], depth[new])

    def infinite(self, cost: PrefillCost) -> float:
        """The share of all prefill that is saved if everything is kept."""
        deepest = _is_last(self.request)
        saved = _flops(cost, self.depth[deepest] * self.page_tokens).sum()
        return float(saved / _total(cost, self))


@dataclass(frozen=True, slots=True)
class Market:
    """Requests that pay rent for what they resume from. Room is counted in capacities, benefit in all prefill.

    An option is one run of one request: to resume at its end.

    first [requests with options]              its first option
    owner [options]                            which of those requests
    request, previous, depth, benefit [options]
    run_room [options]                         taken by the pages of only this run
    state_room                                 taken by any state
    """

    num_gaps: int
    first: Ints
    owner: Ints
    request: Ints
    previous: Ints
    depth: Ints
    benefit: Floats
    run_room: Floats
    state_room: float

    @staticmethod
    def of(visits: Visits, cost: PrefillCost, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> "Market":
        """Without the options that do not fit even by themselves."""
        assert cost.per_token_per_position >= 0, "inner depths of a run would matter"
        v, capacity = visits.no_deeper_than(_deepest(page_bytes, slot_bytes, capacity_bytes)), max(1, capacity_bytes)
        new_pages = (v.depth - _before(v.request, v.depth)).astype(np.float64)
        is_first = np.diff(v.request, prepend=-1) > 0
        return Market(
            num_gaps=max(0, len(v.prompt_tokens) - 1),
            first=np.flatnonzero(is_first),
            owner=np.cumsum(is_first) - 1,
            request=v.request,
            previous=v.previous,
            depth=v.depth,
            benefit=_flops(cost, v.depth * v.page_tokens) / _total(cost, v),
            run_room=new_pages * (page_bytes / capacity),
            state_room=slot_bytes / capacity,
        )

    def worth(self, prices: Floats) -> Floats:
        """[options] Benefit less rent."""
        total = np.concatenate(([0.0], np.cumsum(prices)))
        rent = total[self.request] - total[self.previous]
        pages = np.cumsum(self.run_room * rent)
        above = np.concatenate(([0.0], pages))[self.first]
        worth: Floats = self.benefit - (pages - above[self.owner]) - self.state_room * rent
        return worth

    def saved_at_most(self, prices: Floats) -> float:
        """A bound, for any prices that are not negative."""
        return float(prices.sum() + np.maximum(self._best(self.worth(prices)), 0.0).sum())

    def demand(self, chosen: Floats) -> Floats:
        """[gaps] The room taken if each option is chosen to this share, 0 to 1."""
        deeper = np.cumsum(chosen[::-1])[::-1]
        beyond = np.append(deeper, 0.0)[np.append(self.first[1:], len(chosen))]
        room = (deeper - beyond[self.owner]) * self.run_room + chosen * self.state_room
        size = self.num_gaps + 1
        change = np.bincount(self.previous, room, size) - np.bincount(self.request, room, size)
        demand: Floats = np.cumsum(change)[:-1]
        return demand

    def clear(self, iterations: int) -> Floats:
        """[gaps] Prices at which what is wanted about fills the room: the best that Adam finds in their logarithms.

        Choices are soft at first and harden: hard ones jump with the prices, which makes the search oscillate.
        """
        deepest = _is_last(self.request)
        if self.demand(deepest.astype(np.float64)).max(initial=0.0) <= 1.0:
            return np.zeros(self.num_gaps)
        benefit = self.benefit[deepest]
        rent = benefit - self.worth(np.ones(self.num_gaps))[deepest]
        log_prices = np.full(self.num_gaps, np.log(benefit.sum() / rent.sum()))
        best: Floats = np.exp(log_prices)
        lowest, mean, square = np.inf, np.zeros(self.num_gaps), np.zeros(self.num_gaps)
        for i in range(iterations):
            prices, done = np.exp(log_prices), i / iterations
            worth = self.worth(prices)
            surplus = np.maximum(self._best(worth), 0.0)
            value = prices.sum() + surplus.sum()
            if value < lowest:
                best, lowest = prices, value
            chosen = self._choose(worth, surplus, benefit.mean() * SOFTEST * (HARDEST / SOFTEST) ** done)
            slope = prices * (1.0 - self.demand(chosen))
            mean, square = 0.9 * mean + 0.1 * slope, 0.9 * square + 0.1 * slope**2
            log_prices = log_prices - STEP * (1 - done) * mean / (np.sqrt(square * (1 - 0.9 ** (i + 1))) + 1e-300)
        return best

    def saved_at_least(self, prices: Floats) -> float:
        """What is saved if requests take their options one by one, the most worthy first, while there is room."""
        worth = self.worth(prices)
        favourite = worth == self._best(worth)[self.owner]
        free, saved = np.ones(self.num_gaps), 0.0
        resumed = np.zeros(self.num_gaps + 1, np.int64)
        deepest = np.full(self.num_gaps + 1, NO_LIMIT)  # where a request may resume without taking back a state
        for option in np.lexsort((-worth, ~favourite)):
            request, depth = self.request[option], self.depth[option]
            if resumed[request] or depth > deepest[request]:
                continue
            source = self._source(option, resumed) if self.state_room else self.previous[option]
            room = np.full(request - source, self.state_room)
            for run in range(self.first[self.owner[option]], option + 1):
                room[self.previous[run] - source :] += self.run_room[run]
            if np.all(room <= free[source:request] + ROUNDING):
                free[source:request] -= room
                saved += self.benefit[option]
                resumed[request] = depth
                if self.state_room:
                    deepest[source] = min(deepest[source], depth)
        return float(saved)

    def _source(self, option: int, resumed: Ints) -> int:
        """The last request that left the state of an option: it did not resume any deeper."""
        depth, source = self.depth[option], int(self.previous[option])
        while resumed[source] > depth:
            run = int(np.searchsorted(self.request, source))
            while self.depth[run] < depth:
                run += 1
            source = int(self.previous[run])
        return source

    def _best(self, worth: Floats) -> Floats:
        """[requests with options] That of the best option."""
        best: Floats = np.maximum.reduceat(worth, self.first) if len(worth) else worth
        return best

    def _choose(self, worth: Floats, surplus: Floats, softness: float) -> Floats:
        """[options] A share for each, nearly all for the best if `softness` is small compared with the differences."""
        weight = np.exp((worth - surplus[self.owner]) / softness)
        weights = np.exp(-surplus / softness) + np.add.reduceat(weight, self.first)
        chosen: Floats = weight / weights[self.owner]
        return chosen


def bound(
    trace: Trace,
    cost: PrefillCost,
    page_bytes: int,
    slot_bytes: int,
    capacity_bytes: int,
    *,
    iterations: int = 400,
    visits: Visits | None = None,
) -> Bound:
    """What no policy can beat on this trace. `visits` are the trace's own, for callers that ask more than once.

    A page may be read where all before it are kept too. With `slot_bytes` 0 any depth with pages can be resumed.
    """
    visits = visits or Visits.of(trace)

    def market(cost: PrefillCost) -> Market:
        return Market.of(visits, cost, page_bytes, slot_bytes, capacity_bytes)

    flops, tokens = market(cost), market(TOKENS)
    prices = flops.clear(iterations)
    infinite, infinite_tokens = visits.infinite(cost), visits.infinite(TOKENS)
    return Bound(
        flops_saved=min(infinite, flops.saved_at_most(prices)),
        reached_flops_saved=flops.saved_at_least(prices),
        infinite_flops_saved=infinite,
        token_hit_rate=min(infinite_tokens, tokens.saved_at_most(tokens.clear(iterations))),
        infinite_token_hit_rate=infinite_tokens,
        iterations=iterations,
    )


def _deepest(page_bytes: int, slot_bytes: int, capacity_bytes: int) -> int:
    """Pages that fit together with a state."""
    if slot_bytes > capacity_bytes:
        return 0
    return (capacity_bytes - slot_bytes) // page_bytes if page_bytes else NO_LIMIT


def _flops(cost: PrefillCost, tokens: Ints) -> Floats:
    """`cost.flops(0, tokens)` of many."""
    return np.array([cost.flops(0, n) for n in tokens.tolist()], np.float64)


def _total(cost: PrefillCost, visits: Visits) -> float:
    return float(_flops(cost, visits.prompt_tokens).sum()) or 1.0


def _is_last(request: Ints) -> NDArray[np.bool_]:
    """Whether a run is the deepest of its request."""
    last: NDArray[np.bool_] = np.diff(request, append=-1) != 0
    return last


def _before(request: Ints, depth: Ints) -> Ints:
    """The depth at which each run starts."""
    same = np.diff(request, prepend=-1) == 0
    return np.where(same, np.concatenate(([0], depth[:-1])), 0)
