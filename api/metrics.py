"""Prometheus metrics: the engine's own counts, read when scraped, and times measured at the edge.

Names begin with `hybrid_cache_`. On request the same numbers also appear under vLLM's names, so that dashboards,
autoscalers and routers made for it work unchanged.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid_cache.engine import EngineStats
from hybrid_cache.request import FinishReason

PREFIX = "hybrid_cache_"
FIRST_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)

ReadStats = Callable[[], EngineStats]


class _Times:
    """Histograms and counts of requests, under one set of names."""

    def __init__(self, registry: CollectorRegistry, prefix: str, labels: dict[str, str]) -> None:
        names = tuple(labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(prefix + name, text, names, buckets=buckets, registry=registry)
            return made.labels(**labels) if labels else made

        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS)
        self.next = histogram("inter_token_latency_seconds", "Between two tokens of one choice.", NEXT_TOKEN_BUCKETS)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self.generated = histogram("request_generation_tokens", "Tokens generated for a request.", TOKEN_BUCKETS)
        finished = "request_success" if prefix == "vllm:" else "choices_finished"
        self._finished = Counter(prefix + finished, "Choices by reason.", (*names, "finished_reason"), registry=registry)
        self._labels = labels

    def finished(self, reason: str) -> None:
        self._finished.labels(**self._labels, finished_reason=reason).inc()


class StatsSource(Protocol):
    """What is read of an engine."""

    def stats(self) -> EngineStats: ...


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, stats: ReadStats, info: dict[str, str], *, vllm_names: bool = False) -> None:
        """`info` are facts about the server, `model` among them."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(stats, info))
        self._sets = [_Times(self._registry, PREFIX, {})]
        if vllm_names:
            labels = {"model_name": info["model"], "engine": "0"}
            self._registry.register(_VllmMetrics(stats, labels))
            self._sets.append(_Times(self._registry, "vllm:", labels))

    def timer(self, prompt_tokens: int, n: int) -> "RequestTimer":
        """Starts the clock of a request that has been queued."""
        return RequestTimer(self._sets, prompt_tokens, n)

    def text(self) -> bytes:
        """The exposition format, as `/metrics` answers it."""
        return generate_latest(self._registry)


class RequestTimer:
    """Times of one request. Aborted ones count with the reason "abort"."""

    def __init__(self, sets: Iterable[_Times], prompt_tokens: int, n: int) -> None:
        self._sets = list(sets)
        self._begin = time.perf_counter()
        self._last: list[float | None] = [None] * n
        self._first = True
        self._open = n
        self._tokens = 0
        for times in self._sets:
            times.prompt.observe(prompt_tokens)

    def token(self, index: int) -> None:
        now = time.perf_counter()
        last, self._last[index] = self._last[index], now
        self._tokens += 1
        for times in self._sets:
            if last is not None:
                times.next.observe(now - last)
            elif self._first:
                times.first.observe(now - self._begin)
        self._first = False

    def finish(self, reason: FinishReason) -> None:
        self._open -= 1
        self._count(reason.value)
        if self._open == 0:
            for times in self._sets:
                times.whole.observe(time.perf_counter() - self._begin)
                times.generated.observe(self._tokens)

    def close(self) -> None:
        """Counts the choices that have not finished as aborted. Idempotent."""
        for _ in range(self._open):
            self._count("abort")
        self._open = 0

    def _count(self, reason: str) -> None:
        for times in self._sets:
            times.finished(reason)


class _EngineMetrics(Collector):
    def __init__(self, stats: ReadStats, info: dict[str, str]) -> None:
        self._stats = stats
        self._info = info

    def collect(self) -> Iterator[Metric]:
        s = self._stats()
        yield _gauge("requests_running", "Requests in the batch.", s.running)
        yield _gauge("requests_waiting", "Requests in the queue.", s.waiting)
        yield _counter("preemptions", "Sequences that had to give up their room for a while.", s.num_preemptions)
        yield _counter("steps", "Forward passes.", s.steps)
        yield _counter("prompt_tokens", "Tokens of prompts.", s.prompt_tokens)
        yield _counter("prompt_tokens_cached", "Tokens of prompts that were not computed.", s.cached_tokens)
        yield _counter("prompt_tokens_computed", "Tokens of prompts that were computed.", s.computed_tokens)
        yield _counter("generated_tokens", "Tokens generated.", s.generated_tokens)
        yield _counter("commit_tokens", "Generated tokens computed again to be cached.", s.commit_tokens)
        yield _counter("prefill_flops", "Floating-point operations spent on prompts.", s.flops_computed)
        yield _counter("flops_saved", "Floating-point operations that the cache made unnecessary.", s.flops_saved)
        c = s.cache
        yield _gauge("cache_budget_bytes", "What pages, states and prompt ends may take together.", c.budget_bytes)
        kinds = {"kv": c.kv_bytes, "checkpoint": c.checkpoint_bytes, "prompt_end": c.prompt_end_bytes}
        more = {"working": c.working_bytes, "free": c.free_bytes}
        yield _gauges("cache_bytes", "The budget by what it holds.", {**kinds, **more})
        yield _gauge("cache_nodes", "Nodes of the prefix tree.", c.nodes)
        counts = {"checkpoint": c.checkpoints, "prompt_end": c.prompt_ends}
        yield _gauges("state_checkpoints", "Recurrent states that are kept.", counts)
        hits = {"full": c.hit_tokens, "kv_only": c.kv_only_tokens, "miss": c.miss_tokens}
        yield _counters("hit_tokens", "Prompt tokens by what the cache had: all, only KV, nothing.", hits)
        yield _counters("checkpoint_admissions", "States that were kept, by kind of place.", c.admissions)
        yield _counters("checkpoint_declines", "States that were not worth their bytes.", c.declines)
        yield _counters("evictions", "What went to make room.", c.evictions)
        yield _counter("compactions", "Times that the budget was rearranged.", c.compactions)
        info = GaugeMetricFamily(PREFIX + "info", "Facts about this server.", labels=list(self._info))
        info.add_metric(list(self._info.values()), 1)
        yield info


class _VllmMetrics(Collector):
    def __init__(self, stats: ReadStats, labels: dict[str, str]) -> None:
        self._stats = stats
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        s, names, values = self._stats(), list(self._labels), list(self._labels.values())
        used = 1 - s.cache.free_bytes / s.cache.budget_bytes
        for name, value in (
            ("num_requests_running", s.running),
            ("num_requests_waiting", s.waiting),
            ("kv_cache_usage_perc", used),
        ):
            gauge = GaugeMetricFamily("vllm:" + name, name, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, value in (
            ("prefix_cache_queries", s.prompt_tokens),
            ("prefix_cache_hits", s.cached_tokens),
            ("prompt_tokens", s.prompt_tokens),
            ("prompt_tokens_cached", s.cached_tokens),
            ("generation_tokens", s.generated_tokens),
            ("num_preemptions", s.num_preemptions),
        ):
            counter = CounterMetricFamily("vllm:" + name, name, labels=names)
            counter.add_metric(values, value)
            yield counter


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _gauges(name: str, text: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=["kind"])
    for kind, value in values.items():
        family.add_metric([kind], value)
    return family


def _counters(name: str, text: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, text, labels=["kind"])
    for kind, value in values.items():
        family.add_metric([kind], value)
    return family
