"""What is kept, as conversations: which there are, what belongs to each alone, and that dropping one leaves others."""

import random

import pytest

from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.seglen import SegLen
from hybrid_cache.kernels.grid import TILE
from tests.cache.at_once import HybridCache
from tests.cache.driver import SPECS, Clock, begin, fill, new_cache, tokens_of

PAGE = 1024  # bytes


def everything(namespace: str) -> bool:
    return True


def filled(clock: Clock | None = None) -> HybridCache:
    """Two conversations that share their first page, one of which goes on, and one of another namespace."""
    cache = new_cache(SPECS["slot of four pages"], slots=20, pages=40, clock=clock)
    fill(cache, tokens_of("ab", 5), TILE, 2 * TILE, end=True)
    fill(cache, tokens_of("acd"), TILE, 2 * TILE, 3 * TILE)
    fill(cache, tokens_of("a"), namespace="other", end=True)
    return cache


def lengths(inventory: Inventory) -> list[int]:
    return sorted(conversation.end.num_tokens for conversation in inventory.conversations())


def test_a_conversation_is_a_state_that_no_other_goes_on_from() -> None:
    cache = filled()
    assert lengths(Inventory(cache, everything)) == [64, 133, 192]
    assert lengths(Inventory(cache, lambda namespace: namespace == "other")) == [64]
    assert lengths(Inventory(cache, lambda namespace: False)) == []


def test_a_prompt_end_that_was_gone_on_from_is_no_conversation_of_its_own() -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=20, pages=40)
    fill(cache, tokens_of("a", 5), TILE, end=True)
    assert lengths(Inventory(cache, everything)) == [69]
    longer = tokens_of("aab")
    longer[TILE : TILE + 5] = 7
    fill(cache, longer, 2 * TILE)
    (whole,) = [
        Inventory(cache, everything).find(c.end.name.hex()) for c in Inventory(cache, everything).conversations()
    ]
    assert whole is not None
    assert [state.num_tokens for state in whole.states] == [64, 69, 128]
    assert whole.tokens.tolist() == longer[:128].tolist()


def test_a_conversation_shows_its_states_and_tokens_from_the_beginning() -> None:
    inventory = Inventory(filled(), everything)
    names = {c.end.num_tokens: c.end.name.hex() for c in inventory.conversations()}
    whole = inventory.find(names[133][:8])
    assert whole is not None
    assert [(state.num_tokens, state.kind) for state in whole.states] == [
        (64, "message_end"),
        (128, "message_end"),
        (133, "prompt_end"),
    ]
    assert whole.tokens.tolist() == tokens_of("ab", 5).tolist()
    assert inventory.find("") is None
    assert inventory.find("xyz") is None


def test_hits_and_ages_are_those_of_the_requests_that_used_a_state() -> None:
    clock = Clock()
    cache = filled(clock)
    clock.now += 5
    run = begin(cache, tokens_of("ab", 5))
    cache.release(run.lease)
    clock.now += 2
    first, *others = Inventory(cache, everything).conversations()
    assert (first.end.num_tokens, first.end.hits, first.hits, first.end.age_s) == (133, 1, 1, 2.0)
    assert {(c.end.hits, c.end.age_s) for c in others} == {(0, 7.0)}


def test_dropping_a_conversation_frees_what_it_says_and_leaves_what_others_need() -> None:
    cache = filled()
    named = {c.end.num_tokens: c for c in Inventory(cache, everything).conversations()}
    freed = Inventory(cache, everything).drop(named[192].end.name.hex())
    assert freed == named[192].num_bytes
    cache.check()
    assert lengths(Inventory(cache, everything)) == [64, 133]
    assert cache.match("", tokens_of("ab", 5)).length == 133
    assert cache.match("", tokens_of("acd", 1)).length == 64
    assert Inventory(cache, everything).drop(named[192].end.name.hex()) is None
    freed = Inventory(cache, lambda namespace: namespace == "other").drop(named[133].end.name.hex())
    assert freed is None
    Inventory(cache, everything).drop(named[133].end.name.hex())
    assert lengths(Inventory(cache, everything)) == [64]
    assert "" not in cache.tree.roots
    cache.check()


def test_what_a_request_uses_stays_while_it_does() -> None:
    cache = filled()
    run = begin(cache, tokens_of("acde"))
    named = {c.end.num_tokens: c.end.name.hex() for c in Inventory(cache, everything).conversations()}
    Inventory(cache, everything).drop(named[192])
    cache.check()
    assert cache.match("", tokens_of("acd", 1)).shared == 192
    cache.release(run.lease)
    Inventory(cache, everything).drop_all()
    cache.check()
    assert cache.stats().nodes == cache.stats().checkpoints == cache.stats().prompt_ends == 0


def test_dropping_all_leaves_what_is_not_seen() -> None:
    cache = filled()
    Inventory(cache, lambda namespace: namespace == "").drop_all()
    assert lengths(Inventory(cache, everything)) == [64]
    assert cache.match("other", tokens_of("a")).length == 64


@pytest.mark.parametrize("policy", [LRU(), Learned(), SegLen()])
def test_what_goes_next_has_the_lowest_score(policy: LRU | Learned | SegLen) -> None:
    clock = Clock()
    cache = new_cache(SPECS["slot of four pages"], slots=20, pages=40, policy=policy, clock=clock)
    for pages in ("ab", "cde", "fg"):
        clock.now += 10
        run = begin(cache, tokens_of(pages))
        cache.propose(run.lease)
        cache.release(run.lease)
        fill(cache, tokens_of(pages), 2 * TILE)
    lowest = policy.lowest()
    assert lowest is not None
    score, kept = lowest
    scores = {c.end.name: c.end.score for c in Inventory(cache, everything).conversations()}
    assert len(scores) == 3
    assert scores[kept.name] == score
    known = [value for value in scores.values() if value is not None]
    assert len(known) == 3
    assert min(known) == score


def test_whatever_is_dropped_the_books_stay_in_order() -> None:
    generator = random.Random(3)
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=16, policy=LRU())
    for _ in range(60):
        tokens = tokens_of("".join(generator.choices("ab", k=generator.randint(0, 4))), generator.randint(1, 5))
        grid = len(tokens) // TILE * TILE
        fill(cache, tokens, *([grid] if grid else []), end=generator.random() < 0.7)
        found = Inventory(cache, everything).conversations()
        if found and generator.random() < 0.4:
            chosen = generator.choice(found)
            dead = len([n for n in cache.tree.nodes() if n.dead and n.parent is not None])
            freed = Inventory(cache, everything).drop(chosen.end.name.hex())
            assert freed is not None
            assert chosen.num_bytes <= freed <= chosen.num_bytes + dead * PAGE
            cache.check()
