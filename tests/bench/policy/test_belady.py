import pytest

from hybrid_cache.bench.policy.belady import Belady
from hybrid_cache.bench.policy.bound import bound
from hybrid_cache.bench.policy.replay import Simulation
from hybrid_cache.bench.traces.trace import Trace, TraceRequest
from hybrid_cache.bench.traces.workloads import make_workload
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.kernels.grid import TILE
from tests.bench.policy.test_replay import HYBRID, prompt, sizes
from tests.cache.driver import COST


def hits(requests: list[TraceRequest], *, slots: int, pages: int) -> list[int]:
    page, slot = sizes(HYBRID)
    trace = Trace("by hand", TILE, tuple(requests))
    simulation = Simulation(trace, HYBRID, COST, slots * slot + pages * page, Belady(trace))
    return (simulation.run(simulation.cache.check).hit_tokens // TILE).tolist()


def test_states_lie_where_a_later_request_leaves_the_path() -> None:
    requests = [prompt(1, 2, 3, 4), prompt(1, 2, 9), prompt(1, 2, 3, 7)]
    assert hits(requests, slots=20, pages=40) == [0, 2, 3]


def test_what_is_asked_for_last_goes_first_and_what_is_never_asked_for_is_not_kept() -> None:
    requests = [prompt(1), prompt(2), prompt(3), prompt(4), prompt(2), prompt(1), prompt(2)]
    kept = hits(requests, slots=2, pages=5)
    assert kept[4] == 1, "2 comes back first"
    assert kept[6] == 1


def test_it_finds_the_next_request_after_one_that_did_not_fit() -> None:
    long = prompt(*range(50, 90))
    requests = [prompt(1, 2), long, prompt(1, 2), long, prompt(1, 2)]
    assert hits(requests, slots=4, pages=8) == [0, 0, 2, 0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_it_saves_more_than_lru_and_no_more_than_the_bound(seed: int) -> None:
    trace = make_workload("chat", seed=seed, scale=0.05, page_tokens=256)
    page, slot = sizes(HYBRID)
    num_pages = len({page for r in trace.requests for page in r.pages.tolist()})
    budget = num_pages * 4 * page // 3 + 4 * slot
    saved = [Simulation(trace, HYBRID, COST, budget, p).run().flops_saved_share for p in (LRU(), Belady(trace))]
    most = bound(trace, COST, 4 * page, slot, budget).flops_saved
    assert saved[0] < saved[1] <= most * (1 + 1e-9)
