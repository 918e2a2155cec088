"""What somebody counts on: where a claim lies, what is spared for it, and when that goes all the same."""

import math

import pytest

from hybrid_cache.cache.claims import Claim
from hybrid_cache.cache.eviction import FIRST_SPARED_S, MOST_SPARED_S, EvictionQueues
from hybrid_cache.cache.policies.base import Worth
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.pool import MOST_ASKED
from hybrid_cache.cache.tree import CheckpointKind, Node
from hybrid_cache.kernels.grid import TILE
from tests.cache.at_once import HybridCache
from tests.cache.driver import SPECS, Clock, begin, fill, forward, new_cache, reserve, tokens_of

HYBRID, ATTENTION = SPECS["slot of four pages"], SPECS["only attention"]


def node_at(cache: HybridCache, pages: str) -> Node:
    """The last node of these pages, which are all there."""
    path = cache.match("", tokens_of(pages, 1)).path
    assert len(path) == len(pages)
    return path[-1]


def claim_on(cache: HybridCache, pages: str) -> Claim:
    claim = Claim()
    cache.claims.place(claim, node_at(cache, pages), len(pages) * TILE)
    return claim


def evict_state(cache: HybridCache, pages: str) -> None:
    state = node_at(cache, pages).checkpoint
    assert state is not None
    cache.pool.evict(state)
    cache.check()


def length_of(cache: HybridCache, pages: str) -> int:
    return cache.match("", tokens_of(pages, 1)).length


def spares(_: Claim) -> bool:
    return True


def test_a_claim_falls_back_to_the_state_above_when_its_own_goes() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("abcd", 1), TILE, 3 * TILE)
    fill(cache, tokens_of("abcx", 1), 4 * TILE)  # its pages stay when the others' state has gone
    claim = claim_on(cache, "abc")
    assert (claim.num_resumed, claim.num_tokens) == (3 * TILE, 3 * TILE)
    evict_state(cache, "abc")
    assert (claim.num_resumed, claim.num_tokens) == (TILE, 3 * TILE)
    evict_state(cache, "a")
    assert (claim.num_resumed, claim.num_tokens) == (0, 3 * TILE)


def test_a_claim_lies_on_the_last_state_of_what_is_there() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("abcd", 1), TILE, 4 * TILE)
    claim = claim_on(cache, "abc")
    assert claim.num_resumed == TILE
    assert list(cache.claims.on(node_at(cache, "a").checkpoint)) == [claim]  # type: ignore[arg-type]


def test_a_claim_that_is_dropped_lies_nowhere() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("ab", 1), 2 * TILE)
    first, second = claim_on(cache, "ab"), claim_on(cache, "ab")
    cache.claims.drop(first)
    cache.claims.drop(first)
    state = node_at(cache, "ab").checkpoint
    assert state is not None
    assert list(cache.claims.on(state)) == [second]
    cache.claims.drop(second)
    assert list(cache.claims.on(state)) == []
    assert first.at is second.at is None
    cache.check()


def test_without_states_a_claim_lies_on_the_last_page_that_is_left() -> None:
    cache = new_cache(ATTENTION, pages=12)
    fill(cache, tokens_of("abc"))
    claim = claim_on(cache, "abc")
    for num_left in (2, 1, 0):
        cache.pool.evict_page(node_at(cache, "abc"[: num_left + 1]))
        assert claim.num_resumed == num_left * TILE
        cache.check()


def test_pages_that_are_counted_on_stay_and_later_ones_go() -> None:
    clock = Clock()
    cache = new_cache(ATTENTION, pages=8, clock=clock)
    for letter in "ab":
        clock.now += 1
        fill(cache, tokens_of(letter * 3))
    claim_on(cache, "aaa")
    lease = cache.acquire(cache.match("", tokens_of("xyz")), tokens_of("xyz"), spare=spares)
    assert lease is not None
    cache.check()
    assert length_of(cache, "aaa") == 3 * TILE
    assert length_of(cache, "bbb") < 3 * TILE


def test_a_guaranteed_state_that_is_counted_on_does_not_go_for_a_newcomer() -> None:
    cache = new_cache(HYBRID, slots=2, pages=4, policy=LRU())
    run = begin(cache, tokens_of("a", 1))
    assert reserve(cache, run, TILE, CheckpointKind.EXPLICIT, ttl_s=60)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    claim = claim_on(cache, "a")
    match = cache.match("", tokens_of("wxyzvu"))
    assert cache.acquire(match, tokens_of("wxyzvu"), spare=spares) is None
    assert length_of(cache, "a") == TILE
    cache.claims.drop(claim)
    assert cache.acquire(match, tokens_of("wxyzvu"), spare=spares) is not None
    cache.check()


def test_what_was_passed_over_makes_room_for_a_candidate_once_nobody_counts_on_it() -> None:
    clock = Clock()
    cache = new_cache(HYBRID, slots=2, pages=4, policy=LRU(), clock=clock)
    for letter in "ab":
        fill(cache, tokens_of(letter, 1), TILE)
    claims = [claim_on(cache, letter) for letter in "ab"]
    assert cache.pool.take(num_slots=3, ceiling=math.inf, spare=spares) is None
    for claim in claims:
        cache.claims.drop(claim)
    clock.now += 2 * MOST_SPARED_S
    assert cache.pool.take(num_slots=3, ceiling=math.inf, spare=spares) is not None


def test_no_more_claims_are_asked_about_for_one_request_than_there_is_time_for() -> None:
    cache = new_cache(ATTENTION, pages=3 * MOST_ASKED)
    for number in range(3 * MOST_ASKED):
        cache_tokens = tokens_of(chr(100 + number))
        fill(cache, cache_tokens)
        claim_on(cache, chr(100 + number))
    asked = []

    def counts(claim: Claim) -> bool:
        asked.append(claim)
        return True

    assert cache.acquire(cache.match("", tokens_of("ab")), tokens_of("ab"), spare=counts) is None
    assert len(asked) == MOST_ASKED
    assert cache.acquire(cache.match("", tokens_of("ab")), tokens_of("ab")) is not None, "others run: they need room"
    cache.check()


def test_the_state_that_a_newcomer_starts_from_is_not_given_up_for_it_while_others_run() -> None:
    cache = new_cache(HYBRID, slots=2, pages=4, policy=LRU())
    fill(cache, tokens_of("ab", 1), 2 * TILE)
    claim_on(cache, "ab")
    prompt = tokens_of("abcdefg")
    assert cache.fits(len(prompt))
    before = cache.stats().evictions
    assert cache.acquire(cache.match("", prompt), prompt, spare=spares, keeps_end=True) is None
    assert cache.stats().evictions == before
    assert length_of(cache, "ab") == 2 * TILE
    cache.check()


def test_nothing_that_is_spared_goes_for_a_newcomer_that_takes_over_a_state() -> None:
    cache = new_cache(HYBRID, slots=3, pages=4, policy=LRU())
    fill(cache, tokens_of("ab", 1), 2 * TILE)
    fill(cache, tokens_of("x", 1), TILE)
    claim_on(cache, "x")
    busy = begin(cache, tokens_of("", 1))
    prompt = tokens_of("ab", 5)
    assert cache.acquire(cache.match("", prompt), prompt, spare=spares) is None
    assert (length_of(cache, "x"), length_of(cache, "ab")) == (TILE, 2 * TILE)
    assert cache.acquire(cache.match("", prompt), prompt) is not None
    assert (length_of(cache, "x"), length_of(cache, "ab")) == (0, 2 * TILE)
    cache.release(busy.lease)
    cache.check()


def test_a_turn_that_returns_to_what_it_starts_from_leaves_it_there_or_waits() -> None:
    cache = new_cache(HYBRID, slots=2, pages=4, policy=LRU())
    fill(cache, tokens_of("ab", 1), 2 * TILE)
    busy = begin(cache, tokens_of("", 1))
    prompt = tokens_of("ab", 5)
    assert cache.acquire(cache.match("", prompt), prompt, keeps_end=True, spare=spares) is None
    assert length_of(cache, "ab") == 2 * TILE
    lease = cache.acquire(cache.match("", prompt), prompt, spare=spares)
    assert lease is not None, "one that does not takes the state itself"
    assert length_of(cache, "ab") == 0
    cache.release(lease)
    cache.release(busy.lease)
    cache.check()


def test_no_room_is_taken_for_a_state_that_is_there() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("abc", 1), TILE, 3 * TILE, end=True)
    prompt = tokens_of("abc")  # the last token is to be computed: it starts from the first page's state
    match = cache.match("", prompt)
    assert match.length < 3 * TILE
    lease = cache.acquire(match, prompt, keeps_end=True)
    assert lease is not None
    assert lease.reserved == []
    cache.release(lease)
    other = tokens_of("abx", 1)
    lease = cache.acquire(cache.match("", other), other, keeps_end=True)
    assert lease is not None
    assert [r.position for r in lease.reserved] == [3 * TILE]
    cache.release(lease)
    cache.check()


def queues_of(clock: Clock) -> EvictionQueues:
    policy = LRU()
    policy.open(lambda kept: Worth(1.0, 1), clock)
    return EvictionQueues(policy, clock)


def test_what_is_spared_is_asked_about_again_after_a_time_that_doubles() -> None:
    clock = Clock()
    queues, page = queues_of(clock), Node("", None, b"", TILE, 0, 0.0)
    queues.add_dead(page)
    for times in (1, 2, 4):
        queues.spare(page)
        queues.check({page}, set())
        assert queues.next_dead() is None
        clock.now += times * FIRST_SPARED_S - 0.01
        assert queues.spared(due=True) is None
        clock.now += 0.02
        assert queues.spared(due=True) is page
    queues.expose(page)
    assert queues.next_dead() is page
    queues.spare(page)
    clock.now += FIRST_SPARED_S
    assert queues.spared(due=True) is page, "the first time in a row again"


@pytest.mark.parametrize("times", [1, 3])
def test_a_page_that_was_spared_and_is_used_is_in_no_queue(times: int) -> None:
    queues, page = queues_of(Clock()), Node("", None, b"", TILE, 0, 0.0)
    queues.add_dead(page)
    for _ in range(times):
        queues.spare(page)
        queues.add_dead(page)
        queues.check({page}, set())
    queues.withdraw_dead(page)
    assert queues.spared(due=False) is None
    queues.check(set(), set())
