"""Each reason why tokens were not found in the cache, on books whose history is known."""

import random
import tracemalloc

import numpy as np
import pytest

from hybrid_cache.cache.fates import MOST_PAGES, MOST_STATES, RECORDS_BYTES, End, Fates
from hybrid_cache.cache.misses import LEAST_ALIKE, MOST_SHOWN, Found, Loss, Part, Reason
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.nothing import Nothing
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray
from tests.cache.at_once import HybridCache
from tests.cache.driver import SPECS, Clock, begin, fill, new_cache, tokens_of

SPEC = SPECS["slot of four pages"]
STATELESS = SPECS["only attention"]


def cache_of(clock: Clock | None = None) -> HybridCache:
    return new_cache(SPEC, slots=20, pages=40, clock=clock)


def look(cache: HybridCache, tokens: TokenArray, namespace: str = "", owner: str | None = "") -> Found:
    lease = begin(cache, tokens, namespace=namespace).lease
    found = cache.inquest.of(lease, owner)
    cache.release(lease)
    return found


def same_for(tokens: TokenArray, length: int, more: str = "") -> TokenArray:
    """A prompt that begins like another, and goes on in its own way."""
    return np.concatenate([tokens[:length], tokens_of(more, 1)])


def reasons(found: Found) -> list[tuple[int, int, Reason]]:
    return [(part.start, part.end, part.reason) for part in found.parts]


def test_what_nobody_has_said_was_never_seen() -> None:
    found = look(cache_of(), tokens_of("abc", 5))
    assert found == Found(197, 0, "", 0, (Part(0, 197, Reason.NEVER_SEEN),))


def test_a_prompt_that_was_kept_as_a_whole_misses_nothing() -> None:
    cache = cache_of()
    fill(cache, tokens_of("ab", 5), TILE, end=True)
    found = look(cache, tokens_of("ab", 5))
    assert (found.matched, found.kind, found.parts, found.reason) == (133, "prompt_end", (), None)
    assert not cache.inquest.misses


def test_what_comes_after_a_known_conversation_was_never_seen() -> None:
    cache = cache_of()
    fill(cache, tokens_of("ab"), TILE, 2 * TILE)
    found = look(cache, tokens_of("abcd", 1))
    assert (found.matched, found.kind, found.nearest) == (128, "message_end", None)
    assert reasons(found) == [(128, 257, Reason.NEVER_SEEN)]


@pytest.mark.parametrize("position", [74, 20])
def test_a_prompt_differs_from_the_nearest_conversation_at_a_token(position: int) -> None:
    cache, known = cache_of(), tokens_of("abc")
    fill(cache, known, TILE)
    fill(cache, same_for(known, position - 3, "zz"))
    found = look(cache, same_for(known, position, "xyz"))
    start = position // TILE * TILE
    assert found.matched == start
    tile = [(start, position, Reason.TILE_REMAINDER)]
    assert reasons(found) == [*tile, (position, position + 193, Reason.DIFFERS)]
    assert found.nearest is not None
    assert found.nearest.position == position
    assert list(found.nearest.tokens) == known[position : position + MOST_SHOWN].tolist()


def test_the_text_of_the_nearest_conversation_goes_on_over_the_end_of_a_page() -> None:
    cache, known = cache_of(), tokens_of("abc")
    fill(cache, known, TILE)
    found = look(cache, same_for(known, 125, "xyz"))
    assert found.nearest is not None
    assert list(found.nearest.tokens) == known[125 : 125 + MOST_SHOWN].tolist()
    assert found.nearest.tokens[2:4] == (ord("b"), ord("c"))


def test_what_only_a_template_has_in_common_was_never_seen() -> None:
    cache, known = cache_of(), tokens_of("abc")
    fill(cache, known, TILE)
    found = look(cache, same_for(known, LEAST_ALIKE - 1, "xy"))
    assert reasons(found) == [(0, found.num_tokens, Reason.NEVER_SEEN)]
    assert found.nearest is not None
    assert found.nearest.position == LEAST_ALIKE - 1


def test_whoever_shares_a_namespace_is_not_told_what_is_in_there() -> None:
    cache, known = cache_of(), tokens_of("abc")
    fill(cache, known, TILE)
    found = look(cache, same_for(known, 80, "xyz"), owner=None)
    assert found.nearest is None
    assert reasons(found) == [(64, found.num_tokens, Reason.NEVER_SEEN)]


def test_a_state_was_evicted_whose_pages_are_still_there() -> None:
    clock = Clock()
    cache = cache_of(clock)
    fill(cache, tokens_of("ab"), TILE, 2 * TILE)
    state = cache.match("", tokens_of("abc")).checkpoint
    assert state is not None
    cache.pool.evict(state, 0.5)
    clock.now += 7
    found = look(cache, tokens_of("abc", 1))
    assert (found.matched, found.kv_only) == (64, 64)
    lost = Part(64, 128, Reason.EVICTED, Loss("message_end", 7.0, 0.5))
    assert found.parts == (lost, Part(128, 193, Reason.NEVER_SEEN))


def test_states_and_pages_that_had_to_make_room_were_evicted() -> None:
    clock = Clock()
    cache = new_cache(SPEC, slots=4, pages=8, policy=LRU(), clock=clock)
    fill(cache, tokens_of("abcd"), 2 * TILE)
    clock.now += 10
    for name in "efghij":
        fill(cache, tokens_of(name * 4), 2 * TILE)
    found = look(cache, tokens_of("abcd", 70))
    assert not found.matched
    assert reasons(found)[0][1:] == (256, Reason.EVICTED)
    assert found.parts[0].loss is not None
    assert found.parts[0].loss.what == "page"
    halfway = look(cache, same_for(tokens_of("abcd"), 2 * TILE, "xyz"))
    assert reasons(halfway)[0] == (0, 128, Reason.EVICTED)
    assert halfway.parts[0].loss is not None
    assert halfway.parts[0].loss.what == "message_end"
    assert halfway.parts[0].loss.age_s < 10


def test_the_policy_declined_a_state() -> None:
    cache = new_cache(SPEC, slots=20, pages=40, policy=Nothing())
    fill(cache, tokens_of("ab"), TILE)
    found = look(cache, tokens_of("abc", 1))
    assert found.parts[0] == Part(0, 128, Reason.DECLINED, Loss("message_end", 0.0))


def test_nobody_asked_for_a_state() -> None:
    cache = cache_of()
    fill(cache, tokens_of("ab"))
    assert look(cache, tokens_of("abc", 1)).parts[0] == Part(0, 128, Reason.NOT_KEPT)


def test_a_model_without_states_starts_from_any_page() -> None:
    cache = new_cache(STATELESS, pages=40)
    fill(cache, tokens_of("ab"))
    found = look(cache, tokens_of("abc", 1))
    assert (found.matched, found.kind, found.kv_only) == (128, "page", 0)


@pytest.mark.parametrize(
    ("owner", "other", "told"),
    [
        ("t:", "m/t:one", True),
        ("t:", "other/t:two", True),
        ("t:", "m/u:one", False),
        ("t:", "t:/u:one", False),
        ("", "m/t:one", False),
        (None, "m/t:one", False),
    ],
)
def test_another_namespace_is_told_of_to_its_owner_alone(owner: str | None, other: str, told: bool) -> None:
    cache = cache_of()
    fill(cache, tokens_of("ab"), TILE, namespace=other)
    found = look(cache, tokens_of("abc", 1), "m/t:two", owner)
    expected = [(0, 128, Reason.OTHER_NAMESPACE)] if told else []
    assert reasons(found) == [*expected, (128 if told else 0, 193, Reason.NEVER_SEEN)]
    assert found.nearest is None


def test_less_than_a_tile_is_left_over() -> None:
    cache = cache_of()
    fill(cache, tokens_of("a"), TILE)
    assert reasons(look(cache, tokens_of("a", 5))) == [(64, 69, Reason.TILE_REMAINDER)]
    assert reasons(look(cache_of(), tokens_of("", 9))) == [(0, 9, Reason.TILE_REMAINDER)]


def test_a_conversation_that_goes_on_computes_the_rest_of_a_tile_again() -> None:
    cache = cache_of()
    fill(cache, tokens_of("a", 10), TILE, end=True)
    found = look(cache, np.concatenate([tokens_of("a", 10), tokens_of("xyz")]))
    assert reasons(found) == [(64, 74, Reason.TILE_REMAINDER), (74, 266, Reason.NEVER_SEEN)]
    assert found.nearest is None


def test_the_same_prompt_came_before_and_its_end_has_gone() -> None:
    cache = cache_of()
    fill(cache, tokens_of("a", 5), TILE, end=True)
    end = cache.match("", tokens_of("a", 5)).end
    assert end is not None
    cache.pool.evict(end, 0.25)
    assert look(cache, tokens_of("a", 5)).parts == (Part(64, 69, Reason.EVICTED, Loss("prompt_end", 0.0, 0.25)),)


def test_reasons_are_counted_by_prompts_and_by_tokens() -> None:
    cache = cache_of()
    fill(cache, tokens_of("a", 10), TILE, end=True)
    look(cache, np.concatenate([tokens_of("a", 10), tokens_of("xyz")]))
    look(cache, tokens_of("a", 5))
    cache.inquest.off(30)
    stats = cache.stats()
    assert stats.misses == {"never_seen": 1, "tile_remainder": 1, "off": 1}
    assert stats.missed_tokens == {"tile_remainder": 15, "never_seen": 192, "off": 30}


def test_parts_are_all_that_is_missing_whatever_has_happened() -> None:
    generator = random.Random(5)
    cache = new_cache(SPEC, slots=5, pages=9, policy=LRU())
    seen = set[Reason]()
    for _ in range(150):
        pages = "".join(generator.choices("ab", k=generator.randint(0, 4)))
        tokens = tokens_of(pages, generator.randint(0, 9) or 1)
        found = look(cache, tokens)
        edges = [found.matched, *(part.end for part in found.parts)]
        assert [part.start for part in found.parts] == edges[:-1]
        assert edges == sorted(set(edges))
        assert edges[-1] == len(tokens)
        seen.update(part.reason for part in found.parts)
        grid = len(tokens) // TILE * TILE
        kept = {grid, TILE} - {0} if grid and generator.random() < 0.5 else set[int]()
        fill(cache, tokens, *kept, end=generator.random() < 0.5)
    assert {Reason.EVICTED, Reason.NOT_KEPT, Reason.TILE_REMAINDER} <= seen


def test_the_oldest_records_are_forgotten() -> None:
    fates = Fates(Clock(), most_states=2, most_pages=2)
    for name in (b"a", b"b", b"a", b"c"):
        fates.lost(name, CheckpointKind.BRANCH, float("-inf"), End.EVICTED)
        fates.lost_page(name, End.EVICTED)
    assert fates.of_state(b"b") is fates.of_page(b"b") is None
    kept = fates.of_state(b"a")
    assert kept is not None
    assert kept.score is None
    assert fates.of_page(b"c") == (None, End.EVICTED, 100.0, None)


@pytest.mark.slow
def test_records_take_no_more_memory_than_is_stated() -> None:
    clock = Clock()
    fates = Fates(clock)
    tracemalloc.start()
    for number in range(MOST_PAGES + 100):
        name, clock.now = number.to_bytes(16), float(number)
        fates.lost_page(name, End.EVICTED)
        if number < MOST_STATES + 100:
            fates.lost(number.to_bytes(15), CheckpointKind.BRANCH, number / 7, End.EVICTED)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert RECORDS_BYTES / 2 < taken < RECORDS_BYTES, taken
