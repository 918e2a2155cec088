"""Policies from papers and other servers, in scenarios small enough to work out by hand."""

import math
import random
from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest
import torch

from hybrid_cache.bench.policy.replay import Replay, Simulation
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.bench.traces.workloads import make_workload
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.keys import keys_of
from hybrid_cache.cache.policies import marconi, tail_lru
from hybrid_cache.cache.policies.base import Outline, Policy
from hybrid_cache.cache.policies.gdsf import GDSF
from hybrid_cache.cache.policies.marconi import ALPHAS, KindCosts, Marconi, MarconiArtifact
from hybrid_cache.cache.policies.nothing import Nothing
from hybrid_cache.cache.policies.published import normalised
from hybrid_cache.cache.policies.registry import make_policy, policy_names
from hybrid_cache.cache.policies.sae import SAELike, error_function
from hybrid_cache.cache.policies.seglen import SegLen
from hybrid_cache.cache.policies.sglang_radix import PathLRU, SGLangRadix, SGLangUnified
from hybrid_cache.cache.policies.sparse_prefix import MOST_DEPTHS, SparsePrefix, best_places
from hybrid_cache.cache.policies.tail_lru import TailLRU
from hybrid_cache.cache.policies.value import FlopsPerByteTwo
from hybrid_cache.cache.policies.vllm_block import VLLMAlign, VLLMBlock, VLLMFine, equal_page_tokens
from hybrid_cache.cache.tree import Kept
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tokens import Prompt
from tests.cache.at_once import HybridCache
from tests.cache.driver import COST, KV, SPECS, begin, cache_spec, fill, new_cache, state_spec, tokens_of
from tests.cache.driver import forward as compute
from tests.fakes import SumModel, sum_model_answer

HYBRID = SPECS["slot of four pages"]
PAGE = 1024
SLOT = 4 * PAGE


ELSEWHERE = VLLMBlock | VLLMAlign | SparsePrefix | Nothing  # put states at other places, or none


def published() -> list[Policy]:
    """One of each, freshly made."""
    tuned = Marconi(None, HYBRID, COST, 1 << 20)
    lru = [SGLangRadix(), SGLangUnified(), PathLRU(), TailLRU(), VLLMBlock(TILE), VLLMAlign(TILE), VLLMFine(TILE)]
    return [*lru, tuned, Marconi(0.5), SegLen(), SAELike(), SparsePrefix(), GDSF(), Nothing()]


def roomy(policy: Policy) -> HybridCache:
    return new_cache(HYBRID, slots=20, pages=60, policy=policy)


def serve(cache: HybridCache, pages: str, *, generated: bool = False) -> None:
    """One prompt, with the states that the policy proposes."""
    run = begin(cache, tokens_of(pages, 0 if generated else 1))
    for wish in cache.propose(run.lease, generated=generated):
        slot = cache.reserve_checkpoint(run.lease, wish.position, wish.kind)
        if slot is not None:
            run.reserved[wish.position] = slot
    compute(cache, run, len(run.tokens))
    cache.publish(run.lease, len(run.tokens) // TILE * TILE)
    cache.release(run.lease)
    cache.check()


def hit(cache: HybridCache, pages: str) -> None:
    """A prompt that finds all these pages and is aborted at once."""
    cache.release(begin(cache, tokens_of(pages, 1)).lease)
    cache.check()


def prefix(kept: Kept) -> str:
    """The letters of a state's pages."""
    letters, node = "", kept.node
    while node.parent is not None:
        assert isinstance(node.key, bytes)
        letters = chr(node.key[0]) + letters
        node = node.parent
    return letters


def victims(cache: HybridCache, most: int = 100) -> list[str]:
    """Evicts all states, or so many -> their prefixes in the order in which they went."""
    gone: list[str] = []
    while len(gone) < most:
        while cache.pool.queues.next_dead() is not None:
            cache.pool._evict_next(None)
        lowest = cache.pool.queues.next_scored()
        if lowest is None:
            break
        gone.append(prefix(lowest[1]))
        assert cache.pool._evict_next(None)
        cache.check()
    return gone


def outline(
    num_tokens: int, *, start: int = 0, shared: int = 0, page_tokens: int = TILE, marked: bool = False
) -> Outline:
    keys = keys_of("", np.arange(num_tokens, dtype=np.int32))
    return Outline(keys, start, shared, page_tokens, only_marked=marked)


def positions(policy: Policy, prompt: Outline) -> list[int]:
    return [wish.position for wish in policy.propose(prompt)]


# All of them


@pytest.mark.parametrize("policy", published(), ids=lambda p: p.name)
def test_ends_of_prompts_are_declined(policy: Policy) -> None:
    cache = roomy(policy)
    fill(cache, tokens_of("ab", 5), end=True)
    assert cache.match("", tokens_of("ab", 5)).end is None
    assert cache.stats().declines == {"prompt_end": 1}


@pytest.mark.parametrize("policy", published(), ids=lambda p: p.name)
def test_a_client_that_wants_its_own_marks_only_gets_no_other_state(policy: Policy) -> None:
    assert positions(policy, outline(10 * TILE, shared=5 * TILE, marked=True)) == []


@pytest.mark.parametrize(
    "policy",
    [p for p in published() if isinstance(p, VLLMFine) or not isinstance(p, ELSEWHERE)],
    ids=lambda p: p.name,
)
def test_a_state_is_kept_where_two_requests_part_and_at_the_end(policy: Policy) -> None:
    cache = roomy(policy)
    serve(cache, "abcd")
    serve(cache, "abxy")
    serve(cache, "abz")
    assert cache.match("", tokens_of("abz", 1)).length == 3 * TILE
    assert cache.match("", tokens_of("ab", 1)).length == 2 * TILE
    assert sorted(victims(cache)) == ["ab", "abcd", "abxy", "abz"]


@pytest.mark.parametrize("policy", [p for p in published() if not isinstance(p, Nothing)], ids=lambda p: p.name)
def test_the_newest_always_gets_in(policy: Policy) -> None:
    cache = new_cache(HYBRID, slots=4, pages=10, policy=policy)
    for prompt in ("a", "b", "c", "d", "ef"):
        serve(cache, prompt)
        assert cache.match("", tokens_of(prompt, 1)).length == len(prompt) * TILE


def test_nothing_is_kept_by_none() -> None:
    cache = roomy(Nothing())
    serve(cache, "abcd")
    serve(cache, "abxy")
    assert cache.stats().checkpoints == 0
    assert victims(cache) == []
    assert cache.stats().nodes == 0


# vLLM


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        pytest.param(HYBRID, 128, id="1,928 bytes of state at 16 a token: 120.5, so 128"),
        pytest.param(cache_spec(KV, state_spec(62)), 16, id="256 bytes of state: exactly 16"),
        pytest.param(cache_spec(KV, state_spec(64)), 32, id="264 bytes: 16.5, so 32"),
        pytest.param(SPECS["only states"], 16, id="no attention"),
        pytest.param(SPECS["only attention"], 16, id="no states"),
    ],
)
def test_a_block_takes_as_much_in_one_attention_layer_as_one_state(spec: CacheSpec, tokens: int) -> None:
    assert equal_page_tokens(spec) == tokens


def test_the_blocks_of_a_large_model() -> None:
    """conv 3 * 10,240 * 2 and state 128 * 64 * 128 * 4 bytes are 4,255,744; a token's KV is 4,096: 1,039, so 1,040."""
    mamba = StateSpec(conv_shape=(3, 10_240), state_shape=(128, 64, 128), conv_dtype=torch.bfloat16)
    assert equal_page_tokens(cache_spec(mamba, AttentionSpec(8, 128, torch.bfloat16))) == 1040


def test_vllm_keeps_every_block_that_is_computed() -> None:
    assert positions(VLLMBlock(128), outline(400)) == [128, 256, 384]
    assert positions(VLLMBlock(128), outline(400, start=128, shared=192)) == [256, 384]
    assert positions(VLLMBlock(128), outline(127)) == []


def test_blocks_are_rounded_up_to_pages() -> None:
    assert positions(VLLMBlock(100), outline(400)) == [128, 256, 384]
    assert positions(VLLMBlock(1), outline(200)) == [64, 128, 192]
    assert positions(VLLMBlock(65), outline(1000, page_tokens=512)) == [512]


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_tokens is 0"):
        VLLMBlock(0)


def test_vllm_evicts_the_last_block_of_the_prompt_used_longest_ago() -> None:
    cache = roomy(VLLMBlock(TILE))
    serve(cache, "abc")
    serve(cache, "xy")
    serve(cache, "abd")
    assert victims(cache) == ["abc", "xy", "x", "abd", "ab", "a"]


def test_vllm_finds_nothing_before_the_first_block_ends() -> None:
    cache = roomy(VLLMBlock(2 * TILE))
    serve(cache, "abc")
    assert [cache.match("", tokens_of(p, 1)).length // TILE for p in ("a", "ab", "abc")] == [0, 2, 2]


def test_vllm_align_keeps_the_last_whole_block_only() -> None:
    assert positions(VLLMAlign(128), outline(400)) == [384]
    assert positions(VLLMAlign(128), outline(400, start=128, shared=256)) == [384]
    assert positions(VLLMAlign(128), outline(400, start=384)) == []
    assert positions(VLLMAlign(528), outline(527)) == []


def test_two_prompts_that_part_after_the_last_common_block_share_nothing_under_align() -> None:
    cache, fine = roomy(VLLMAlign(2 * TILE)), roomy(VLLMFine(2 * TILE))
    for c in (cache, fine):
        for prompt in ("abcd", "abxy"):
            serve(c, prompt)
    assert cache.match("", tokens_of("abz", 1)).length == 0
    assert fine.match("", tokens_of("abz", 1)).length == 2 * TILE


def test_fine_ends_lie_on_pages_but_junctions_on_blocks() -> None:
    assert positions(VLLMFine(128), outline(470)) == [448]
    assert positions(VLLMFine(128), outline(470, start=64, shared=192)) == [128, 448]
    assert positions(VLLMFine(128), outline(470, start=128, shared=192)) == [448]


# SGLang


def chain(policy: Policy) -> HybridCache:
    """States at a, then abc below it, then x; then abc is used again."""
    cache = roomy(policy)
    for prompt in ("a", "abc", "x"):
        serve(cache, prompt)
    hit(cache, "abc")
    return cache


def test_sglang_refreshes_the_whole_path_and_evicts_the_deepest_of_it_first() -> None:
    assert victims(chain(SGLangRadix())) == ["x", "abc", "a"]
    assert victims(chain(PathLRU())) == ["x", "a", "abc"]


def test_sglang_leaves_a_state_at_every_chunk_of_a_prefill() -> None:
    assert positions(SGLangUnified(), outline(20_000, start=64)) == [64 + 8192 - 64 % 64, 64 + 16384, 19_968]
    assert positions(SGLangUnified(), outline(8192)) == [8192]
    assert positions(SGLangUnified(), outline(9000, marked=True)) == []


@pytest.mark.parametrize("policy", [SGLangUnified(), Marconi(0.0)], ids=lambda p: p.name)
def test_where_only_the_deepest_state_is_refreshed_those_above_it_grow_old(policy: Policy) -> None:
    assert victims(chain(policy)) == ["a", "x", "abc"]


def test_sglang_orders_two_leaves_of_one_stem_by_use() -> None:
    cache = roomy(SGLangRadix())
    for prompt in ("ab", "ac", "ad"):
        serve(cache, prompt)
    hit(cache, "ab")
    assert victims(cache) == ["ac", "ad", "ab", "a"]


# Marconi


def test_normalised_values_span_zero_to_one_or_are_all_one() -> None:
    assert normalised(np.array([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert normalised(np.array([7.0, 7.0])).tolist() == [1.0, 1.0]


def test_marconi_keeps_a_state_with_two_children_until_one_has_gone() -> None:
    """By use: a, ac, ab. But two prompts go on from a."""
    cache, other = roomy(Marconi(0.0)), roomy(SGLangUnified())
    for c in (cache, other):
        for prompt in ("a", "ab", "ac"):
            serve(c, prompt)
        hit(c, "ab")
    assert victims(other) == ["a", "ac", "ab"]
    assert victims(cache) == ["ac", "a", "ab"]


def test_a_state_with_one_child_goes_without_its_pages() -> None:
    cache = chain(Marconi(0.0))
    nodes = cache.stats().nodes
    assert victims(cache, 1) == ["a"]
    assert cache.stats().nodes == nodes
    assert cache.match("", tokens_of("abc", 1)).length == 3 * TILE


def test_marconi_evicts_something_when_every_state_has_two_children() -> None:
    """Two requests run below the only state, so all its children are in use."""
    cache = roomy(Marconi(0.5))
    serve(cache, "a")
    runs = [begin(cache, tokens_of(pages, 1)) for pages in ("ab", "ac")]
    for run in runs:
        compute(cache, run, len(run.tokens))
        cache.publish(run.lease, 2 * TILE)
    cache.check()
    assert victims(cache) == ["a"]


@pytest.mark.parametrize(
    ("alpha", "order"),
    [
        # long, used first: recency 0, efficiency 1. short: recency 1, efficiency 0.
        (0.5, ["longest", "z"]),
        (0.99, ["longest", "z"]),
        (1.01, ["z", "longest"]),
        (2.0, ["z", "longest"]),
    ],
)
def test_alpha_weighs_flops_a_byte_against_recency(alpha: float, order: list[str]) -> None:
    cache = roomy(Marconi(alpha))
    serve(cache, "longest")
    serve(cache, "z")
    assert victims(cache) == order


def test_three_states_scored_by_hand() -> None:
    """Ticks: each new prompt takes two, one to look and one to keep. Evictions look one tick ahead."""
    policy = Marconi(0.4)
    cache = roomy(policy)
    for prompt in ("abcd", "ef", "g"):
        serve(cache, prompt)
    recency = [1 / (7 - last) for last in (2, 4, 6)]
    flops = [COST.flops(0, n * TILE) / (SLOT + n * PAGE) for n in (4, 2, 1)]
    by_recency = [(r - min(recency)) / (max(recency) - min(recency)) for r in recency]
    by_flops = [(f - min(flops)) / (max(flops) - min(flops)) for f in flops]
    scores = [r + 0.4 * f for r, f in zip(by_recency, by_flops, strict=True)]
    lowest = policy.lowest()
    assert lowest is not None
    assert lowest[0] == pytest.approx(min(scores))
    assert prefix(lowest[1]) == "ef"
    assert min(scores) == scores[1]


def test_efficiency_is_measured_from_the_nearest_state_that_is_there() -> None:
    policy = Marconi(0.0)
    cache = roomy(policy)
    serve(cache, "abc")
    serve(cache, "abcd")
    (deep,) = [kept for kept in policy.items() if prefix(kept) == "abcd"]
    assert policy.value(deep) == COST.flops(3 * TILE, 4 * TILE) / (SLOT + PAGE)
    assert victims(cache, 1) == ["abc"]
    assert policy._columns[1, policy._rows[deep]] == COST.flops(0, 4 * TILE) / (SLOT + 4 * PAGE)


def test_with_alpha_zero_the_least_recently_used_goes() -> None:
    rng = random.Random(0)
    cache, prompts = roomy(Marconi(0.0)), ["a", "bcd", "ef", "ghijk", "l", "mn"]
    for prompt in prompts:
        serve(cache, prompt)
    uses = prompts + rng.choices(prompts, k=20)
    for prompt in uses[len(prompts) :]:
        hit(cache, prompt)
    assert victims(cache) == sorted(prompts, key=lambda p: len(uses) - uses[::-1].index(p))


# Marconi's alpha


@pytest.fixture(scope="module")
def agents() -> Trace:
    """Few enough requests that a replay takes a moment, in pages that are not the smallest."""
    return make_workload("agent", seed=3, scale=0.1, page_tokens=256)


BIG = cache_spec(
    *[state_spec(50_000)] * 16, AttentionSpec(8, 16, torch.float32)
)  # a state as large as 3,125 tokens' KV
BUDGET = 64 << 20


def replay(trace: Trace, policy: Policy, budget_bytes: int = BUDGET) -> Replay:
    return Simulation(trace, BIG, COST, budget_bytes, policy).run()


def part(trace: Trace, num_requests: int) -> Trace:
    return Trace(trace.name, trace.page_tokens, trace.requests[:num_requests])


def num_requests_before_the_first_eviction(trace: Trace) -> int:
    """Counting the request that made it."""
    for n in range(1, len(trace.requests)):
        if set(replay(part(trace, n), Marconi(0.0)).stats.evictions) - {"page"}:
            return n
    raise AssertionError("nothing was evicted")


def test_the_chosen_alpha_is_the_one_that_a_replay_of_all_finds_best(agents: Trace) -> None:
    window = 5 * num_requests_before_the_first_eviction(agents)
    seen = part(agents, window)
    saved = [replay(seen, Marconi(alpha)).flops_saved for alpha in ALPHAS]
    assert len(seen.requests) == window < 500
    assert min(saved) < max(saved) != saved[0]
    tuned = Marconi(None, BIG, COST, BUDGET)
    replay(part(agents, window - 1), tuned)
    assert tuned.alpha == 0.0
    assert tuned._rehearsal is not None
    tuned = Marconi(None, BIG, COST, BUDGET)
    replay(seen, tuned)
    assert tuned.alpha == ALPHAS[saved.index(max(saved))] > 0.0
    assert tuned._rehearsal is None


def test_only_the_latest_requests_count(agents: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.cache.policies.rehearsal.MEASURED", 20)
    seen = part(agents, 5 * num_requests_before_the_first_eviction(agents))
    flops = [[COST.flops(0, int(hit)) for hit in replay(seen, Marconi(a)).hit_tokens[-20:]] for a in ALPHAS]
    saved = [sum(f) for f in flops]
    tuned = Marconi(None, BIG, COST, BUDGET)
    replay(seen, tuned)
    assert tuned.alpha == ALPHAS[saved.index(max(saved))]


def test_recording_ends_when_nothing_is_ever_evicted(agents: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marconi, "MOST_REQUESTS", 7)
    tuned = Marconi(None, BIG, COST, 1 << 34)
    replay(part(agents, 6), tuned, 1 << 34)
    assert tuned._rehearsal is None or tuned._rehearsal.num_requests == 6
    tuned = Marconi(None, BIG, COST, 1 << 34)
    replay(part(agents, 7), tuned, 1 << 34)
    assert tuned._rehearsal is None
    assert tuned.alpha == 0.0


def test_marconi_without_alpha_needs_the_model() -> None:
    with pytest.raises(ConfigError, match="needs an alpha"):
        Marconi()


def test_the_simulators_errors_in_efficiency() -> None:
    """Four MLP layers to two of attention: twice the attention FLOPs of the parent are taken from those of the MLPs."""
    costs = KindCosts(PrefillCost(3.0, 0.5), PrefillCost(7.0, 0.0), PrefillCost(11.0, 0.0), 2, 4)
    policy = MarconiArtifact(HYBRID, costs, 0.5)
    cache = roomy(policy)
    serve(cache, "abc")
    serve(cache, "abcd")
    values = {prefix(kept): policy.value(kept) for kept in policy.items()}

    def attention(tokens: int) -> float:
        return 3.0 * tokens + 0.5 * tokens * (tokens - 1) / 2

    slot, kv = HYBRID.slot_bytes, HYBRID.kv_bytes_per_token
    flops = attention(256) - attention(192) + 7.0 * 64 + 11.0 * 256 - 2 * attention(192)
    assert values["abcd"] == pytest.approx(flops / (slot + 256 * kv))
    assert values["abc"] == pytest.approx((attention(192) + 7.0 * 192 + 11.0 * 192) / (slot + 192 * kv))
    assert costs.total == PrefillCost(21.0, 0.5)
    assert isinstance(policy.with_alpha(0.1), MarconiArtifact)


def test_a_state_with_one_child_hands_its_last_use_down_to_it() -> None:
    """a is used last but goes first, since it frees no pages worth its FLOPs; abc takes over its use."""
    policy = Marconi(0.0)
    cache = roomy(policy)
    for prompt in ("abc", "x"):
        serve(cache, prompt)
    serve(cache, "a")
    (first,) = [kept for kept in policy.items() if prefix(kept) == "a"]
    (deep,) = [kept for kept in policy.items() if prefix(kept) == "abc"]
    assert deep.base < first.base
    cache.pool.evict(first, 1.0)
    cache.check()
    assert deep.base == first.base
    assert victims(cache) == ["x", "abc"]


# Tail-optimized LRU


def test_tail_lru_evicts_first_what_a_next_turn_would_hardly_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without abcd only one page is missed; without ab two more than the two that fit."""
    monkeypatch.setattr(tail_lru, "SPARE_TOKENS", 2 * TILE)
    cache = roomy(TailLRU())
    for prompt in ("wxyz", "abc", "abcd"):
        serve(cache, prompt)
    assert victims(cache) == ["abcd", "wxyz", "abc"]


def test_what_has_gone_already_counts_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """abcd, abc and ab each are one page beyond the last; but three pages in all are too many."""
    monkeypatch.setattr(tail_lru, "SPARE_TOKENS", 2 * TILE)
    cache = roomy(TailLRU())
    for prompt in ("ab", "abc", "abcd", "x"):
        serve(cache, prompt)
        hit(cache, "ab")
    gone = victims(cache)
    assert gone.index("x") < gone.index("ab")
    assert [g for g in gone if g != "x"] == ["abc", "abcd", "ab"]


# SAECache


def test_types_that_come_back_outlive_those_that_never_do() -> None:
    policy = SAELike()
    cache = new_cache(HYBRID, slots=8, pages=24, policy=policy)
    for i in range(30):
        one_shot, talk = chr(200 + i), chr(100 + i % 3)
        serve(cache, one_shot, generated=True)  # answers that nobody asks for again
        serve(cache, talk)
    weights = {type: policy._weights[number] for type, number in policy._types.items()}
    assert weights["answer"] < 0.5 < weights[""]
    assert all(cache.match("", tokens_of(chr(100 + i), 1)).length for i in range(3))


def test_the_error_function_is_near_the_exact_one() -> None:
    x = np.linspace(-4, 4, 41)
    assert error_function(x) == pytest.approx([math.erf(v) for v in x], abs=6e-4)


# Sparse prefixes


def test_the_best_places_leave_least_to_compute() -> None:
    rng = random.Random(3)
    for _ in range(50):
        overlaps = [rng.randrange(1, 12) for _ in range(rng.randrange(1, 15))]

        def left(places: Iterable[int], overlaps: list[int] = overlaps) -> int:
            return sum(d - max((p for p in places if p <= d), default=0) for d in overlaps)

        for num_states in (1, 2, 3):
            found = best_places(overlaps, num_states)
            assert len(found) <= num_states
            assert left(found) == min(map(left, combinations(range(12), num_states)))


def test_more_depths_than_can_be_told_apart_are_joined() -> None:
    assert best_places([], 4) == []
    places = best_places(range(1, 10 * MOST_DEPTHS), 3)
    assert len(places) == 3
    assert best_places([7] * 9, 4) == [7]


def test_sparse_prefixes_put_states_where_prompts_were_seen_to_overlap() -> None:
    policy = SparsePrefix()
    for i in range(128):
        list(policy.propose(outline(1000, shared=(320, 640)[i % 2])))
    assert positions(policy, outline(1000)) == [320, 640, 960]
    assert positions(policy, outline(500)) == [320, 448]
    assert positions(policy, outline(1000, start=320)) == [640, 960]


# Two states a prompt


def test_value_per_byte_with_two_places() -> None:
    assert positions(FlopsPerByteTwo(), outline(5000, shared=1024)) == [1024, 4992]


# SegLen


def test_seglen_evicts_what_is_short_to_replay_although_it_is_new() -> None:
    """Lengths 4, 2, 1 -> 1, 1/3, 0 and recency 0, 1/2, 1: scores 0.85, 0.36, 0.15."""
    cache = roomy(SegLen())
    for prompt in ("abcd", "ef", "g"):
        serve(cache, prompt)
    assert victims(cache) == ["g", "ef", "abcd"]


def test_seglen_orders_equal_lengths_by_use() -> None:
    cache = roomy(SegLen())
    for prompt in ("ab", "cd", "ef"):
        serve(cache, prompt)
    hit(cache, "ab")
    assert victims(cache) == ["cd", "ef", "ab"]


def test_a_replay_starts_at_the_nearest_state_that_is_there() -> None:
    """abcd is one page beyond abc. Once abc has gone it is four, more than the three of xyz."""
    policy = SegLen()
    cache = roomy(policy)
    for prompt in ("abc", "xyz", "abcd"):
        serve(cache, prompt)
    lengths = {prefix(kept): policy.value(kept) // TILE for kept in policy.items()}
    assert lengths == {"abc": 3, "xyz": 3, "abcd": 1}
    path = cache.match("", tokens_of("abcd", 1)).path
    assert path[2].checkpoint is not None
    cache.pool.evict(path[2].checkpoint)
    cache.check()
    assert policy._columns[1, : len(policy._kept)].tolist() == [3 * TILE, 4 * TILE]
    assert victims(cache) == ["xyz", "abcd"]


# GreedyDual-Size-Frequency


def test_a_state_used_more_often_stays_longer() -> None:
    """Three uses of a, one of b: 3 * value against 1 * value, although b is newer."""
    cache = roomy(GDSF())
    serve(cache, "a")
    hit(cache, "a")
    hit(cache, "a")
    serve(cache, "b")
    assert victims(cache) == ["b", "a"]


def test_what_is_not_used_grows_old_and_a_return_starts_at_one_use() -> None:
    policy = GDSF()
    cache = roomy(policy)
    value = COST.flops(0, TILE) / (SLOT + PAGE)
    for _ in range(2):
        serve(cache, "a")
    assert victims(cache) == ["a"]
    assert policy.clock == pytest.approx(2 * value)
    serve(cache, "a")
    lowest = policy.lowest()
    assert lowest is not None
    assert lowest[0] == pytest.approx(3 * value)


def test_a_candidate_that_finds_no_room_teaches_gdsf_nothing() -> None:
    policy = GDSF()
    cache = new_cache(HYBRID, slots=1, pages=2, policy=policy)
    serve(cache, "a")
    assert sum(cache.stats().declines.values()) == 1
    assert policy.clock == 0.0


# Replays, and the server


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("name", policy_names())
def test_a_replay_keeps_the_budget_and_saves_no_more_than_an_infinite_cache(
    name: str, concurrency: int, agents: Trace
) -> None:
    """Which has states at every page."""
    trace = part(agents, 40)
    most = replay(trace, VLLMBlock(trace.page_tokens), 1 << 34)
    simulation = Simulation(trace, BIG, COST, BUDGET, make_policy(name, BIG, COST, BUDGET), concurrency)
    result = simulation.run(simulation.cache.check)
    assert (result.hit_tokens <= most.hit_tokens).all()
    assert 0 <= result.flops_saved <= most.flops_saved
    assert (result.flops_saved == 0) == (name == "none")
    assert result.stats.kv_bytes + result.stats.checkpoint_bytes <= BUDGET
    if name != "none":
        assert result.stats.num_evictions > 0


@pytest.mark.parametrize("name", policy_names())
def test_the_server_gives_the_same_answers_with_any_policy(name: str) -> None:
    geometry = Geometry.of(SumModel.cache_spec, 1 << 20)
    budget = 6 * geometry.stride_bytes(Kind.SLOT) + 20 * geometry.stride_bytes(Kind.PAGE)
    engine = Engine(SumModel(), EngineConfig(budget_bytes=budget, policy=name))
    rng, system = random.Random(1), list(range(150))
    for i in range(12):
        prompt = np.array(system + rng.choices(range(3), k=rng.choice([1, 60, 200])), dtype=np.int32)
        engine.submit(Request(str(i), Prompt(prompt), SamplingParams(temperature=0, max_tokens=70)))
        outputs: Iterable[TokenOutput] = [o for _, o in engine.run_until_idle() if isinstance(o, TokenOutput)]
        assert [o.token for o in outputs if o.token is not None] == sum_model_answer(prompt, 70)
        engine.check()


def test_policies_that_depend_on_the_model_need_it() -> None:
    with pytest.raises(ConfigError, match="'vllm-block' needs the model's cache spec"):
        make_policy("vllm-block")


@pytest.mark.parametrize("name", policy_names())
def test_every_name_makes_a_policy_that_bears_it(name: str) -> None:
    assert make_policy(name, HYBRID, COST, 1 << 20).name == name
