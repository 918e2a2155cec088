"""The default policy: what it remembers, what it learns from it, and in which order states go."""

import math
from itertools import pairwise

import numpy as np
import pytest

from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.policies.base import Outline, Wish, Worth
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.places import ODDS, SIZES, Place, PlaceMemory, log2_bin
from hybrid_cache.cache.policies.returns import EDGES, NUM_BUCKETS, WIDTHS, Lives, ReturnModel, buckets, gittins
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Boundary
from tests.cache.at_once import HybridCache
from tests.cache.driver import COST, SPECS, Clock, begin, fill, forward, new_cache, tokens_of

END = CheckpointKind.MESSAGE_END


def outline(pages: str, *, start: int = 0, shared: int = 0, **more: object) -> Outline:
    """A prompt of one page for each letter, and one token more."""
    return Outline(keys(pages, b"x"), start * TILE, shared * TILE, TILE, **more)  # type: ignore[arg-type]


def keys(pages: str, tail: bytes, namespace: str = "") -> Keys:
    return Keys(namespace, [page.encode() for page in pages], tail, len(pages) * TILE + bool(tail))


def memory() -> PlaceMemory:
    return PlaceMemory(ReturnModel(ODDS, tuple(SIZES.values())))


def ends(*positions: int) -> list[Wish]:
    return [Wish(position * TILE, END) for position in positions]


def at(places: PlaceMemory, pages: str, position: int) -> Place:
    """The place after some of the pages of a prompt."""
    place = places.get(outline(pages).name(position * TILE))
    assert place is not None
    return place


# Rates and indices


def test_ages_fall_into_buckets_that_double() -> None:
    ages = np.array([0.0, 0.99, 1.0, 1.5, 2.0, 63.0, 64.0, 1e9])
    assert buckets(ages).tolist() == [0, 0, 1, 1, 2, 6, 7, NUM_BUCKETS - 1]
    assert all(EDGES[b] <= a for a, b in zip(ages, buckets(ages), strict=True))


def test_a_constant_rate_is_its_own_index() -> None:
    assert np.allclose(gittins(np.full(NUM_BUCKETS, 0.01)), 0.01)


def test_an_index_is_the_best_ratio_over_all_times_to_stop() -> None:
    rates = np.random.default_rng(0).uniform(1e-4, 1e-1, NUM_BUCKETS) / (1 + EDGES[:-1])
    index = gittins(rates)
    for first in range(NUM_BUCKETS):
        ratios = []
        for stop in range(first + 1, NUM_BUCKETS + 1):
            survival = np.exp(-np.concatenate([[0.0], np.cumsum(rates[first:stop] * WIDTHS[first:stop])]))
            held = sum((a - b) / r for (a, b), r in zip(pairwise(survival), rates[first:stop], strict=True))
            ratios.append((1 - survival[-1]) / held)
        assert index[first] == pytest.approx(max(ratios))


def test_what_is_about_to_return_is_worth_keeping_before_it_does() -> None:
    rates = np.full(NUM_BUCKETS, 1e-6)
    rates[6] = 0.1  # between 32 and 64 seconds
    index = gittins(rates)
    assert index[0] > 100 * rates[0]
    assert (np.diff(index[:7]) > 0).all()
    assert index[7] == pytest.approx(1e-6)


def test_one_index_is_the_same_with_and_without_arrays() -> None:
    model, rng = ReturnModel((1.0, 1.0), (3, 4)), np.random.default_rng(1)
    for i in range(200):
        life = model.begin(i % 2, [i % 3, i % 4], float(i))
        if rng.random() < 0.5:
            model.end(i % 2, life, i + rng.exponential(30.0))
    model.fit(400.0)
    groups, features = rng.integers(0, 2, 50), np.stack([rng.integers(0, 3, 50), rng.integers(0, 4, 50)], axis=1)
    ages = rng.exponential(200.0, 50)
    want = model.index(groups, model.level(groups, features), ages)
    got = [model.index_of(int(g), f.tolist(), float(a)) for g, f, a in zip(groups, features, ages, strict=True)]
    assert np.allclose(got, want, rtol=1e-12)


def test_the_model_finds_the_rates_behind_what_it_sees() -> None:
    """Two kinds of places return after 50 and after 500 seconds on average; some are still waiting at the end."""
    model, rng, now = ReturnModel((1.0,), (2,)), np.random.default_rng(2), 0.0
    open_lives = []
    for i in range(3000):
        now = i * 1.0
        open_lives.append((now + rng.exponential(50.0 if i % 2 else 500.0), model.begin(0, [i % 2], now)))
        for end, life in [o for o in open_lives if o[0] <= now]:
            model.end(0, life, end)
        open_lives = [o for o in open_lives if o[0] > now]
    for _ in range(4):
        model.fit(now)
    slow, fast = model.index_of(0, [0], 16.0), model.index_of(0, [1], 16.0)
    assert fast == pytest.approx(1 / 50, rel=0.3)
    assert slow == pytest.approx(1 / 500, rel=0.4)


def test_nobody_returns_and_the_model_says_so() -> None:
    model = ReturnModel((1.0,), (1,))
    before = model.index_of(0, [0], 0.0)
    for i in range(500):
        model.begin(0, [0], float(i))
    model.fit(5000.0)
    assert model.index_of(0, [0], 0.0) < before / 20


def test_before_anything_is_known_the_older_is_worth_less() -> None:
    model = ReturnModel((1.0,), (1,))
    indices = [model.index_of(0, [0], age) for age in (0.0, 30.0, 100.0, 1000.0, 10000.0)]
    assert indices == sorted(indices, reverse=True)


def test_what_was_used_after_the_clock_was_read_is_worth_what_is_used_now() -> None:
    model = ReturnModel((1.0,), (1,))
    for i in range(100):  # all return after three seconds, so that waiting makes a place worth more at first
        model.end(0, model.begin(0, [0], 10.0 * i), 10.0 * i + 3.0)
    model.fit(1000.0)
    now = model.index_of(0, [0], 0.0)
    assert model.index_of(0, [0], 2.0) > now > 0
    assert model.index_of(0, [0], -20.0) == now
    nothing, ages = np.zeros(1, np.int64), np.array([-20.0])
    assert model.index(nothing, model.level(nothing, np.zeros((1, 1), np.int64)), ages)[0] == pytest.approx(now)


# Places


def test_a_prompt_returns_to_the_deepest_place_it_runs_through() -> None:
    places = memory()
    places.visit(outline("ab"), ends(1, 2), 0.0)
    found = places.visit(outline("abc"), ends(3), 10.0)
    assert found is places.get(outline("ab").name(2 * TILE))
    assert found is not None
    assert (found.uses, found.since) == (1, 10.0)
    assert places.visit(outline("ax"), [], 20.0) is places.get(outline("a").name(TILE))


def test_a_place_that_leaves_nothing_to_compute_is_not_returned_to() -> None:
    places = memory()
    places.visit(outline("ab"), ends(1, 2), 0.0)
    whole = Outline(keys("ab", b""), 0, 0, TILE)  # another prompt: the first had one token more
    assert places.visit(whole, [], 1.0) is places.get(whole.name(TILE))


@pytest.mark.parametrize("why", ["generated", "again"])
def test_commits_and_preempted_prompts_are_not_returns(why: str) -> None:
    places = memory()
    places.visit(outline("ab"), ends(2), 0.0)
    assert places.visit(outline("abc", **{why: True}), ends(3), 1.0) is None
    assert places.get(outline("abc").name(3 * TILE)) is not None


def test_the_state_that_was_used_counts_as_returned_to_beside_the_deepest_place() -> None:
    places = memory()
    places.visit(outline("abcd"), ends(1, 4), 0.0)
    places.visit(outline("abcde", start=1), ends(5), 5.0)
    assert at(places, "abcd", 1).uses == at(places, "abcd", 4).uses == 1


def test_a_place_is_branched_once_a_second_chain_has_passed() -> None:
    places = memory()
    places.visit(outline("abcd"), ends(1, 4), 0.0)
    places.visit(outline("abcde", start=1), ends(5), 5.0)
    above, deepest = at(places, "abcd", 1), at(places, "abcd", 4)
    assert (above.branched, deepest.branched) == (False, False)
    places.visit(outline("abxy"), ends(4), 6.0)  # returns to the first page: nothing deeper of it is known
    assert (above.branched, deepest.branched) == (True, False)


def test_after_a_restart_conversations_are_not_taken_for_one_chain() -> None:
    before, after = memory(), memory()
    before.visit(outline("abc"), ends(1, 3), 0.0)
    before.visit(outline("axyz"), ends(4), 1.0)
    after.take(before.arrays(2.0), 2.0)
    after.visit(outline("abcd"), ends(4), 3.0)
    after.visit(outline("axyzq"), ends(5), 4.0)
    assert at(after, "abc", 3).chain != at(after, "axyz", 4).chain
    assert not at(after, "abc", 3).branched
    assert at(after, "abc", 1).branched, "two passed it before"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("u", "w") for value in (math.nan, math.inf, 1e9)),
        ("lives.0.count", -1.0),
        ("lives.0.features", -1.0),
        ("lives.4.features", 99.0),
        ("lives.0.start", math.nan),
        ("lives.0.end", math.inf),
        ("places.features", -1.0),
        ("places.features", 99.0),
        ("places.since", math.nan),
        ("places.since", -math.inf),
        ("places.uses", -1.0),
        ("places.lives", 1e30),
        ("places.branched", 2.0),
        ("places.names", 256.0),
    ],
)
@pytest.mark.parametrize("how", ["changed", "shorter", "missing", "deep"])
def test_what_was_remembered_and_makes_no_sense_changes_nothing(name: str, value: float, how: str) -> None:
    before, after = memory(), memory()
    for places, prompts in ((before, ("abc", "abc", "abcd", "abcd", "abcd")), (after, ("x", "xy"))):
        for now, prompt in enumerate(prompts):
            places.visit(outline(prompt), ends(1, len(prompt)), float(now))
    arrays = {each: array.astype(np.float64) for each, array in before.arrays(9.0).items()}
    if how == "changed":
        arrays[name].reshape(-1)[0] = value
    elif how == "shorter":
        arrays[name] = arrays[name][:-1]
    elif how == "deep":
        arrays[name] = arrays[name][None]
    else:
        del arrays[name]
    had = {each: array.tolist() for each, array in after.arrays(9.0).items()}
    with pytest.raises(ValueError, match=r"lives|places|^u|^w|no [uw]"):
        after.take(arrays, 9.0)
    assert {each: array.tolist() for each, array in after.arrays(9.0).items()} == had


def test_a_life_that_has_not_begun_is_nobodys() -> None:
    lives = Lives(1, 4)
    first = lives.begin([0], 0.0)
    assert (lives.row(first), lives.row(first + 1), lives.row(-4)) == (0, None, None)


def test_the_tip_of_a_chain_is_where_its_last_prompt_ended_or_its_answer() -> None:
    places = memory()
    places.visit(outline("ab"), ends(1, 2), 0.0)
    first, second = at(places, "ab", 1), at(places, "ab", 2)
    assert places.tip(first) is places.tip(second) is second
    places.visit(outline("abc", start=2, generated=True), ends(3), 1.0)
    places.visit(outline("abcd", start=3), ends(4), 2.0)
    tip = at(places, "abcd", 4)
    assert all(places.tip(place) is tip for place in (first, second, at(places, "abc", 3), tip))
    assert len({place.chain for place in (second, tip)}) == 1
    places.visit(outline("aq"), ends(2), 3.0)  # another chain passes the first place: that is where it leads now
    assert places.tip(first) is at(places, "aq", 2)
    assert places.tip(second) is tip


def test_no_chain_leads_back_when_a_client_wants_states_only_at_an_earlier_mark() -> None:
    places = memory()
    first, tip = Wish(TILE, CheckpointKind.EXPLICIT), Wish(3 * TILE, END)
    places.visit(outline("abc"), [first, tip], 0.0)
    places.visit(outline("abcd", only_marked=True), [first], 1.0)  # it finds the end and leaves the mark once more
    assert at(places, "abc", 3).onward is None
    assert places.tip(at(places, "abc", 1)) is at(places, "abc", 3)


def test_chains_lead_only_to_deeper_places_whatever_is_wished_for() -> None:
    rng, places = np.random.default_rng(5), memory()
    for now in range(2000):
        pages = "".join(rng.choice(list("ab"), rng.integers(1, 7)))
        wished = sorted(rng.choice(range(1, len(pages) + 1), rng.integers(0, len(pages) + 1), replace=False).tolist())
        start = int(rng.integers(0, wished[0])) if wished else 0
        places.visit(outline(pages, start=start), ends(*wished), float(now))
        for place in places._places.values():
            seen = {place}
            while (place := place.onward or place) not in seen:
                seen.add(place)
            assert place.onward is None, "it leads in a circle"


def test_a_clock_that_goes_back_or_on_for_ever_is_no_error_and_gives_a_feature() -> None:
    assert [log2_bin(value, 12) for value in (-1e9, -1.0, -0.9, math.nan, 0.0)] == [0] * 5
    assert [log2_bin(value, 12) for value in (1.0, 3.0, 4094.0, 1e300, math.inf)] == [1, 2, 11, 12, 12]
    places = memory()
    for now in (1000.0, 999.1, 5.0, -1e9):
        places.visit(outline("ab"), ends(1, 2), now)
    assert all(0 <= value < size for value, size in zip(at(places, "ab", 2).features, SIZES.values(), strict=True))


def test_a_prompt_that_goes_on_from_the_prompt_instead_of_its_answer_is_of_the_same_chain() -> None:
    places = memory()
    places.visit(outline("ab"), ends(2), 0.0)
    places.visit(outline("abc", start=2, generated=True), ends(3), 1.0)
    places.visit(outline("abx", start=2), ends(3), 2.0)  # the client sends the answer back in other words
    assert at(places, "abx", 3).chain == at(places, "ab", 2).chain
    assert places.branching == 0.0


def test_branching_is_the_share_of_returns_to_places_that_were_passed_before() -> None:
    places = memory()
    places.visit(outline("abc"), ends(1, 3), 0.0)
    for prompt, branching in (("abcd", 0.0), ("axy", 1 / 3), ("auv", 2 / 4), ("auvw", 2 / 5)):
        places.visit(outline(prompt), ends(len(prompt)), 1.0)
        assert places.branching == branching, prompt


def test_places_of_one_tenant_are_not_returned_to_by_another() -> None:
    places = memory()
    places.visit(outline("ab"), ends(2), 0.0)
    other = Outline(keys("abc", b"x", "tenant"), 0, 0, TILE)
    assert places.visit(other, [], 1.0) is None


def test_a_place_knows_its_message_and_how_far_from_the_end_it_is() -> None:
    places = memory()
    boundaries = tuple(Boundary(p * TILE, role=r) for p, r in ((1, "system"), (2, "user"), (3, "tool")))
    places.visit(outline("abc", boundaries=boundaries), ends(1, 2, 3), 0.0)
    names = list(SIZES)
    seen = [places.get(outline("abc").name(p * TILE)) for p in (1, 2, 3)]
    rows = [dict(zip(names, place.features, strict=True)) for place in seen if place]
    assert [(row["role"], row["from_end"]) for row in rows] == [(1, 2), (2, 1), (4, 0)]


# Order


def cache_with(policy: Learned, clock: Clock, slots: int, pages: int) -> HybridCache:
    return new_cache(SPECS["slot of four pages"], slots=slots, pages=pages, policy=policy, clock=clock)


def test_before_anything_is_learned_the_oldest_goes_first() -> None:
    clock = Clock()
    cache = cache_with(Learned(), clock, slots=4, pages=5)
    for prompt in ("a", "b", "c", "d"):
        run = begin(cache, tokens_of(prompt, 1))
        cache.propose(run.lease)
        cache.reserve_checkpoint(run.lease, TILE, END)
        forward(cache, run, TILE + 1)
        cache.publish(run.lease, TILE)
        cache.release(run.lease)
        cache.check()
        clock.now += 60.0
    kept = [p for p in "abcd" if cache.match("", tokens_of(p, 1)).length]
    assert kept[-1] == "d"
    assert "a" not in kept


def test_the_state_above_takes_over_the_prospects_of_one_that_has_gone() -> None:
    policy, clock = Learned(), Clock()
    cache = cache_with(policy, clock, slots=20, pages=40)
    fill(cache, tokens_of("abc", 1), TILE)
    clock.now += 5000.0
    admitted = begin(cache, tokens_of("x", 1))
    cache.propose(admitted.lease)  # scores change when a prompt is admitted
    cache.release(admitted.lease)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    path = cache.match("", tokens_of("abcdef", 1)).path
    above, deep = path[0].checkpoint, path[5].checkpoint
    assert above is not None
    assert deep is not None
    before = policy._score(policy._rows[above])
    cache.pool.evict(deep)
    cache.check()
    assert policy._score(policy._rows[above]) > 2 * before


def test_a_new_end_takes_the_place_of_what_it_was_resumed_from_unless_others_branch_off_there() -> None:
    policy = Learned()
    cache = cache_with(policy, Clock(), slots=20, pages=40)
    fill(cache, tokens_of("abcdef", 1), 6 * TILE)
    run = begin(cache, tokens_of("abcdefg", 1))
    cache.propose(run.lease)
    source = policy._memory.get(run.lease.keys.names[6])
    assert source is not None
    assert source.kept is not None
    policy.add(source.kept)  # its worth has risen
    kept, little = policy._score(policy._rows[source.kept]), Worth(1e-3, 1)
    assert policy._raised(kept / 2, little, source) == kept
    assert policy._raised(2 * kept, little, source) == 2 * kept
    source.branched = True
    assert policy._raised(kept / 2, little, source) == kept / 2
    source.branched = False
    policy._memory.num_returns = policy._memory.num_branches = 99
    assert policy._raised(kept / 2, little, source) == kept / 2
    assert policy._raised(kept / 2, Worth(1e12, 1), source) == kept


def test_victims_come_in_order_whatever_changes_meanwhile() -> None:
    """The shortlist against scores computed one by one, through random uses, lapses of time and evictions."""
    rng, clock, policy = np.random.default_rng(3), Clock(), Learned()
    cache = cache_with(policy, clock, slots=60, pages=300)
    for step in range(250):
        prompt = "".join(rng.choice(list("abcd"), rng.integers(1, 6)))
        run = begin(cache, tokens_of(prompt, 1))
        for wish in cache.propose(run.lease):
            slot = cache.reserve_checkpoint(run.lease, wish.position, wish.kind)
            if slot is not None:
                run.reserved[wish.position] = slot
        forward(cache, run, len(run.tokens))
        cache.publish(run.lease, len(prompt) * TILE)
        cache.release(run.lease, num_output_tokens=int(rng.integers(1, 300)))
        clock.now += float(rng.exponential(20.0))
        lowest = policy.lowest()
        if lowest is None:
            continue
        score, kept = lowest
        assert score == pytest.approx(policy._score(policy._rows[kept]))
        n = len(policy._kept)
        if n <= 64:  # the eight lowest are on the shortlist, and it is fresh
            fresh = sorted(policy._score(row) for row in range(n))
            assert score <= fresh[min(n - 1, 8)]
        if step % 5 == 0:
            cache.pool.evict(kept, score)
        cache.check()


def test_a_score_is_never_infinite_or_negative() -> None:
    policy = Learned()
    cache = cache_with(policy, Clock(), slots=20, pages=40)
    fill(cache, tokens_of("abcdef", 1), TILE, 6 * TILE, end=True)
    assert all(0 <= policy._score(row) < math.inf for row in range(len(policy._kept)))
    assert COST.flops(0, TILE) > 0


def test_a_place_that_is_returned_to_outlives_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.cache.policies.places.MOST_PLACES", 8)
    places = memory()
    places.visit(outline("s"), ends(1), 0.0)
    system, idle = outline("s").name(TILE), outline("x").name(TILE)
    places.visit(outline("x"), ends(1), 0.0)
    for i, letter in enumerate("abcdefgh"):
        places.visit(outline("s" + letter), ends(2), 1.0 + i)
    place = places.get(system)
    assert place is not None
    assert place.uses == 8
    assert places.get(idle) is None


def test_an_exact_repeat_returns_to_the_end_of_the_prompt() -> None:
    places = memory()
    places.visit(outline("ab"), ends(2), 0.0)
    assert places.visit(outline("ab"), [], 1.0) is places.get(outline("ab").end_name)
    other = Outline(keys("ab", b"y"), 0, 0, TILE)
    assert places.visit(other, [], 2.0) is places.get(outline("ab").name(2 * TILE))
