import numpy as np
import pytest

from hybrid_cache.cache.allocator import Units
from hybrid_cache.cache.eviction import EvictionQueues
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.policies.base import Policy, Worth, interior_positions
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.value import FlopsPerByte
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Node
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from tests.cache.at_once import HybridCache
from tests.cache.driver import (
    COST,
    SPECS,
    Clock,
    begin,
    fill,
    forward,
    keep_end,
    new_cache,
    reserve,
    start,
    tokens_of,
    verify,
)

HYBRID = SPECS["slot of four pages"]
MIXED = [name for name in SPECS if not name.startswith("only")]


def length_of(cache: HybridCache, pages: str, tail: int = 1) -> int:
    return cache.match("", tokens_of(pages, tail)).length


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_second_request_resumes_where_the_first_left_a_checkpoint(name: str) -> None:
    cache = new_cache(SPECS[name], slots=8, pages=16)
    fill(cache, tokens_of("abcd", 3), 2 * TILE)
    run = begin(cache, tokens_of("abcx", 5))
    assert run.lease.length == (3 * TILE if name == "only attention" else 2 * TILE)
    assert run.lease.shared == 3 * TILE
    verify(cache, run)
    forward(cache, run, len(run.tokens))
    verify(cache, run)
    cache.check()


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("tail", [0, 1, 63])
def test_an_exact_repeat_starts_from_the_prompt_end(name: str, tail: int) -> None:
    cache = new_cache(SPECS[name], slots=8, pages=16)
    tokens = tokens_of("ab", tail)
    fill(cache, tokens, end=True)
    run = begin(cache, tokens)
    assert run.lease.length == len(tokens)
    assert cache.hidden(run.lease).tolist() == [1.0, 2.0]
    verify(cache, run)
    assert cache.extend(run.lease, len(tokens) + 2)
    cache.check()


@pytest.mark.parametrize("tail", [5, 63])
def test_a_prompt_shorter_than_a_page_has_an_end_too(tail: int) -> None:
    cache = new_cache(HYBRID, slots=4, pages=4)
    fill(cache, tokens_of("", tail), end=True)
    run = begin(cache, tokens_of("", tail))
    assert run.lease.length == tail
    verify(cache, run)


def test_decoding_from_a_prompt_end_leaves_the_end_as_it_was() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    tokens = tokens_of("ab", 10)
    fill(cache, tokens, end=True)
    first = begin(cache, tokens)
    first.tokens = np.append(tokens, np.full(20, 99, np.int32))
    assert cache.extend(first.lease, len(first.tokens))
    forward(cache, first, len(first.tokens))
    second = begin(cache, tokens)
    verify(cache, first)
    verify(cache, second)


def test_a_match_leaves_one_token_to_compute() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("abc"), TILE, 2 * TILE, 3 * TILE)
    match = cache.match("", tokens_of("abc"))
    assert (match.length, match.shared) == (2 * TILE, 3 * TILE)
    assert length_of(cache, "abc", 1) == 3 * TILE


def test_nothing_matches_before_its_commit() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    run = begin(cache, tokens_of("abc", 1))
    reserve(cache, run, TILE, CheckpointKind.MESSAGE_END)
    forward(cache, run, 2 * TILE)
    assert cache.match("", run.tokens).shared == 0
    cache.publish(run.lease, TILE)
    assert cache.match("", run.tokens).shared == cache.match("", run.tokens).length == TILE


def test_an_abort_leaves_only_what_was_committed() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    run = begin(cache, tokens_of("abc", 1))
    reserve(cache, run, 2 * TILE, CheckpointKind.MESSAGE_END)
    forward(cache, run, TILE)
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    cache.release(run.lease)
    cache.check()
    stats = cache.stats()
    assert (stats.nodes, stats.checkpoints, stats.working_bytes) == (1, 0, 0)


def test_a_request_that_publishes_nothing_leaves_no_trace() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    run = begin(cache, tokens_of("abc", 1), publish=False)
    assert not reserve(cache, run, TILE, CheckpointKind.EXPLICIT)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, 3 * TILE)
    assert not keep_end(cache, run)
    cache.release(run.lease)
    cache.check()
    assert list(cache.tree.nodes()) == []
    stats = cache.stats()
    assert stats.kv_bytes == stats.checkpoint_bytes == stats.prompt_end_bytes == stats.working_bytes == 0


def test_namespaces_never_meet() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("ab", 3), TILE, end=True, namespace="one")
    match = cache.match("two", tokens_of("ab", 3))
    assert (match.length, match.shared, match.end) == (0, 0, None)
    fill(cache, tokens_of("ab", 3), TILE, namespace="two")
    assert cache.stats().nodes == 4
    cache.drop("one")
    cache.check()
    assert cache.match("one", tokens_of("ab", 3)).shared == 0
    assert cache.match("two", tokens_of("ab", 3)).length == TILE


def test_who_publishes_second_takes_the_page_of_who_was_faster() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    slow, fast = begin(cache, tokens_of("abc", 1)), begin(cache, tokens_of("abc", 1))
    for run in (fast, slow):
        reserve(cache, run, 2 * TILE, CheckpointKind.MESSAGE_END)
        forward(cache, run, len(run.tokens))
        cache.publish(run.lease, 3 * TILE)
        cache.check()
    assert slow.lease.pages[:3] == fast.lease.pages[:3]
    assert slow.lease.pages[3] != fast.lease.pages[3]
    stats = cache.stats()
    assert (stats.nodes, stats.checkpoints) == (3, 1)
    verify(cache, slow)


def test_a_page_that_was_about_to_go_stays_once_a_second_publisher_takes_it() -> None:
    cache = new_cache(HYBRID, slots=3, pages=5)
    slow, fast = begin(cache, tokens_of("ab", 1)), begin(cache, tokens_of("ab", 1))
    forward(cache, fast, len(fast.tokens))
    cache.publish(fast.lease, 2 * TILE)
    cache.release(fast.lease)
    forward(cache, slow, len(slow.tokens))
    cache.publish(slow.lease, 2 * TILE)
    cache.check()
    forward(cache, begin(cache, tokens_of("uvwxyz")), 6 * TILE)
    verify(cache, slow)
    cache.check()


def test_a_checkpoint_that_another_request_is_about_to_fill_is_not_reserved_twice() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("ab", 1))
    first, second = begin(cache, tokens_of("abx", 1)), begin(cache, tokens_of("aby", 1))
    assert reserve(cache, first, 2 * TILE, CheckpointKind.BRANCH)
    assert not reserve(cache, second, 2 * TILE, CheckpointKind.BRANCH)
    cache.release(first.lease)
    assert reserve(cache, second, 2 * TILE, CheckpointKind.BRANCH)
    cache.check()


def test_evicting_a_checkpoint_keeps_pages_that_a_deeper_node_needs() -> None:
    cache = new_cache(HYBRID, slots=5, policy=LRU())
    fill(cache, tokens_of("ab", 1), TILE)
    fill(cache, tokens_of("abcd", 1), 4 * TILE)
    assert cache.stats().checkpoints == 2
    run = begin(cache, tokens_of("uvwxyz", 1))
    cache.check()
    assert cache.stats().evictions == {"message_end": 1}
    cache.release(run.lease)
    assert length_of(cache, "ab") == 0
    again = begin(cache, tokens_of("abcd", 1))
    assert again.lease.length == 4 * TILE
    verify(cache, again)


def test_pages_below_the_deepest_checkpoint_go_first() -> None:
    cache = new_cache(HYBRID, slots=2, pages=5)
    fill(cache, tokens_of("abcd", 1), 2 * TILE)
    assert cache.match("", tokens_of("abcd", 1)).shared == 4 * TILE
    run = begin(cache, tokens_of("xyz"))
    cache.check()
    assert cache.stats().evictions.keys() == {"page"}
    cache.release(run.lease)
    match = cache.match("", tokens_of("abcd", 1))
    assert match.length == 2 * TILE
    assert match.shared < 4 * TILE


def test_dead_pages_go_in_order_of_last_use() -> None:
    clock = Clock()
    cache = new_cache(HYBRID, slots=1, pages=6, clock=clock)
    for letter in "abc":
        clock.now += 1
        fill(cache, tokens_of(letter, 1))
    clock.now += 1
    cache.release(begin(cache, tokens_of("a", 1)).lease)
    cache.release(begin(cache, tokens_of("wxyz")).lease)
    assert [cache.match("", tokens_of(letter, 1)).shared for letter in "abc"] == [TILE, 0, TILE]


@pytest.mark.parametrize("name", MIXED)
def test_compaction_moves_bytes_and_tells_their_owners(name: str) -> None:
    cache = new_cache(SPECS[name], slots=12, pages=12, policy=LRU())
    stems = "abcdefghij"
    for letter in stems:
        fill(cache, tokens_of(letter, 5), TILE, end=True)
    for _ in range(3):
        for long in ("klm", "nopqr", "stuvwx"):
            cache.release(begin(cache, tokens_of(long, 1)).lease)
            fill(cache, tokens_of(long[0], 5), TILE, end=True)
            for letter in stems:
                run = start(cache, tokens_of(letter, 5), must=True)
                assert run is not None
                verify(cache, run)
                cache.release(run.lease)
    cache.check()


def test_scattered_free_units_become_room_for_a_large_item() -> None:
    units = Units(12, 4)
    taken = [units.take_small() for _ in range(12)]
    for unit in (1, 2, 6, 11):
        units.give_small(unit)
    assert units.take_large() is None
    assert units.compact() == [(0, 6), (3, 11)]
    assert units.take_large() == 0
    assert sorted(u for u in taken if u is not None) == list(range(12))


def test_a_slab_with_a_fixed_item_is_not_emptied() -> None:
    units = Units(8, 4)
    for _ in range(8):
        units.take_small()
    for unit in (1, 2, 3, 7):
        units.give_small(unit)
    units.fix(0, 1)
    assert units.compact() == [(4, 3), (5, 2), (6, 1)]
    assert not units.fits(0, 2)
    assert units.fits(3, 1)
    assert not units.fits(4, 1)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_an_idle_cache_takes_whatever_fits_even_when_one_state_is_all_there_is_room_for(name: str) -> None:
    cache = new_cache(SPECS[name], slots=1, pages=3)
    tokens = tokens_of("ab", 1)
    assert cache.fits(len(tokens))
    for _ in range(3):
        run = begin(cache, tokens)
        reserve(cache, run, TILE, CheckpointKind.MESSAGE_END)
        forward(cache, run, len(tokens))
        cache.publish(run.lease, 2 * TILE)
        keep_end(cache, run)
        verify(cache, run)
        cache.release(run.lease)
        cache.check()


def test_a_request_without_room_evicts_nothing() -> None:
    cache = new_cache(HYBRID, slots=2, pages=5)
    fill(cache, tokens_of("ab", 1), 2 * TILE)
    before = cache.stats()
    assert start(cache, tokens_of("x" * 20), must=False) is None
    assert cache.stats() == before
    run = begin(cache, tokens_of("ab", 1))
    assert not cache.extend(run.lease, 40 * TILE)
    assert length_of(cache, "ab") == 2 * TILE
    cache.check()


def test_the_last_state_is_handed_over_when_there_is_no_room_for_a_copy() -> None:
    cache = new_cache(HYBRID, slots=2, pages=0)
    geometry = Geometry.of(HYBRID, 1 << 20)
    assert cache.stats().budget_bytes == 2 * geometry.stride_bytes(Kind.SLOT)
    run = begin(cache, tokens_of("ab", 1))
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, 2 * TILE)
    cache.release(run.lease)
    assert start(cache, tokens_of("abcd")) is not None
    cache.check()


def test_an_explicit_checkpoint_outlives_others_until_its_time_is_over() -> None:
    clock = Clock()
    cache = new_cache(HYBRID, slots=3, pages=4, policy=LRU(), clock=clock)
    run = begin(cache, tokens_of("a", 1))
    assert reserve(cache, run, TILE, CheckpointKind.EXPLICIT, ttl_s=60)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    for letter in "bcdef":
        fill(cache, tokens_of(letter, 1), TILE)
    assert length_of(cache, "a") == TILE
    clock.now += 61
    for letter in "bcdef":
        fill(cache, tokens_of(letter, 1), TILE)
    assert length_of(cache, "a") == 0


def test_an_explicit_checkpoint_goes_when_nothing_else_is_left() -> None:
    cache = new_cache(HYBRID, slots=2, pages=4)
    run = begin(cache, tokens_of("a", 1))
    assert reserve(cache, run, TILE, CheckpointKind.EXPLICIT, ttl_s=60)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    cache.release(begin(cache, tokens_of("wxyzvu")).lease)
    cache.check()
    assert cache.stats().evictions["explicit"] == 1


def test_a_candidate_worth_less_than_what_it_would_displace_is_declined() -> None:
    cache = new_cache(HYBRID, slots=5)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    run = begin(cache, tokens_of("wxyz", 1))
    assert not reserve(cache, run, TILE, CheckpointKind.INTERIOR)
    assert cache.stats().declines == {"interior": 1}
    assert length_of(cache, "abcdef") == 6 * TILE


@pytest.mark.parametrize(("policy", "survivor"), [(FlopsPerByte(), "abcdef"), (LRU(), "y")])
def test_the_policy_decides_which_state_goes(policy: Policy, survivor: str) -> None:
    cache = new_cache(HYBRID, slots=6, policy=policy)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    fill(cache, tokens_of("y", 1), TILE)
    begin(cache, tokens_of("012345678", 1))
    cache.check()
    assert [p for p in ("abcdef", "y") if length_of(cache, p)] == [survivor]


def test_fork_shares_the_trees_pages_and_copies_the_rest() -> None:
    cache = new_cache(HYBRID, slots=6, pages=12)
    run = begin(cache, tokens_of("ab", 9))
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, 2 * TILE)
    lease = cache.fork(run.lease, len(run.tokens))
    assert lease is not None
    assert lease.pages[:2] == run.lease.pages[:2]
    assert lease.pages[2] != run.lease.pages[2]
    assert lease.slot != run.lease.slot
    cache.release(run.lease)
    run.lease = lease
    verify(cache, run)
    cache.check()


def test_a_match_that_has_been_evicted_since_is_looked_up_again() -> None:
    cache = new_cache(HYBRID, slots=4, pages=8)
    tokens = tokens_of("ab", 3)
    fill(cache, tokens, TILE, end=True)
    match = cache.match("", tokens)
    assert match.end is not None
    cache.drop()
    lease = cache.acquire(match, tokens)
    assert lease is not None
    assert (lease.length, lease.shared, lease.end) == (0, 0, None)
    cache.check()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_no_view_reaches_beyond_its_item(name: str) -> None:
    spec = SPECS[name]
    cache = new_cache(spec, slots=4, pages=9)
    geometry = Geometry.of(spec, cache.stats().budget_bytes)
    spans = []
    for layer in cache.tensors:
        kind = Kind.PAGE if isinstance(layer, KVTensors) else Kind.SLOT
        for tensor in [layer.k, layer.v] if isinstance(layer, KVTensors) else [layer.conv, layer.state]:
            first = tensor.storage_offset() * tensor.element_size()
            assert first % 64 == 0
            assert tensor.stride(0) * tensor.element_size() == geometry.stride_bytes(kind)
            assert tensor[0].is_contiguous()
            spans.append((kind, first, first + tensor[0].numel() * tensor.element_size()))
    for kind in Kind:
        ends = [0] + [b for k, _, b in spans if k is kind]
        assert all(start >= end for end, start in zip(ends, [a for k, a, _ in spans if k is kind], strict=False))
        assert ends[-1] <= geometry.stride_bytes(kind)


def test_a_budget_that_holds_no_sequence_is_refused_with_the_bound() -> None:
    with pytest.raises(ConfigError, match=r"1000 bytes holds no sequence, needs at least \d+"):
        HybridCache(HYBRID, COST, 1000)


def test_interior_points_lie_at_doubling_distances() -> None:
    assert interior_positions(0, 512) == []
    assert interior_positions(0, 5000) == [512, 1024, 2048, 4096]


def test_the_end_of_a_shorter_prompt_is_not_that_of_a_longer_one() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("a", 5), end=True)
    match = cache.match("", tokens_of("ab", 5))
    assert (match.length, match.shared, match.end) == (0, TILE, None)


def test_an_end_has_its_place_only_behind_the_last_full_page() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    run = begin(cache, tokens_of("ab", 5))
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    assert not keep_end(cache, run)
    cache.publish(run.lease, 2 * TILE)
    assert keep_end(cache, run)
    cache.check()


@pytest.mark.parametrize("publish", [True, False])
def test_the_end_of_a_short_prompt_is_kept_if_it_may_be(publish: bool) -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    run = begin(cache, tokens_of("", 5), publish=publish)
    forward(cache, run, 5)
    assert keep_end(cache, run) is publish
    assert (cache.match("", run.tokens).end is not None) is publish
    cache.check()


def test_a_state_that_has_gone_is_not_started_from_though_its_pages_are_there() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("ab", 1), TILE)
    begin(cache, tokens_of("ab", 1))
    match = cache.match("", tokens_of("abx", 1))
    assert match.length == TILE
    cache.drop()  # of all states; the pages are in use
    lease = cache.acquire(match, tokens_of("abx", 1))
    assert lease is not None
    assert (lease.length, lease.shared) == (0, 2 * TILE)
    cache.check()


def test_no_place_is_reserved_that_the_state_has_passed() -> None:
    """The state that a request starts from was handed over to it, so its place in the tree is empty."""
    cache = new_cache(HYBRID, slots=3, pages=0)
    fill(cache, tokens_of("a", 1), TILE)
    other = begin(cache, tokens_of("", 1))
    run = begin(cache, tokens_of("ab", 1))
    assert run.lease.length == TILE
    assert cache.stats().checkpoints == 0
    cache.release(other.lease)
    assert not reserve(cache, run, TILE, CheckpointKind.MESSAGE_END)
    assert reserve(cache, run, 2 * TILE, CheckpointKind.MESSAGE_END)
    cache.check()


def test_a_private_request_stays_private_when_its_state_has_to_make_room() -> None:
    """The state lies where a page has to go; without it the request begins at zero."""
    cache = new_cache(SPECS["page of four slots"], slots=1, pages=3)
    fill(cache, tokens_of("a", 1), TILE)
    match = cache.match("", tokens_of("ab", 1))
    assert match.length == TILE
    lease = cache.acquire(match, tokens_of("ab", 1), publish=False)
    assert lease is not None
    assert (lease.length, lease.shared, lease.publish) == (0, 0, False)
    cache.check()


def test_a_minimum_life_begins_anew_with_each_use() -> None:
    clock = Clock()
    cache = new_cache(HYBRID, slots=3, pages=4, policy=LRU(), clock=clock)
    run = begin(cache, tokens_of("a", 1))
    assert reserve(cache, run, TILE, CheckpointKind.EXPLICIT, ttl_s=60)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    for _ in range(3):
        clock.now += 50
        cache.release(begin(cache, tokens_of("a", 1)).lease)
    clock.now += 50
    for letter in "bcdef":
        fill(cache, tokens_of(letter, 1), TILE)
    assert length_of(cache, "a") == TILE


def test_a_guaranteed_state_does_not_go_for_a_new_one() -> None:
    cache = new_cache(HYBRID, slots=2, pages=3, policy=LRU())
    run = begin(cache, tokens_of("a", 1))
    assert reserve(cache, run, TILE, CheckpointKind.EXPLICIT, ttl_s=60)
    forward(cache, run, len(run.tokens))
    cache.publish(run.lease, TILE)
    cache.release(run.lease)
    run = begin(cache, tokens_of("b", 1))
    assert not reserve(cache, run, TILE, CheckpointKind.MESSAGE_END)
    assert length_of(cache, "a") == TILE
    cache.check()


def test_what_goes_with_a_state_is_what_nothing_else_needs() -> None:
    cache = new_cache(HYBRID, slots=12, pages=40)
    fill(cache, tokens_of("abcd", 1), 4 * TILE)
    path = cache.match("", tokens_of("abcd", 1)).path
    deep = path[3].checkpoint
    assert deep is not None
    assert deep.pages_freed() == 4
    fill(cache, tokens_of("ab", 3), end=True)
    (end,) = path[1].ends.values()
    assert (deep.pages_freed(), end.pages_freed()) == (2, 1)
    fill(cache, tokens_of("abcd", 3), end=True)
    fill(cache, tokens_of("abcd", 4), end=True)
    assert deep.pages_freed() == 0
    assert [end.pages_freed() for end in path[3].ends.values()] == [1, 1]
    cache.pool.evict(deep)
    assert [end.pages_freed() for end in path[3].ends.values()] == [1, 1]
    for end in list(path[3].ends.values())[:-1]:
        cache.pool.evict(end)
    assert [end.pages_freed() for end in path[3].ends.values()] == [3]
    cache.check()


def test_without_states_a_match_leaves_one_token_to_compute_too() -> None:
    cache = new_cache(SPECS["only attention"], slots=8, pages=16)
    fill(cache, tokens_of("abc"))
    match = cache.match("", tokens_of("abc"))
    assert (match.length, match.shared) == (2 * TILE, 3 * TILE)
    assert length_of(cache, "abc", 1) == 3 * TILE


def test_the_end_of_a_prompt_takes_no_room_from_what_is_worth_more() -> None:
    cache = new_cache(HYBRID, slots=4)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    run = begin(cache, tokens_of("", 5))
    forward(cache, run, 5)
    assert not keep_end(cache, run)
    assert cache.stats().declines == {"prompt_end": 1}
    assert length_of(cache, "abcdef") == 6 * TILE
    cache.check()


def test_the_end_of_a_prompt_saves_what_a_repeat_would_compute_without_it() -> None:
    """At least one token: a repeat cannot start from a state that stands at its very end."""
    cache = new_cache(HYBRID, slots=12, pages=12)
    for tail in (0, 5):
        fill(cache, tokens_of("ab", tail), TILE, 2 * TILE, end=True)
    ends = cache.match("", tokens_of("ab", 1)).path[1].ends
    assert [end.resume_without() for end in ends.values()] == [TILE, 2 * TILE]


def test_a_state_is_queued_in_one_place_wherever_it_was_before() -> None:
    clock, policy = Clock(), LRU()
    policy.open(lambda kept: Worth(1.0, 1), clock)
    queues = EvictionQueues(policy, clock)
    state = Checkpoint(Node("", None, b"", 64, 0, 0.0), 0, CheckpointKind.EXPLICIT)
    queues.add(state)
    queues.check(set(), {state})
    state.keep_until = clock.now + 10
    queues.add(state)
    queues.check(set(), {state})
    assert queues.next_scored() is None
    clock.now += 10
    assert queues.next_scored() == (0.0, state)
    queues.check(set(), {state})
    assert queues.next_guaranteed() is None
