import pytest

from hybrid_cache.cache.policies.base import Policy, Worth
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.registry import POLICIES, make_policy
from hybrid_cache.cache.policies.value import RATE, FlopsPerByte
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Kept, Node
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from tests.cache.at_once import HybridCache
from tests.cache.driver import SPECS, begin, fill, forward, new_cache, reserve, tokens_of

HYBRID = SPECS["slot of four pages"]
END = CheckpointKind.MESSAGE_END


def hit(cache: HybridCache, pages: str) -> None:
    cache.release(begin(cache, tokens_of(pages, 1)).lease)


def some_state() -> Checkpoint:
    return Checkpoint(Node("", None, b"", 64, 0, 0.0), 0, END)


def kept(cache: HybridCache, *prompts: str) -> list[str]:
    return [p for p in prompts if cache.match("", tokens_of(p, 1)).length]


def test_every_kind_of_place_has_a_rate() -> None:
    assert set(RATE) == set(CheckpointKind)


def test_what_saves_twice_as_much_or_takes_half_the_bytes_scores_twice_as_high() -> None:
    policy = FlopsPerByte()
    double = policy.score(0.0, END, Worth(200.0, 10))
    assert double == policy.score(0.0, END, Worth(100.0, 5)) == 2 * policy.score(0.0, END, Worth(100.0, 10))


def test_what_is_not_used_grows_old_as_others_are_evicted() -> None:
    policy = FlopsPerByte()
    old = policy.score(policy.clock, END, Worth(100.0, 10))
    policy.lost(b"", 8.0, None)
    assert policy.score(policy.clock, END, Worth(100.0, 10)) == old + 8.0
    policy.lost(b"", 3.0, None)
    assert policy.clock == 8.0


def test_hits_are_not_counted() -> None:
    """Five uses at one moment weigh as much as one."""
    policy = FlopsPerByte()
    before, state = policy.clock, some_state()
    for _ in range(5):
        policy.used(state, ())
    assert policy.clock == before


def test_lru_only_asks_for_the_last_use() -> None:
    policy = LRU()
    first = policy.clock
    policy.used(some_state(), ())
    assert policy.score(first, END, Worth(1e9, 1)) < policy.score(policy.clock, END, Worth(1.0, 1000))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_is_made_by_its_name(name: str) -> None:
    assert make_policy(name).name == name


def test_a_policy_is_also_made_by_its_former_name() -> None:
    assert make_policy(EngineConfig(policy="ours").policy).name == "learned"


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'best', must be one of learned, flops-per-byte, lru"):
        make_policy("best")


def test_lru_evicts_in_order_of_use() -> None:
    cache = new_cache(HYBRID, slots=5, pages=4, policy=LRU())
    for prompt in ("a", "b", "c"):
        fill(cache, tokens_of(prompt, 1), TILE)
    hit(cache, "a")
    fill(cache, tokens_of("d", 1), TILE)
    assert kept(cache, "a", "b", "c", "d") == ["a", "c", "d"]


def test_lru_takes_in_the_newest_even_with_room_for_one_state() -> None:
    cache = new_cache(HYBRID, slots=2, pages=3, policy=LRU())
    fill(cache, tokens_of("a", 1), TILE)
    fill(cache, tokens_of("b", 1), TILE)
    assert kept(cache, "a", "b") == ["b"]


@pytest.mark.parametrize("hits", [0, 1, 20])
def test_popularity_long_ago_does_not_protect(hits: int) -> None:
    cache = new_cache(HYBRID, slots=4, pages=8)
    fill(cache, tokens_of("old", 1), 3 * TILE)
    for _ in range(hits):
        hit(cache, "old")
    letters = [chr(c) for c in range(ord("A"), ord("A") + 26)]
    for a, b in zip(letters, reversed(letters), strict=True):
        fill(cache, tokens_of(a + b + "z", 1), 3 * TILE)
    assert kept(cache, "old") == []


@pytest.mark.parametrize("policy", [FlopsPerByte(), LRU()], ids=lambda p: p.name)
def test_the_newest_stays_when_all_are_worth_the_same(policy: Policy) -> None:
    cache = new_cache(HYBRID, slots=4, pages=8, policy=policy)
    for prompt in ("aaa", "bbb", "ccc", "ddd", "eee", "fff", "ggg", "hhh"):
        fill(cache, tokens_of(prompt, 1), 3 * TILE)
    assert "hhh" in kept(cache, "aaa", "bbb", "ccc", "ddd", "eee", "fff", "ggg", "hhh")


def test_a_state_is_worth_more_once_the_one_above_it_has_gone() -> None:
    """Its parent went, so without it all would be computed again: the marginal cost is the whole prompt now."""
    cache = new_cache(HYBRID, slots=20, pages=40)
    fill(cache, tokens_of("abcdefgh", 1), 7 * TILE, 8 * TILE)
    path = cache.match("", tokens_of("abcdefgh", 1)).path
    deep, above = path[7].checkpoint, path[6].checkpoint
    assert deep is not None
    assert above is not None
    before = cache.pool.worth(deep).flops
    cache.pool.evict(above)
    assert cache.pool.worth(deep).flops > 2 * before
    cache.check()


def test_a_state_is_worth_less_once_there_is_one_closer_above_it() -> None:
    """And its turn comes in that order: `lonely` saves less than it did, but more than `deep` now does."""
    cache = new_cache(HYBRID, slots=20, pages=40)
    fill(cache, tokens_of("abcdefgh", 1), 8 * TILE)
    fill(cache, tokens_of("lonely", 1), 6 * TILE)
    branch = begin(cache, tokens_of("abcdefgx", 1))
    assert reserve(cache, branch, 7 * TILE, CheckpointKind.BRANCH)
    forward(cache, branch, len(branch.tokens))
    cache.publish(branch.lease, 7 * TILE)
    cache.release(branch.lease)
    lowest = cache.pool.queues.next_scored()
    assert lowest is not None
    assert lowest[1].num_tokens == 8 * TILE


def test_an_end_on_the_grid_is_worth_less_once_there_is_a_closer_state_above_its_node() -> None:
    """It stands beside a checkpoint that a repeat of its prompt could not use."""
    cache = new_cache(HYBRID, slots=20, pages=40)
    fill(cache, tokens_of("ab"), 2 * TILE, end=True)
    branch = begin(cache, tokens_of("ax", 1))
    assert reserve(cache, branch, TILE, CheckpointKind.BRANCH)
    forward(cache, branch, TILE)
    cache.publish(branch.lease, TILE)
    cache.check()


def test_of_two_states_that_are_worth_the_same_the_newer_stays() -> None:
    cache = new_cache(HYBRID, slots=3, pages=4)
    for prompt in ("aaa", "bbb"):
        fill(cache, tokens_of(prompt, 1), 3 * TILE)
    assert kept(cache, "aaa", "bbb") == ["bbb"]
    assert cache.stats().declines == {}


class Told(FlopsPerByte):
    """Wants to hear of states whose worth may have risen, and notes of which it has heard."""

    wants_rises = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Kept] = []

    def add(self, kept: Kept) -> None:
        self.told.append(kept)
        super().add(kept)


def test_a_policy_that_asks_for_it_is_told_of_states_that_may_be_worth_more() -> None:
    policy = Told()
    cache = new_cache(HYBRID, slots=5, pages=10, policy=policy)
    fill(cache, tokens_of("abc", 1), TILE, 3 * TILE)
    fill(cache, tokens_of("abd", 1), 3 * TILE)
    path, other = (cache.match("", tokens_of(pages, 1)).path for pages in ("abc", "abd"))
    above, deep, beside = path[0].checkpoint, path[2].checkpoint, other[2].checkpoint
    assert above is not None
    assert deep is not None
    policy.told.clear()
    cache.pool.evict(above)
    assert {deep, beside} <= set(policy.told)  # all would have to be computed again now
    for letter, part_here in (("x", False), ("y", True)):
        run = begin(cache, tokens_of("abc" + letter, 1))
        forward(cache, run, len(run.tokens))
        policy.told.clear()
        cache.publish(run.lease, 4 * TILE)
        assert (deep in policy.told) is part_here
        cache.release(run.lease)
    policy.told.clear()
    free = cache.stats().free_bytes // 1024
    cache.release(begin(cache, tokens_of("u" * (free - 4 + 1))).lease)  # one of the two pages behind it has to go
    assert len(path[2].children) == 1
    assert deep in policy.told
    cache.check()


def test_a_candidate_is_worth_less_once_a_place_above_it_is_reserved() -> None:
    cache = new_cache(HYBRID, slots=20, pages=40)
    run = begin(cache, tokens_of("abcdefgh", 1))
    before = cache._candidates._score(run.lease, 8 * TILE, END)
    assert reserve(cache, run, 7 * TILE, END)
    after = cache._candidates._score(run.lease, 8 * TILE, END)
    assert before is not None
    assert after is not None
    assert after < before
