"""How much of all prefill any cache could save in a number of bytes, even one that knows the future.

Requests run one after the other, so time is a line of slots, two for each, with this much room for what is kept:

    slot 2r      while r runs        capacity - pages of its whole prompt - its working state
    slot 2r + 1  until the next one  capacity

A request that resumes at depth d needs d pages and the state behind the last of them. Each must have been kept ever
since the last earlier request that passed it:

    visitor p runs   gap   others run, gaps   r runs
    2p               2p+1  ...                2r
    [state . . . . . . . . . . . . . . . . .)           a checkpoint beside p's working state; r may make it its own
                     [page . . . . . . . . .)           while p and r run it is among their own

and serves nobody else meanwhile: no request between p and r passes it, so it is not among what they hold themselves.
Let all of a slot's capacity cost `prices[slot]`, and let every request resume where benefit less rent is largest.
Then, whatever the prices are (Lagrangian duality),

    best saving  <=  sum of prices * room  +  sum over requests of max(0, max over depths of benefit - rent)

because a choice that fits pays at most prices * room in rent. The search for good prices only makes the bound lower; it
can never make it wrong.

A request that does not fit even by itself is computed without the cache. It saves, leaves and displaces nothing.

The bound grants a policy three things that it does not have: a request may resume half for half the room; a visitor
leaves all its states, also those above the depth at which it resumed itself; and a generated answer takes no room while
it is computed again to leave states.
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
    prompt_tokens [requests]   of all requests, whether they pass or not
    """

    page_tokens: int
    prompt_tokens: Ints
    request: Ints
    previous: Ints
    depth: Ints

    @property
    def prompt_pages(self) -> Ints:
        """[requests] The partial last one included."""
        return -(-self.prompt_tokens // self.page_tokens)

    @staticmethod
    def of(trace: Trace, most: float = np.inf) -> "Visits":
        """Of the requests whose prompts take at most so many pages; the others pass nowhere."""
        last = np.full(1 + max((int(r.all_pages.max(initial=-1)) for r in trace.requests), default=-1), -1, np.int64)
        request, previous, depth = [], [], []
        for now, r in enumerate(trace.requests):
            if -(-r.num_prompt_tokens // trace.page_tokens) > most:
                continue
            seen = last[r.pages[: max(0, r.num_prompt_tokens - 1) // trace.page_tokens]]
            seen = seen[seen >= 0]
            last[r.all_pages] = now
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

    def no_deeper_than(self, limits: Ints) -> "Visits":
        """The same with each run cut off at its limit, and at those of the runs before it."""
        deepest = int(self.depth.max(initial=0))
        owner = np.cumsum(np.diff(self.request, prepend=-1) > 0) * (deepest + 1)
        limits = np.minimum.accumulate(np.clip(limits, 0, deepest) - owner) + owner  # within each request
        depth = np.minimum(self.depth, limits)
        new = depth > _before(self.request, self.depth)
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

    room [slots]                              free for what is kept

    first [requests with options]              its first option
    owner [options]                            which of those requests
    request, previous, depth, benefit [options]
    run_room [options]                         taken by the pages of only this run
    state_room                                 taken by any state
    """

    room: Floats
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
        """Without the options that do not fit even by themselves. `visits` are of the requests that do."""
        assert cost.per_token_per_position >= 0, "inner depths of a run would matter"
        room = _room(visits, page_bytes, slot_bytes, capacity_bytes)
        v = visits.no_deeper_than(_limits(visits, room, page_bytes, slot_bytes))
        capacity = max(1, capacity_bytes)
        new_pages = (v.depth - _before(v.request, v.depth)).astype(np.float64)
        is_first = np.diff(v.request, prepend=-1) > 0
        return Market(
            room=room / capacity,
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
        until = np.concatenate(([0.0], np.cumsum(prices)))
        end = until[2 * self.request]
        pages = np.cumsum(self.run_room * (end - until[2 * self.previous + 1]))
        above = np.concatenate(([0.0], pages))[self.first]
        state = self.state_room * (end - until[2 * self.previous])
        worth: Floats = self.benefit - (pages - above[self.owner]) - state
        return worth

    def saved_at_most(self, prices: Floats) -> float:
        """A bound, for any prices that are not negative."""
        return float((prices * self.room).sum() + np.maximum(self._best(self.worth(prices)), 0.0).sum())

    def demand(self, chosen: Floats) -> Floats:
        """[slots] The room taken if each option is chosen to this share, 0 to 1."""
        deeper = np.cumsum(chosen[::-1])[::-1]
        beyond = np.append(deeper, 0.0)[np.append(self.first[1:], len(chosen))]
        pages, states = (deeper - beyond[self.owner]) * self.run_room, chosen * self.state_room
        size = len(self.room)
        begin = np.bincount(2 * self.previous + 1, pages, size) + np.bincount(2 * self.previous, states, size)
        demand: Floats = np.cumsum(begin - np.bincount(2 * self.request, pages + states, size))
        return demand

    def clear(self, iterations: int) -> Floats:
        """[slots] Prices at which what is wanted about fills the room: the best that Adam finds in their logarithms.

        Choices are soft at first and harden: hard ones jump with the prices, which makes the search oscillate.
        """
        deepest, num_slots = _is_last(self.request), len(self.room)
        if np.all(self.demand(deepest.astype(np.float64)) <= self.room + ROUNDING):
            return np.zeros(num_slots)
        benefit = self.benefit[deepest]
        rent = benefit - self.worth(np.ones(num_slots))[deepest]
        log_prices = np.full(num_slots, np.log(benefit.sum() / rent.sum()))
        best: Floats = np.exp(log_prices)
        lowest, mean, square = np.inf, np.zeros(num_slots), np.zeros(num_slots)
        for i in range(iterations):
            prices, done = np.exp(log_prices), i / iterations
            worth = self.worth(prices)
            surplus = np.maximum(self._best(worth), 0.0)
            value = (prices * self.room).sum() + surplus.sum()
            if value < lowest:
                best, lowest = prices, value
            chosen = self._choose(worth, surplus, benefit.mean() * SOFTEST * (HARDEST / SOFTEST) ** done)
            slope = prices * (self.room - self.demand(chosen))
            mean, square = 0.9 * mean + 0.1 * slope, 0.9 * square + 0.1 * slope**2
            log_prices = log_prices - STEP * (1 - done) * mean / (np.sqrt(square * (1 - 0.9 ** (i + 1))) + 1e-300)
        return best

    def saved_at_least(self, prices: Floats) -> float:
        """What is saved if requests take their options one by one, the most worthy first, while there is room."""
        worth = self.worth(prices)
        favourite = worth == self._best(worth)[self.owner]
        free, saved = self.room + ROUNDING, 0.0
        resumed = np.zeros(len(self.room) // 2, np.int64)
        deepest = np.full(len(resumed), NO_LIMIT)  # where a request may resume without taking back a state
        for option in np.lexsort((-worth, ~favourite)):
            request, depth = self.request[option], self.depth[option]
            if resumed[request] or depth > deepest[request]:
                continue
            source = self._source(option, resumed) if self.state_room else self.previous[option]
            span = free[2 * source : 2 * request]
            room = np.full(len(span), self.state_room)
            for run in range(self.first[self.owner[option]], option + 1):
                room[2 * (self.previous[run] - source) + 1 :] += self.run_room[run]
            if np.all(room <= span):
                span -= room
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
    most = most_pages(page_bytes, slot_bytes, capacity_bytes)
    running = visits if visits.prompt_pages.max(initial=0) <= most else Visits.of(trace, most)

    def market(cost: PrefillCost) -> Market:
        return Market.of(running, cost, page_bytes, slot_bytes, capacity_bytes)

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


def most_pages(page_bytes: int, slot_bytes: int, capacity_bytes: int) -> float:
    """Pages of a prompt that fits by itself; -1 if there is not even room for a working state."""
    if slot_bytes > capacity_bytes:
        return -1
    return (capacity_bytes - slot_bytes) // page_bytes if page_bytes else np.inf


def _room(visits: Visits, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> Ints:
    """[slots] Bytes for what is kept. A request that does not fit by itself takes none."""
    pages = visits.prompt_pages
    fits = pages <= most_pages(page_bytes, slot_bytes, capacity_bytes)
    room = np.full(2 * len(pages), capacity_bytes, np.int64)
    room[::2] -= np.where(fits, pages * page_bytes + slot_bytes, 0)
    return room


def _limits(visits: Visits, room: Ints, page_bytes: int, slot_bytes: int) -> Ints:
    """[runs] How deep a request may resume if what it needs of this run, or of deeper ones, has to be kept.

    While another request runs that is older than the last visitor of the run above, but not than that of this run, all
    pages from the start of this run on have to fit beside it, and the state; while the run's own last visitor runs, the
    state.
    """
    v, during = visits, room[::2]
    start = _before(v.request, v.depth)
    newer = np.where(start > 0, np.concatenate(([0], v.previous[:-1])), v.request - 1)
    spare = _least(during, v.previous + 1, newer + 1) - slot_bytes
    deepest = int(v.depth.max(initial=0))
    pages = np.minimum(spare // page_bytes, deepest) if page_bytes else np.where(spare < 0, -1, deepest)
    return np.where(during[v.previous] < slot_bytes, 0, start + pages)


def _least(values: Ints, begin: Ints, end: Ints) -> Ints:
    """The least of `values[begin:end]` for many, no matter how long; the largest integer where that is empty."""
    size, least = end - begin, np.full(len(begin), NO_LIMIT)
    level, length = values, 1  # the least of each `length` values in a row
    while length <= size.max(initial=0):
        here = (size >= length) & (size < 2 * length)
        least[here] = np.minimum(level[begin[here]], level[end[here] - length])
        level, length = np.minimum(level[:-length], level[length:]), 2 * length
    return least


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
