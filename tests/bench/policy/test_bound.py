import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hybrid_cache.bench.policy.bound import Bound, Market, Visits, bound, most_pages
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.spec import PrefillCost
from tests.bench.policy.optimum import PAGE_TOKENS, Item, beside, best_saving, depths, request, room_beside, trace

COST = PrefillCost(per_token=100.0, per_token_per_position=1.0)
ROUNDING = 1e-9


def all_prefill(t: Trace, cost: PrefillCost = COST) -> float:
    return sum(cost.flops(0, r.num_prompt_tokens) for r in t.requests)


def saving(pages: int) -> float:
    return COST.flops(0, pages * PAGE_TOKENS)


def bound_in_flops(t: Trace, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> float:
    return bound(t, COST, page_bytes, slot_bytes, capacity_bytes).flops_saved * all_prefill(t)


def tiny_trace(rng: random.Random, num_requests: int = 6, branches: int = 2, max_depth: int = 4) -> Trace:
    """Walks down a small tree, often along an earlier request; some end on a page, some know what they generate."""
    names: dict[tuple[int, ...], int] = {}
    paths: list[tuple[int, ...]] = [()]
    requests = []
    for _ in range(num_requests):
        start = rng.choice(paths)
        path = start[: rng.randint(0, len(start))]
        depth = rng.randint(1, max_depth)
        while len(path) < depth:
            path += (rng.randrange(branches),)
        paths.append(path)
        pages = tuple(names.setdefault(path[: i + 1], len(names)) for i in range(len(path)))
        num_generated = rng.choice((0, 0, 1)) if len(pages) > 1 else 0
        prompt, generated = pages[: len(pages) - num_generated], pages[len(pages) - num_generated :]
        requests.append(request(*prompt, extra=rng.choice((0, 1, 15)), generated=generated))
    return trace(*requests)


def tiny_sizes(rng: random.Random) -> tuple[int, int, int]:
    """Bytes of a page, of a state, of the cache."""
    page_bytes, slot_bytes = rng.choice(((1, 0), (1, 1), (1, 2), (2, 1), (1, 3), (0, 1)))
    return page_bytes, slot_bytes, rng.randint(0, 14)


def lru_saving(t: Trace, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> float:
    """Keeps what was used last."""
    size = {"page": page_bytes, "state": slot_bytes}
    used: dict[Item, int] = {}
    saved = 0.0

    def evict(room: int) -> None:
        while sum(size[kind] for kind, _ in used) > room:
            del used[min(used, key=lambda item: (used[item], item))]

    for now, r in enumerate(t.requests):
        room = room_beside(r, page_bytes, slot_bytes, capacity_bytes)
        if room < 0:
            continue
        kept = frozenset(used)
        depth = max(depths(r, kept, slot_bytes))
        saved += saving(depth)
        passed = {int(page) for page in r.pages}
        used = {item: now if item[1] in passed else used[item] for item in beside(r, kept, depth)}
        evict(room)
        used |= {("page", page): now for page in passed}
        evict(capacity_bytes)
    return saved


# By hand


def test_without_reuse_nothing_is_saved() -> None:
    t = trace(request(1, 2), request(3), request(4, 5))
    assert bound(t, COST, 1, 1, 100) == Bound(0.0, 0.0, 0.0, 0.0, 0.0, 400)


@pytest.mark.parametrize("t", [trace(), trace(request(1, 2)), trace(request(extra=5), request(extra=5))])
def test_a_trace_too_short_to_share_anything_has_a_bound_of_zero(t: Trace) -> None:
    assert bound(t, COST, 1, 1, 100).flops_saved == 0.0


def test_a_request_needs_room_for_its_prompt_its_working_state_and_the_state_it_leaves() -> None:
    t = trace(request(1, 2, 3), request(1, 2, 4))
    assert bound_in_flops(t, 10, 7, 40 + 7 + 7) == pytest.approx(saving(2))
    assert bound_in_flops(t, 10, 7, 40 + 7 + 6) == 0.0, "no state is left"
    assert bound_in_flops(t, 10, 7, 40 + 6) == 0.0, "it does not run in the cache"


def test_what_is_kept_has_to_fit_beside_a_request_that_runs_meanwhile() -> None:
    t = trace(request(1, 2), request(3), request(1, 2))
    running, state = 20 + 7, 7
    assert bound_in_flops(t, 10, 7, running + 20 + state) == pytest.approx(saving(2))
    assert bound_in_flops(t, 10, 7, running + 19 + state) == pytest.approx(saving(1)), "a page and a state do"
    assert bound_in_flops(t, 10, 7, running + 9 + state) == 0.0


def test_a_state_kept_at_the_start_of_a_request_may_become_its_own() -> None:
    t = trace(request(1), request(1, 2, 3))
    assert bound_in_flops(t, 10, 7, 40 + 7) == pytest.approx(saving(1))


def test_a_request_that_does_not_fit_leaves_everything_as_it_was() -> None:
    t = trace(request(1, 2), request(1, 2, 3, 4, 5, 6), request(1, 2))
    assert best_saving(t, COST, 10, 7, 50) == saving(2)
    assert bound_in_flops(t, 10, 7, 50) == pytest.approx(saving(2))
    assert bound_in_flops(t, 10, 7, 43) == 0.0


def test_states_that_cost_nothing_leave_the_room_to_pages() -> None:
    t = trace(request(1, 2, 3), request(4), request(1, 2, 3))
    assert bound_in_flops(t, 10, 0, 20 + 30) == pytest.approx(saving(3))
    assert bound_in_flops(t, 10, 0, 20 + 29) == pytest.approx(saving(2))


def test_pages_that_cost_nothing_leave_the_room_to_states() -> None:
    t = trace(request(1, 2, 3), request(1, 2, 3))
    assert bound_in_flops(t, 0, 10, 20) == pytest.approx(saving(3))
    assert bound_in_flops(t, 0, 10, 19) == 0.0


def test_of_two_that_overlap_in_time_one_pays() -> None:
    # room for others while they run      2  2  2  2
    # taken for the third, the fourth     1  2
    #                                        1  2
    t = trace(request(1), request(2), request(1), request(2))
    assert best_saving(t, COST, 1, 1, 5) == saving(1)
    assert bound_in_flops(t, 1, 1, 5) == pytest.approx(1.5 * saving(1), rel=1e-3), "the bound grants half of the third"
    assert bound_in_flops(t, 1, 1, 6) == pytest.approx(2 * saving(1))


def test_two_that_follow_each_other_share_the_room() -> None:
    t = trace(request(1), request(1), request(2), request(2))
    assert bound_in_flops(t, 1, 1, 4) == pytest.approx(2 * saving(1))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    t = trace(request(1, 2, extra=0), request(1, 2, extra=0))
    assert bound_in_flops(t, 1, 1, 100) == pytest.approx(saving(1))


def test_generated_pages_can_be_kept_but_only_a_prompt_resumes_from_them() -> None:
    t = trace(request(1, generated=(2, 3)), request(1, generated=(2,)), request(1, 2, 3, 4))
    assert bound_in_flops(t, 1, 1, 100) == pytest.approx(saving(1) + saving(3))


def test_the_two_hit_rates_and_savings_are_shares() -> None:
    t = trace(request(1, 2, 3), request(1, 2, 4))
    b = bound(t, COST, 1, 1, 100)
    assert b.token_hit_rate == b.infinite_token_hit_rate == pytest.approx(32 / 98)
    assert b.flops_saved == b.infinite_flops_saved == pytest.approx(saving(2) / all_prefill(t))
    assert b.reached_flops_saved == pytest.approx(b.flops_saved)
    assert b.gap == pytest.approx(0.0)


def test_a_plan_keeps_a_state_over_a_request_that_resumes_below_it() -> None:
    # The second resumes at page 2 and passes no state at page 1: the third needs that of the first.
    t = trace(request(1, 2), request(1, 2), request(1, 3))
    assert best_saving(t, COST, 1, 1, 6) == saving(2) + saving(1)
    assert best_saving(t, COST, 1, 1, 5) == saving(2)
    assert bound(t, COST, 1, 1, 6).reached_flops_saved == pytest.approx((saving(2) + saving(1)) / all_prefill(t))
    assert bound(t, COST, 1, 1, 5).reached_flops_saved == pytest.approx(saving(2) / all_prefill(t))
    assert bound_in_flops(t, 1, 1, 5) == pytest.approx(saving(2) + saving(1)), "the bound grants a fresh state"


def test_visits_are_runs_of_pages_with_the_same_last_visitor() -> None:
    t = trace(request(1, 2, 3, 4), request(1, 2, 5), request(1, 2, 3, 4, 6))
    visits = Visits.of(t)
    assert visits.request.tolist() == [1, 2, 2]
    assert visits.previous.tolist() == [0, 1, 0]
    assert visits.depth.tolist() == [2, 2, 4]
    cut = visits.no_deeper_than(np.array([1, 3, 3]))
    assert (cut.request.tolist(), cut.depth.tolist()) == ([1, 2, 2], [1, 2, 3])
    cut = visits.no_deeper_than(np.array([9, 1, 9]))
    assert (cut.request.tolist(), cut.depth.tolist()) == ([1, 2], [2, 1]), "none is deeper than one above it may be"


def test_only_those_that_fit_are_visitors() -> None:
    t = trace(request(1, 2, extra=0), request(1, 2, 3), request(1, 2, extra=0))
    visits = Visits.of(t, most=3)
    assert (visits.request.tolist(), visits.previous.tolist()) == ([2], [0])


# Against all plans there are


@pytest.mark.parametrize("num_traces", [400, pytest.param(1_600, marks=pytest.mark.slow)])
def test_no_prices_give_less_than_the_best_plan(num_traces: int) -> None:
    rng, numbers = random.Random(1), np.random.default_rng(1)
    for _ in range(num_traces):
        t, sizes = tiny_trace(rng, rng.randint(3, 6)), tiny_sizes(rng)
        best = best_saving(t, COST, *sizes) / all_prefill(t)
        market = Market.of(Visits.of(t, most_pages(*sizes)), COST, *sizes)
        for scale in (0.0, 0.03, 0.3):
            prices = scale * numbers.random(len(market.room))
            assert market.saved_at_most(prices) >= best * (1 - ROUNDING), (t, sizes)
            assert market.saved_at_least(prices) <= best * (1 + ROUNDING), (t, sizes)


def test_the_best_plan_is_between_plan_and_bound() -> None:
    rng, gaps = random.Random(2), []
    for _ in range(400):
        t, sizes = tiny_trace(rng, rng.randint(3, 6)), tiny_sizes(rng)
        best = best_saving(t, COST, *sizes) / all_prefill(t)
        b = bound(t, COST, *sizes, iterations=40)
        assert b.reached_flops_saved * (1 - ROUNDING) <= best <= b.flops_saved * (1 + ROUNDING), (t, sizes)
        assert b.flops_saved <= b.infinite_flops_saved
        assert b.token_hit_rate <= b.infinite_token_hit_rate
        gaps.append(b.flops_saved - best)
    assert np.mean(np.array(gaps) < 1e-3) > 0.7, "most bounds are met"


def test_the_best_plan_for_tokens_is_below_the_bound_on_hits() -> None:
    rng, tokens = random.Random(3), PrefillCost(1.0, 0.0)
    for _ in range(200):
        t, sizes = tiny_trace(rng, rng.randint(3, 6)), tiny_sizes(rng)
        best = best_saving(t, tokens, *sizes) / all_prefill(t, tokens)
        assert best <= bound(t, COST, *sizes, iterations=20).token_hit_rate * (1 + ROUNDING), (t, sizes)


def test_with_room_for_everything_the_best_plan_saves_as_much_as_an_infinite_cache() -> None:
    rng = random.Random(6)
    for _ in range(200):
        t = tiny_trace(rng)
        best = best_saving(t, COST, 1, 1, 1_000) / all_prefill(t)
        assert best == pytest.approx(bound(t, COST, 1, 1, 1_000).infinite_flops_saved), t


def test_a_simple_policy_saves_no_more_than_the_best_plan() -> None:
    rng, ties = random.Random(4), 0
    for _ in range(250):
        t, sizes = tiny_trace(rng), tiny_sizes(rng)
        lru, best = lru_saving(t, *sizes), best_saving(t, COST, *sizes)
        assert lru <= best * (1 + ROUNDING), (t, sizes)
        ties += lru == best
    assert 0 < ties < 250


# On more than a few requests


@pytest.fixture(scope="module")
def conversations() -> Trace:
    """Forty conversations by turns over two system prompts."""
    rng, requests, num_pages = random.Random(5), [], 100
    histories = [list(range(10 * (i % 2), 10 * (i % 2) + 10)) for i in range(40)]
    for _ in range(400):
        history = histories[min(int(rng.expovariate(0.1)), 39)]
        num_new = rng.randint(1, 8)
        history += range(num_pages, num_pages + num_new)
        num_pages += num_new
        requests.append(request(*history, extra=rng.randrange(16)))
    return trace(*requests)


@pytest.mark.parametrize("slot_bytes", [0, 3, 40])
def test_more_room_never_lowers_the_bound(conversations: Trace, slot_bytes: int) -> None:
    visits = Visits.of(conversations)
    bounds = [bound(conversations, COST, 1, slot_bytes, 100 * 2**i, visits=visits) for i in range(8)]
    for less, more in pairwise(bounds):
        assert less.flops_saved <= more.flops_saved
        assert less.token_hit_rate <= more.token_hit_rate
    assert bounds[0].flops_saved < bounds[3].flops_saved < bounds[-1].flops_saved
    assert bounds[-1].flops_saved == pytest.approx(bounds[-1].infinite_flops_saved)


def test_the_bound_is_near_a_plan_that_fits(conversations: Trace) -> None:
    b = bound(conversations, COST, 1, 3, 800)
    assert b.reached_flops_saved < b.flops_saved < 0.97 * b.infinite_flops_saved
    assert b.gap < 0.02 * b.flops_saved


def test_more_iterations_do_not_raise_the_bound(conversations: Trace) -> None:
    bounds = [bound(conversations, COST, 1, 3, 800, iterations=n).flops_saved for n in (50, 200, 800)]
    assert bounds == sorted(bounds, reverse=True)


def test_only_the_share_of_the_capacity_counts(conversations: Trace) -> None:
    large = bound(conversations, COST, 1 << 20, 3 << 20, 800 << 20)
    assert large == bound(conversations, COST, 1, 3, 800)


def test_the_order_of_page_names_does_not_count(conversations: Trace) -> None:
    names = np.random.default_rng(0).permutation(10_000).astype(np.int32)
    renamed = tuple(replace(r, pages=names[r.pages]) for r in conversations.requests)
    other = replace(conversations, requests=renamed)
    assert bound(other, COST, 1, 3, 800, iterations=50) == bound(conversations, COST, 1, 3, 800, iterations=50)
