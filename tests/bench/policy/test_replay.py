"""Replays: what they count, and where policies stand between nothing, the best plan and the bound."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_cache.bench.policy.bound import bound
from hybrid_cache.bench.policy.replay import Replay, Simulation
from hybrid_cache.bench.traces.trace import Mark, Trace, TraceRequest
from hybrid_cache.bench.traces.workloads import make_workload
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.marconi import Marconi
from hybrid_cache.cache.policies.registry import make_policy, policy_names
from hybrid_cache.cache.policies.signals import Finish, Origin
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost
from tests.bench.policy.optimum import PAGE_TOKENS, best_saving
from tests.bench.policy.test_bound import tiny_trace
from tests.cache.driver import COST, SPECS
from tests.cache.observing import Observing

MOONCAKE = Path(__file__).parents[4] / "shared/data/traces/mooncake/conversation_trace.t_lt_2100s.jsonl.gz"
HYBRID = SPECS["slot as large as a page"]
PER_TOKEN = PrefillCost(per_token=100.0, per_token_per_position=0.0)


def sizes(spec: CacheSpec) -> tuple[int, int]:
    """Bytes of a page and of a state."""
    geometry = Geometry.of(spec, 1 << 40)
    return geometry.stride_bytes(Kind.PAGE), geometry.stride_bytes(Kind.SLOT)


def prompt(*pages: int, arrival_s: float = 0.0, extra: int = 1) -> TraceRequest:
    n = len(pages) * TILE + extra
    return TraceRequest(arrival_s, "", np.array(pages, np.int32), n, 0, n, hash((pages, extra)), (Mark(n, "user"),))


def replay(requests: list[TraceRequest], *, slots: int = 50, pages: int = 100, concurrency: int = 1) -> Replay:
    page, slot = sizes(HYBRID)
    trace = Trace("by hand", TILE, tuple(requests))
    return Simulation(trace, HYBRID, COST, slots * slot + pages * page, LRU(), concurrency).run()


def test_a_longer_prompt_goes_on_where_the_shorter_one_ended() -> None:
    result = replay([prompt(1, 2), prompt(1, 2, 3), prompt(1, 2, 3, 4), prompt(9)])
    assert result.hit_tokens.tolist() == [0, 2 * TILE, 3 * TILE, 0]
    assert result.flops_saved == COST.flops(0, 2 * TILE) + COST.flops(0, 3 * TILE)


def test_two_that_part_inside_a_message_share_a_state_from_the_third_on() -> None:
    result = replay([prompt(1, 2, 3), prompt(1, 2, 4), prompt(1, 2, 5)])
    assert result.hit_tokens.tolist() == [0, 0, 2 * TILE]


def test_a_known_answer_is_there_for_the_next_turn() -> None:
    first = replace(prompt(1, 2), pages=np.array([1, 2, 3], np.int32), num_known_tokens=3 * TILE, num_output_tokens=63)
    assert replay([first, prompt(1, 2, 3, 4)]).hit_tokens.tolist() == [0, 3 * TILE]


def test_a_prompt_that_does_not_fit_is_computed_without_the_cache() -> None:
    result = replay([prompt(1), prompt(*range(1, 90)), prompt(1)], slots=3, pages=5)
    assert result.hit_tokens[1] == 0
    assert result.flops_total == sum(COST.flops(0, n) for n in (65, 89 * 64 + 1, 65))


def test_requests_in_progress_keep_their_pages_from_being_evicted() -> None:
    """With room for two prompts, a third waits for the first to end, not the second."""
    requests = [prompt(1, 2, 3), prompt(4, 5, 6), prompt(7, 8, 9), prompt(4, 5, 6, 10)]
    assert replay(requests, slots=4, pages=8, concurrency=2).hit_tokens[3] == 3 * TILE


@pytest.mark.parametrize("num_traces", [15, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", policy_names())
def test_a_policy_saves_no_more_than_the_best_plan_and_that_no_more_than_the_bound(name: str, num_traces: int) -> None:
    for seed in range(num_traces // 3 if name == "marconi" else num_traces):  # it replays all it has seen 21 times
        rng = random.Random(f"{name} {seed}")
        small = tiny_trace(rng)
        scale = TILE // PAGE_TOKENS
        requests = tuple(
            replace(
                r,
                arrival_s=10.0 * i,
                num_prompt_tokens=scale * r.num_prompt_tokens,
                num_known_tokens=scale * r.num_known_tokens,
            )
            for i, r in enumerate(small.requests)
        )
        spec = SPECS[rng.choice(["slot of four pages", "slot as large as a page", "page of four slots"])]
        page, slot = sizes(spec)
        budget = rng.randint(2, 5) * slot + rng.randint(2, 8) * page
        policy = make_policy(name, spec, PER_TOKEN, budget)
        trace = Trace("tiny", TILE, requests)
        saved = Simulation(trace, spec, PER_TOKEN, budget, policy, concurrency=rng.choice([1, 1, 2])).run().flops_saved
        best = best_saving(small, replace(PER_TOKEN, per_token=scale * 100.0), page, slot, budget)
        total = sum(PER_TOKEN.flops(0, r.num_prompt_tokens) for r in requests)
        most = bound(trace, PER_TOKEN, page, slot, budget, iterations=50).flops_saved * total
        assert saved <= best * (1 + 1e-9), seed
        assert best <= most * (1 + 1e-9), seed


def test_larger_pages_without_tensors_take_their_bytes() -> None:
    trace = make_workload("few-shot", scale=0.02).coarsened(256)
    page, slot = sizes(HYBRID)
    simulation = Simulation(trace, HYBRID, COST, 40 * slot + 400 * page, Marconi(1.0))
    result = simulation.run()
    simulation.cache.check()
    stats = result.stats
    assert stats.kv_bytes == 4 * page * stats.nodes
    assert stats.free_bytes + stats.kv_bytes + stats.checkpoint_bytes == 40 * slot + 400 * page


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the trace is not part of the project")
def test_blocks_without_states_hit_as_often_as_in_the_reference_study() -> None:
    """A block LRU over prefix blocks, partial last ones included, at 1, 5 and 20 % of all and without a limit."""
    with gzip.open(MOONCAKE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    requests = tuple(
        TraceRequest(r["timestamp"] / 1000, "", np.array(r["hash_ids"], np.int32), n, 0, n, i)
        for i, r in enumerate(rows)
        for n in [512 * len(r["hash_ids"]) + 1]
    )
    spec = CacheSpec((AttentionSpec(8, 128, torch.bfloat16),), 64, torch.bfloat16)
    page, slot = sizes(spec)
    num_tokens = sum(r["input_length"] for r in rows)
    for share, rate in ((0.01, 0.0451), (0.05, 0.1295), (0.2, 0.2946), (2.0, 0.3522)):
        budget = int(share * 110_841 + 1) * 8 * page + slot
        result = Simulation(Trace("mooncake", 512, requests), spec, PER_TOKEN, budget, LRU()).run()
        hits = sum(min(int(hit), r["input_length"]) for hit, r in zip(result.hit_tokens, rows, strict=True))
        assert hits / num_tokens == pytest.approx(rate, abs=0.0012)


def test_what_a_trace_says_of_a_request_is_told_as_a_server_does() -> None:
    said = replace(prompt(1), session="s", agent="a", user="u", tools=True, template="t", finish=Finish.GONE)
    longer = replace(said, pages=np.array([1, 2], np.int32), num_known_tokens=2 * TILE)
    policy, trace = Observing(), Trace("by hand", TILE, (longer, prompt(3)))
    Simulation(trace, HYBRID, COST, 1 << 20, policy).run()
    origin = Origin("s/a", "u", True, "t")
    assert [(each.generated, each.origin) for each in policy.outlines] == [
        (False, origin),
        (True, origin),
        (False, Origin()),
    ]
    assert [(each.finish, each.origin) for each in policy.endings] == [
        (Finish.GONE, origin),
        (Finish.UNKNOWN, Origin()),
    ]
