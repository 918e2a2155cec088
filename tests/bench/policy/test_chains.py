"""The default policy in caches that hold one or two conversations."""

from dataclasses import replace

import pytest

from hybrid_cache.bench.policy.replay import Simulation
from hybrid_cache.bench.traces.trace import Trace, TraceRequest
from hybrid_cache.cache.policies import learned
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.kernels.grid import TILE
from tests.bench.policy.test_replay import prompt, sizes
from tests.cache.driver import COST, SPECS


def hits(
    requests: list[TraceRequest], policy: Learned | LRU, *, slots: int, pages: int, spec: str = "slot of four pages"
) -> list[int]:
    """Pages that each request could skip; one a second."""
    page, slot = sizes(SPECS[spec])
    timed = tuple(replace(r, arrival_s=float(i)) for i, r in enumerate(requests))
    simulation = Simulation(Trace("by hand", TILE, timed), SPECS[spec], COST, slots * slot + pages * page, policy)
    return (simulation.run(simulation.cache.check).hit_tokens // TILE).tolist()


def growing(first: int, lengths: range) -> list[TraceRequest]:
    """A conversation whose prompts go on where the last one ended."""
    return [prompt(*range(first, first + length)) for length in lengths]


def test_a_cache_with_room_for_one_state_follows_a_conversation() -> None:
    turns = growing(0, range(40, 44))
    assert hits(turns, Learned(), slots=2, pages=44) == hits(turns, LRU(), slots=2, pages=44) == [0, 40, 41, 42]


def test_where_prompts_branch_off_that_state_is_not_given_up_for_the_latest() -> None:
    branches = [prompt(*range(8)), *(prompt(*range(8), 100 + 2 * i, 101 + 2 * i) for i in range(30))]
    assert hits(branches, Learned(), slots=2, pages=12)[-20:] == [8] * 20


def test_a_conversation_that_does_not_fit_beside_others_shrinks_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [turn for i in range(60) for turn in (*growing(0, range(30 + i, 31 + i)), *others(i))]
    size = {"slots": 10, "pages": 70, "spec": "slot as large as a page"}
    saved = sum(hits(turns, Learned(), **size))
    monkeypatch.setattr(learned, "STANDS_BY", 0.0)
    assert saved > 1.1 * sum(hits(turns, Learned(), **size))


def others(i: int) -> list[TraceRequest]:
    """Every fourth time a long prompt that never comes back."""
    return [prompt(*range(1000 * i, 1000 * i + 40))] if i % 4 == 3 else []
