"""Fleets on paper: who is sent where, what a router knows and when, and what is counted."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid_cache.bench.fleet.failures import Failure, failures_of
from hybrid_cache.bench.fleet.fleet import Fleet, Plan, repeated
from hybrid_cache.bench.fleet.paper_disk import DiskSpeed
from hybrid_cache.bench.fleet.routers import Affinity, Ask, Deaf, Places, UsablePrefix, make_router
from hybrid_cache.bench.policy.cells import Setting, Speed, simulation
from hybrid_cache.bench.traces.trace import Mark, Trace, TraceRequest
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.tools.presets import model_shape

SPEED = Speed(0.01, 1e9)
ROOM = 1 << 27


def prompt(at_s: float, *pages: int, session: str = "") -> TraceRequest:
    n = len(pages) * TILE + 1
    marks = (Mark(n, "user"),)
    return TraceRequest(at_s, session, np.array(pages, np.int32), n, 0, n, hash(pages), marks)


def setting(*requests: TraceRequest, speed: Speed = SPEED) -> Setting:
    return Setting.of(Trace("by hand", TILE, requests), model_shape("embedded"), speed)


class Told(Deaf):
    """Sends requests where it is told to, and remembers what it heard."""

    hears = True

    def __init__(self, *where: int) -> None:
        self.where, self.places = list(where), Places()
        self.known: list[int] = []  # prefixes, at each request
        self.asks: list[Ask] = []
        self.stored, self.removed, self.cleared = self.places.add, self.places.remove, self.places.clear  # type: ignore[method-assign]

    def choose(self, ask: Ask) -> int:
        self.known.append(len(self.places))
        self.asks.append(ask)
        return self.where[len(self.asks) - 1]


def conversation(first: int, at_s: float, turns: int) -> list[TraceRequest]:
    pages = range(first, first + turns)
    return [prompt(at_s + 100 * n, *pages[: n + 1], session=str(first)) for n in range(turns)]


def merged(*talks: list[TraceRequest]) -> list[TraceRequest]:
    return sorted((r for talk in talks for r in talk), key=lambda r: r.arrival_s)


def test_a_fleet_of_one_saves_what_one_cache_saves() -> None:
    s = setting(*merged(conversation(0, 0, 5), conversation(100, 1, 5)))
    for capacity in (1 << 21, ROOM):
        fleet = Fleet(s, Plan(1, capacity, "lru"), Told())
        assert fleet.run().hit_tokens == simulation(s, capacity, LRU()).run().hit_tokens.sum()


def test_a_turn_that_goes_elsewhere_finds_nothing() -> None:
    talk = conversation(0, 0, 3)
    same = Fleet(setting(*talk), Plan(2, ROOM, "lru"), Told(0, 0, 0)).run()
    apart = Fleet(setting(*talk), Plan(2, ROOM, "lru"), Told(0, 1, 0)).run()
    assert same.hit_tokens == (1 + 2) * TILE
    assert apart.hit_tokens == 1 * TILE


def test_what_a_replica_has_is_heard_of_after_the_delay() -> None:
    router = Told(0, 0, 0)
    requests = [prompt(0.0, 1, 2), prompt(0.5, 7), prompt(1.0, 8)]
    Fleet(setting(*requests), Plan(2, ROOM, "lru", event_delay_s=1.0), router).run()
    assert router.known == [0, 0, 2]


def test_a_failed_replica_is_away_for_a_while_and_has_lost_its_memory() -> None:
    router, failures = Told(0, 0, 0, 0), (Failure(150.0, 0, 100.0),)
    fleet = Fleet(setting(*conversation(0, 0, 4)), Plan(3, ROOM, "lru", failures=failures), router)
    tally = fleet.run()
    assert [list(ask.up) for ask in router.asks] == [[0, 1, 2], [0, 1, 2], [1, 2], [0, 1, 2]]
    assert (tally.num_failures, tally.hit_tokens) == (1, (1 + 0 + 3) * TILE)
    assert tally.lost_bytes > 0


@pytest.fixture
def open_fleets() -> Iterator[ExitStack]:
    with ExitStack() as fleets:
        yield fleets


def disks(
    fleets: ExitStack, shared: bool, *where: int, failures: tuple[Failure, ...] = (), speed: float = 1e12
) -> Fleet:
    slow = Speed(0.0, 1e6)
    plan = Plan(2, ROOM, "lru", 0.0, failures, 1 << 26, shared, DiskSpeed(speed))
    fleet = Fleet(setting(*conversation(0, 0, len(where)), speed=slow), plan, Told(*where))
    return fleets.enter_context(closing(fleet))


def test_a_shared_disk_has_what_another_replica_wrote(open_fleets: ExitStack) -> None:
    shared, own = disks(open_fleets, True, 0, 1, 1), disks(open_fleets, False, 0, 1, 1)
    with_it, without = shared.run(), own.run()
    assert with_it.hit_tokens == (1 + 2) * TILE
    assert with_it.moved_bytes == with_it.read_bytes > 0
    assert (without.hit_tokens, without.moved_bytes) == (2 * TILE, 0)


def test_a_disk_outlives_a_failure_of_its_replica(open_fleets: ExitStack) -> None:
    fleet = disks(open_fleets, False, 0, 0, 0, failures=(Failure(150.0, 0, 0.0),))
    tally = fleet.run()
    assert tally.hit_tokens == (1 + 2) * TILE
    assert tally.read_bytes > 0


def test_a_disk_that_is_slower_than_computing_is_not_read(open_fleets: ExitStack) -> None:
    fleet = disks(open_fleets, True, 0, 1, 1, speed=1.0)
    assert fleet.run().read_bytes == 0


def ask(names: list[bytes], up: list[int], busy: list[float], lately: list[float] | None = None) -> Ask:
    late = lately or [0.0] * len(busy)
    return Ask(names, b"talk", up, busy, late, late, lambda pages: float(len(names) - pages))


NAMES = [bytes([n]) for n in range(4)]


def test_usable_prefix_goes_to_the_deepest_but_waits_no_longer_than_it_saves() -> None:
    router = UsablePrefix(3, 0)
    router.stored(1, NAMES[:3])
    router.stored(2, NAMES[:1])
    assert router.choose(ask(NAMES, [0, 1, 2], [0, 0, 0])) == 1
    assert router.choose(ask(NAMES, [0, 1, 2], [0, 1.9, 0])) == 1
    assert router.choose(ask(NAMES, [0, 1, 2], [0, 2.1, 0])) == 2
    assert router.choose(ask(NAMES, [0, 2], [0, 0, 1.5])) == 0
    assert router.choose(ask(NAMES, [0, 1, 2], [0, 0, 0], [0, 9, 0])) == 2  # busier of late than the mean, by far
    router.removed(1, reversed(NAMES[:3]))
    assert router.choose(ask(NAMES, [0, 1, 2], [0, 0, 0])) == 2


def test_places_agree_with_a_walk_through_each_replica() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        places, depths = Places(), rng.integers(0, 5, 6).tolist()
        for replica, depth in enumerate(depths):
            places.add(replica, NAMES[:depth])
        gone = int(rng.integers(0, 6))
        places.clear(gone)
        depths[gone] = 0
        found = {i: n for n, bits in places.depths(NAMES) for i in range(6) if bits >> i & 1}
        assert found == {i: depth for i, depth in enumerate(depths) if depth}


def test_affinity_moves_only_the_conversations_of_who_is_gone() -> None:
    router, everyone = Affinity(8, 0), list(range(8))
    asks = [replace(ask(NAMES, everyone, [0.0] * 8), conversation=str(n).encode()) for n in range(400)]
    before = [router.choose(each) for each in asks]
    after = [router.choose(replace(each, up=[i for i in everyone if i != 3])) for each in asks]
    moved = [a != b for a, b in zip(before, after, strict=True)]
    assert moved == [b == 3 for b in before]
    assert min(before.count(i) for i in everyone) > 20


def test_a_trace_comes_again_as_other_conversations() -> None:
    once = conversation(0, 0, 3)
    again = list(repeated(Trace("by hand", TILE, tuple(once)), 3))
    assert len(again) == 9
    assert [r.arrival_s for r in again] == sorted(r.arrival_s for r in again)
    assert len({int(page) for r in again for page in r.pages}) == 3 * 3
    assert len({r.session for r in again}) == 3


def test_failures_come_at_the_rate_that_was_asked_for() -> None:
    found = failures_of("10s:1s", 4, 0.0, 10_000.0, seed=1)
    assert 4 * 10_000 / 11 * 0.9 < len(found) < 4 * 10_000 / 11 * 1.1
    assert [f.at_s for f in found] == sorted(f.at_s for f in found)
    assert failures_of("5s@1,2s@0:3s,1s@7", 2, 100.0, 200.0, 0) == [Failure(102.0, 0, 3.0), Failure(105.0, 1, 0.0)]


@pytest.mark.parametrize("text", ["soon", "0s", "3@1", "10s@", "1s@x", "1ms"])
def test_failures_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("@")[0]):
        failures_of(text, 4, 0.0, 1e6, 0)


def test_a_router_of_ones_own_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "class Last(Deaf):\n def choose(self, ask): return ask.up[-1]\n"
    (tmp_path / "own_router_of_a_test.py").write_text(f"from hybrid_cache.bench.fleet.routers import Deaf\n{own}")
    monkeypatch.syspath_prepend(str(tmp_path))
    router = make_router("own_router_of_a_test:Last", 3, 0)
    assert router.choose(ask(NAMES, [0, 2], [0, 0, 0])) == 2
    with pytest.raises(ConfigError, match="Lost"):
        make_router("own_router_of_a_test:Lost", 3, 0)
    with pytest.raises(ConfigError, match="'nowhere'"):
        make_router("nowhere", 3, 0)
