"""Messages kept outside the tree: what they hold is counted, guarded while it is used, and worth its room."""

import random

import pytest
import torch

from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.tree import StoredMessage
from hybrid_cache.errors import OwnershipError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import StateTensors
from hybrid_cache.spec import CacheSpec, StateSpec
from tests.cache.at_once import HybridCache
from tests.cache.driver import KV, begin, cache_spec, fill, new_cache, start, tokens_of, write_rows, write_state


def spec_of(num_floats: int) -> CacheSpec:
    """Of each message, what it does to states takes a page of its own."""
    return cache_spec(KV, StateSpec((1, 2), (2, num_floats // 2), torch.float32, effect=(100,)))


EQUAL = spec_of(224)  # a slot is as large as a page, so a budget is a number of items
LARGE_SLOT = spec_of(990)  # as large as four pages, so that pages are moved to make room for one


def items(num_items: int, policy: Policy | None = None) -> HybridCache:
    """A cache with room for so many pages and slots in all."""
    return new_cache(EQUAL, pages=num_items, policy=policy)


def reserve(cache: HybridCache, key: str, length: int = 10) -> StoredMessage | None:
    """Room for a message, with all the numbers in it written."""
    extra = cache.messages.lend_extra("", key, 0, length)
    stored = None if extra is None else cache.messages.reserve("", key, 0, length, 0, extra)
    if stored is None:
        cache.messages.return_extra(extra or [])
        return None
    rows = torch.from_numpy(stored.own_rows())
    write_rows(cache, rows // TILE, rows % TILE, number_of(key) + torch.arange(float(length)))
    write_state(cache, stored.slot, number_of(key))
    cache.memory.numbers[stored.extra] = number_of(key)
    return stored


def store(cache: HybridCache, key: str, length: int = 10) -> StoredMessage | None:
    stored = reserve(cache, key, length)
    if stored is not None:
        cache.messages.publish(stored)
        cache.check()
    return stored


def number_of(key: str) -> float:
    return float(sum(map(ord, key)))


def verify(cache: HybridCache, stored: StoredMessage) -> None:
    """A message holds what was written for its key."""
    rows = torch.from_numpy(stored.rows())
    kv, states = cache.tensors
    expected = number_of(stored.key) + torch.arange(float(stored.length))
    assert torch.equal(kv.k[rows // TILE, rows % TILE][:, 0, 0], expected)
    assert isinstance(states, StateTensors)
    assert bool((states.conv[stored.slot] == number_of(stored.key)).all())
    assert bool((cache.memory.numbers[stored.extra] == number_of(stored.key)).all())


def kept(cache: HybridCache, *keys: str) -> list[str]:
    return [key for key in keys if cache.messages.get(key) is not None]


def test_dropping_everything_spares_a_message_that_somebody_holds() -> None:
    cache = items(12)
    held, other = store(cache, "held"), store(cache, "other")
    assert held is not None
    assert other is not None
    cache.messages.hold(held)
    cache.drop()
    cache.check()
    assert kept(cache, "held", "other") == ["held"]
    verify(cache, held)
    cache.messages.let_go(held, used=True)
    cache.drop()
    cache.check()
    assert kept(cache, "held") == []


def test_a_message_stays_until_the_last_of_its_holders_has_let_go() -> None:
    cache = items(8)
    stored = store(cache, "m")
    assert stored is not None
    for _ in range(2):
        cache.messages.hold(stored)
    cache.messages.let_go(stored, used=True)
    cache.check()
    assert start(cache, tokens_of("uvwxyz"), must=False) is None
    assert kept(cache, "m") == ["m"]
    cache.messages.let_go(stored, used=True)
    cache.check()
    assert start(cache, tokens_of("uvwxyz"), must=False) is not None
    assert kept(cache, "m") == []
    cache.check()


def test_a_held_message_outlives_all_that_are_not_held() -> None:
    cache = items(9, LRU())
    first, second = store(cache, "first"), store(cache, "second")
    assert first is not None
    assert second is not None
    cache.messages.hold(first)
    assert start(cache, tokens_of("wxyz"), must=False) is not None
    cache.check()
    assert kept(cache, "first", "second") == ["first"]
    verify(cache, first)


@pytest.mark.parametrize(("used", "survivor"), [(True, "old"), (False, "new")])
def test_only_a_message_that_was_good_for_something_counts_as_used(used: bool, survivor: str) -> None:
    cache = items(9, LRU())
    old, new = store(cache, "old"), store(cache, "new")
    assert old is not None
    assert new is not None
    cache.messages.hold(old)
    cache.messages.let_go(old, used=used)
    assert start(cache, tokens_of("wxyz"), must=False) is not None
    assert kept(cache, "old", "new") == [survivor]


def test_a_message_in_the_making_takes_no_room_from_what_is_worth_more() -> None:
    """Of nine items six pages and a state are kept for a long prompt. A short message may have the other two."""
    cache = items(9)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    lent = [cache.messages.lend_extra("", f"m{i}", 0, 10) for i in range(3)]
    cache.check()
    assert [extra is not None for extra in lent] == [True, True, False]
    assert cache.stats().evictions == {}
    for extra in lent[:2]:
        cache.messages.return_extra(extra or [])
    assert reserve(cache, "m") is None  # there is room for what it does to states, and not for its rows beside it
    cache.check()
    assert cache.match("", tokens_of("abcdef", 1)).length == 6 * TILE
    assert cache.stats().declines == {"message": 2}
    assert cache.stats().working_bytes == 0


def test_what_is_lent_is_counted_until_it_is_given_back_or_becomes_a_message() -> None:
    cache = items(9)
    page_bytes = cache.stats().budget_bytes // 9
    extra = cache.messages.lend_extra("", "m", 0, 10)
    assert extra is not None
    assert cache.stats().working_bytes == page_bytes
    cache.messages.return_extra(extra)
    assert cache.stats().working_bytes == 0
    stored = reserve(cache, "m")
    cache.check()
    assert stored is not None
    assert cache.stats().working_bytes == 3 * page_bytes
    cache.messages.publish(stored)
    cache.check()
    assert (cache.stats().working_bytes, cache.stats().message_bytes) == (0, 3 * page_bytes)
    with pytest.raises(OwnershipError):
        stored.own_rows()


def test_a_key_is_stored_once() -> None:
    cache = items(12)
    stored = store(cache, "m")
    assert stored is not None
    assert reserve(cache, "m") is None
    cache.check()
    assert cache.messages.get("m") is stored


def test_a_message_has_as_many_pages_as_its_rows_need() -> None:
    cache = items(12)
    for length, pages in ((1, 1), (TILE, 1), (TILE + 1, 2)):
        stored = store(cache, str(length), length)
        assert stored is not None
        assert len(stored.pages) == pages


def test_a_slot_that_is_lent_is_nobody_elses() -> None:
    cache = items(4)
    slots = [cache.messages.lend_slot() for _ in range(5)]
    cache.check()
    assert slots[4] is None
    assert len(set(slots)) == 5
    for slot in slots[:4]:
        assert slot is not None
        cache.messages.return_slot(slot)
    cache.check()
    assert cache.stats().working_bytes == 0


def test_messages_are_moved_with_all_that_they_hold() -> None:
    """Room for slots is made among their pages, whatever comes and goes."""
    cache, rng = new_cache(LARGE_SLOT, pages=60, policy=LRU()), random.Random(0)
    for i in range(60):
        store(cache, f"m{i}", rng.choice((3, 64, 100, 200)))
        if rng.random() < 0.5:
            cache.release(begin(cache, tokens_of("x" * rng.randint(1, 8))).lease)
        cache.check()
        for stored in [m for m in map(cache.messages.get, kept(cache, *(f"m{j}" for j in range(i + 1)))) if m]:
            verify(cache, stored)
    assert cache.stats().compactions > 2
    assert cache.stats().evictions["message"] > 20


def test_a_message_that_is_held_is_not_moved() -> None:
    cache, rng = new_cache(LARGE_SLOT, pages=60, policy=LRU()), random.Random(1)
    held = store(cache, "held", 100)
    assert held is not None
    cache.messages.hold(held)
    places = (held.slot, list(held.pages), list(held.extra))
    for i in range(60):
        store(cache, f"m{i}", rng.choice((3, 64, 100, 200)))
        if rng.random() < 0.5:
            cache.release(begin(cache, tokens_of("x" * rng.randint(1, 8))).lease)
    assert cache.stats().compactions > 2
    assert (held.slot, held.pages, held.extra) == places
    verify(cache, held)


def test_numbers_lie_in_items_of_the_kind_that_is_lent() -> None:
    cache = items(6)
    assert cache.pool.extra_kind is Kind.PAGE
    assert cache.memory.numbers.shape == (6, 256)


def test_what_a_published_message_does_to_states_is_not_written_to_without_attention() -> None:
    """There slots hold it, beside the one with its state."""
    spec = cache_spec(StateSpec((1, 2), (2, 112), torch.float32, effect=(100,)))
    cache = new_cache(spec, slots=4, policy=LRU())
    extra = cache.messages.lend_extra("", "m", 0, 10)
    assert extra
    assert cache.pool.extra_kind is Kind.SLOT
    stored = cache.messages.reserve("", "m", 0, 10, 0, extra)
    assert stored is not None
    cache.pool.check_unpublished(Kind.SLOT, [stored.slot, *stored.extra])
    cache.messages.publish(stored)
    cache.check()
    for slot in (stored.slot, *stored.extra):
        with pytest.raises(OwnershipError):
            cache.pool.check_unpublished(Kind.SLOT, [slot])
    cache.drop()
    cache.check()
    cache.pool.check_unpublished(Kind.SLOT, [stored.slot, *stored.extra])
