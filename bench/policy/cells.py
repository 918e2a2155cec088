"""One cell of `hybrid-cache bench policy`: a trace on a model, a policy, a capacity -> one row of numbers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hybrid_cache import __version__
from hybrid_cache.bench.common.processes import spread
from hybrid_cache.bench.policy.belady import Belady
from hybrid_cache.bench.policy.bound import Visits, bound
from hybrid_cache.bench.policy.replay import Simulation
from hybrid_cache.bench.policy.rows import BELADY, BOUND, HINDSIGHT, INFINITE, STATIC, AnyRow, Missing, PolicyRow
from hybrid_cache.bench.policy.server_replay import server_replay
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.foreign import described, is_foreign
from hybrid_cache.cache.policies.learned import Learned, new_model
from hybrid_cache.cache.policies.marconi import ALPHAS, KindCosts, Marconi, MarconiArtifact
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec, total_cost

# A policy that only makes sense here, like those that need hindsight: it needs more of a model than a server reports.
ARTIFACT = "marconi-artifact"
ALL_LIVES = 1 << 18
ANY_BUDGET = 1 << 50  # for sizes that do not depend on the budget

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicts the time to the first token: a constant, and the computed FLOPs at a constant rate."""

    base_s: float
    flops_per_s: float

    def ttft_s(self, cost: PrefillCost, prompt: Ints, hit: Ints) -> Floats:
        """[requests] For prompts of which `hit` tokens are cached."""
        new = prompt - hit
        flops = cost.per_token * new + cost.per_token_per_position * new * (prompt + hit - 1) / 2
        seconds: Floats = self.base_s + flops / self.flops_per_s
        return seconds


@dataclass(frozen=True, slots=True)
class Setting:
    """One trace on one model."""

    trace: Trace
    model: str
    spec: CacheSpec
    cost: PrefillCost
    costs: KindCosts
    speed: Speed
    concurrency: int
    seed: int
    page_bytes: int  # of one page of the trace
    slot_bytes: int  # of one state
    unique_bytes: int  # KV of all distinct pages, answers included, and one state for each distinct prompt
    options: str = ""  # of the command line, for whoever repeats it

    @staticmethod
    def of(
        trace: Trace, model: ModelShape, speed: Speed, *, concurrency: int = 1, seed: int = 0, options: str = ""
    ) -> "Setting":
        geometry = Geometry.of(model.cache_spec, ANY_BUDGET)
        page_bytes = geometry.stride_bytes(Kind.PAGE) * trace.page_tokens // TILE
        slot_bytes = geometry.stride_bytes(Kind.SLOT)
        num_pages = len(np.unique(np.concatenate([r.all_pages for r in trace.requests])))
        num_prompts = len({r.whole for r in trace.requests})
        return Setting(
            trace=replace(trace, requests=tuple(replace(r, tokens=None) for r in trace.requests)),  # nobody reads them
            model=model.name,
            spec=model.cache_spec,
            cost=model.prefill_cost,
            costs=kind_costs(model),
            speed=speed,
            concurrency=concurrency,
            seed=seed,
            page_bytes=page_bytes,
            slot_bytes=slot_bytes,
            unique_bytes=num_pages * page_bytes + num_prompts * slot_bytes,
            options=options,
        )


def kind_costs(model: ModelShape) -> KindCosts:
    attention = [layer.cost for layer in model.layers if isinstance(layer.cache, AttentionSpec)]
    recurrent = [layer.cost for layer in model.layers if isinstance(layer.cache, StateSpec)]
    others = [layer.cost for layer in model.layers if layer.cache is None]
    return KindCosts(total_cost(attention), total_cost(recurrent), total_cost(others), len(attention), len(others))


@dataclass(frozen=True, slots=True)
class Cell:
    setting: Setting
    policy: str  # of the registry, or STATIC, ARTIFACT, BOUND, INFINITE
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell. A bound knows only totals; the rest is None."""

    flops_saved: float
    token_hit_rate: float
    hit_tokens: Ints | None = None
    kv_bytes: float | None = None
    state_bytes: float | None = None
    admissions: int | None = None
    evictions: int | None = None
    alpha: float | None = None
    planned: float | None = None


def attempted(cell: Cell) -> AnyRow:
    """The numbers of a cell, or why there are none. What a policy from elsewhere raises is its own affair."""
    try:
        return measured(cell)
    except HybridCacheError as error:
        reason = str(error)
    except (Exception, SystemExit) as error:
        if not is_foreign(cell.policy):
            raise
        reason = f"policy {cell.policy} raised {described(error)}"
    s = cell.setting
    share = cell.capacity_bytes / s.unique_bytes
    return Missing(s.trace.name, s.model, cell.policy, cell.capacity_bytes, share, " ".join(reason.split()))


def measured(cell: Cell) -> PolicyRow:
    start, s = time.perf_counter(), cell.setting
    outcome = outcome_of(cell)
    p50 = p95 = None
    if outcome.hit_tokens is not None:
        prompt = np.array([r.num_prompt_tokens for r in s.trace.requests], np.int64)
        p50, p95 = np.percentile(s.speed.ttft_s(s.cost, prompt, outcome.hit_tokens), (50, 95)).tolist()
    return PolicyRow(
        trace=s.trace.name,
        model=s.model,
        policy=cell.policy,
        capacity_bytes=cell.capacity_bytes,
        capacity_share=cell.capacity_bytes / s.unique_bytes,
        token_hit_rate=outcome.token_hit_rate,
        flops_saved=outcome.flops_saved,
        ttft_p50_s=p50,
        ttft_p95_s=p95,
        kv_bytes=outcome.kv_bytes,
        state_bytes=outcome.state_bytes,
        admissions=outcome.admissions,
        evictions=outcome.evictions,
        gap_closed=None,
        seconds=time.perf_counter() - start,
        alpha=outcome.alpha,
        seed=s.seed,
        concurrency=s.concurrency,
        planned_flops_saved=outcome.planned,
        num_requests=len(s.trace.requests),
        unique_bytes=s.unique_bytes,
        page_tokens=s.trace.page_tokens,
        page_bytes=s.page_bytes,
        slot_bytes=s.slot_bytes,
        ttft_base_s=s.speed.base_s,
        ttft_flops_per_s=s.speed.flops_per_s,
        note=s.trace.note,
        options=s.options,
        version=__version__,
        server_policy=s.trace.server.policy if s.trace.server else "",
        server_budget_bytes=s.trace.server.budget_bytes if s.trace.server else 0,
        server_flops_saved=saved_by_server(s) if s.trace.server else None,
    )


def outcome_of(cell: Cell) -> Outcome:
    s = cell.setting
    if cell.policy == BOUND:
        limit = bound(s.trace, s.cost, s.page_bytes, s.slot_bytes, cell.capacity_bytes)
        flops, tokens = of_whole_prompts(s) if s.trace.server else (0.0, 0.0)
        return Outcome(limit.flops_saved + flops, limit.token_hit_rate + tokens, planned=limit.reached_flops_saved)
    if cell.policy == INFINITE:
        return everything_kept(s)
    if cell.policy == STATIC:
        tried = [replace(replayed(cell, Marconi(alpha)), alpha=alpha) for alpha in ALPHAS]
        return max(tried, key=lambda outcome: outcome.flops_saved)
    if cell.policy == ARTIFACT:
        return replayed(cell, MarconiArtifact(s.spec, s.costs, budget_bytes=cell.capacity_bytes))
    if cell.policy == HINDSIGHT:
        return informed(cell)
    if cell.policy == BELADY:
        return replayed(cell, Belady(s.trace))
    return replayed(cell, make_policy(cell.policy, s.spec, s.cost, cell.capacity_bytes))


def informed(cell: Cell) -> Outcome:
    """The default policy with what its features can teach about this very trace, known from the first request on."""
    model = new_model(ALL_LIVES)
    replayed(cell, Learned(model, learn=False))
    for _ in range(5):
        model.fit(cell.setting.trace.requests[-1].arrival_s)
    return replayed(cell, Learned(model, learn=False))


def replayed(cell: Cell, policy: Policy) -> Outcome:
    s = cell.setting
    run = simulation(s, cell.capacity_bytes, policy).run()
    return Outcome(
        flops_saved=run.flops_saved_share,
        token_hit_rate=float(run.hit_tokens.sum() / s.trace.num_prompt_tokens),
        hit_tokens=run.hit_tokens,
        kv_bytes=run.mean_bytes["kv"],
        state_bytes=run.mean_bytes["states"],
        admissions=sum(run.stats.admissions.values()),
        evictions=run.stats.num_evictions - run.stats.evictions.get("page", 0),
    )


def simulation(s: Setting, capacity_bytes: int, policy: Policy) -> Simulation:
    """As it was, if a server has recorded it."""
    if s.trace.server is not None:
        return server_replay(s.trace, s.trace.server, s.spec, s.cost, capacity_bytes, policy)
    return Simulation(s.trace, s.spec, s.cost, capacity_bytes, policy, s.concurrency)


def saved_by_server(s: Setting) -> float:
    """The share of FLOPs that the server which recorded the trace did not compute."""
    requests, cost = s.trace.requests, s.cost
    saved = sum(cost.flops(0, r.stay.cached_tokens) for r in requests if r.stay)
    return saved / sum(cost.flops(0, r.num_prompt_tokens) for r in requests)


def whole_prompt_tails(s: Setting) -> Ints:
    """[requests] Tokens behind the last page that an exact repeat of an earlier prompt may resume from; else 0."""
    seen, tails = set[int](), np.zeros(len(s.trace.requests), np.int64)
    for i, r in enumerate(s.trace.requests):
        if r.whole in seen:
            tails[i] = r.num_prompt_tokens - (r.num_prompt_tokens - 1) // s.trace.page_tokens * s.trace.page_tokens
        seen.add(r.whole)
    return tails


def of_whole_prompts(s: Setting) -> tuple[float, float]:
    """Shares of FLOPs and of tokens that ends of prompts may save beyond the last page.

    Whoever resumes from one could have resumed from that page, for no more room.
    """
    tails, cost = whole_prompt_tails(s), s.cost
    pairs = [(r.num_prompt_tokens, int(tail)) for r, tail in zip(s.trace.requests, tails, strict=True)]
    flops = sum(cost.flops(n - tail, n) for n, tail in pairs)
    return flops / sum(cost.flops(0, n) for n, _ in pairs), float(tails.sum() / s.trace.num_prompt_tokens)


def everything_kept(s: Setting) -> Outcome:
    visits = Visits.of(s.trace)
    hits = np.zeros(len(s.trace.requests), np.int64)
    hits[visits.request] = visits.depth * visits.page_tokens  # of several depths of a request, the last and deepest
    flops, _ = of_whole_prompts(s) if s.trace.server else (0.0, 0.0)
    hits += whole_prompt_tails(s) if s.trace.server else 0
    return Outcome(visits.infinite(s.cost) + flops, float(hits.sum() / s.trace.num_prompt_tokens), hits)


def all_attempted(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[int, AnyRow]]:
    """Rows as they come, each with the number of its cell."""
    return spread(attempted, cells, jobs)
