"""What Prometheus reads: the engine's own counts at the moment of the scrape, and histograms of requests that ended.

Names begin with `hybrid_cache_`. On request the same numbers also appear under vLLM's names, so that dashboards,
autoscalers and routers made for it work unchanged.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hybrid_cache import __version__
from hybrid_cache.api.server.gate import Gate
from hybrid_cache.api.server.logs import lines_lost
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.api.text.text_work import TextWork
from hybrid_cache.choreography.book import MessageBook
from hybrid_cache.request import FinishReason
from hybrid_cache.stats import CacheStats, DiskStats, EngineStats, PauseStats

PREFIX = "hybrid_cache_"
VLLM_PREFIX = "vllm:"
# vLLM's bounds, so that its dashboards keep their meaning. Our own histograms begin lower: small models are fast.
QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
TOTAL_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
SHORT_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005)
SHORT_TOTAL_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2)


class StatsSource(Protocol):
    """What is read of an engine."""

    def stats(self) -> EngineStats: ...


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, engine: StatsSource, settings: ServerSettings, book: MessageBook | None = None) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # its memory, time and open files, where the system says so
        book = MessageBook(settings.message_book_bytes) if book is None else book
        self._registry.register(_Scrape(engine, lambda stats: _own_families(stats, settings, book)))
        self._instruments = [_own_instruments(self._registry)]
        if settings.vllm_metrics:
            labels = {"model_name": settings.served_names[0], "engine": "0"}
            self._registry.register(_Scrape(engine, lambda stats: _vllm_families(stats, labels)))
            self._instruments.append(_vllm_instruments(self._registry, labels))

    def also(self, families: Callable[[], Iterator[Metric]]) -> None:
        """Adds what another part of the server counts, read at each scrape."""
        self._registry.register(_Families(families))

    def observe(self, record: RequestRecord) -> None:
        """Counts a request that has ended; callable from any thread."""
        for instruments in self._instruments:
            instruments.observe(record)

    def render(self) -> tuple[bytes, str]:
        """-> the exposition text and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Scrape(Collector):
    """Reads the engine once for each scrape."""

    def __init__(self, engine: StatsSource, families: Callable[[EngineStats], Iterator[Metric]]) -> None:
        self._engine = engine
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families(self._engine.stats())


class _Families(Collector):
    """Calls a function for each scrape."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


@dataclass(frozen=True, slots=True)
class _Instruments:
    """What an ended request moves, under one set of names."""

    finished: Counter
    labels: Mapping[str, str]
    queued: Histogram
    first_token: Histogram
    inter_token: Histogram
    total: Histogram
    per_output_token: Histogram | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)  # that have another name there

    def observe(self, record: RequestRecord) -> None:
        for reason in (self.reasons.get(reason, reason) for reason in record.finish_reasons):
            self.finished.labels(**self.labels, finished_reason=reason).inc()
        self.queued.observe(record.queued_s)
        if record.first_token_s is not None:
            self.first_token.observe(record.first_token_s)
        for seconds in record.inter_token_s:
            self.inter_token.observe(seconds)
        if self.per_output_token is not None and record.inter_token_s:
            self.per_output_token.observe(sum(record.inter_token_s) / len(record.inter_token_s))
        self.total.observe(record.total_s)


def _own_instruments(registry: CollectorRegistry) -> _Instruments:
    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

    finished = PREFIX + "choices_finished"
    return _Instruments(
        Counter(finished, "Choices that have ended, by reason.", ["finished_reason"], registry=registry),
        {},
        histogram("request_queue_time_seconds", "From submission to the first step.", QUEUE_BUCKETS),
        histogram("time_to_first_token_seconds", "From submission to the first token.", TTFT_BUCKETS),
        histogram(
            "inter_token_latency_seconds",
            "Between consecutive tokens of one choice.",
            (*SHORT_INTER_TOKEN_BUCKETS, *INTER_TOKEN_BUCKETS),
        ),
        histogram("e2e_request_latency_seconds", "From submission to the end.", (*SHORT_TOTAL_BUCKETS, *TOTAL_BUCKETS)),
    )


def _vllm_instruments(registry: CollectorRegistry, labels: Mapping[str, str]) -> _Instruments:
    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(VLLM_PREFIX + name, text, list(labels), buckets=buckets, registry=registry).labels(**labels)

    finished, names = VLLM_PREFIX + "request_success", [*labels, "finished_reason"]
    return _Instruments(
        Counter(finished, "Choices that have ended, by reason.", names, registry=registry),
        labels,
        histogram("request_queue_time_seconds", "From submission to the first step.", QUEUE_BUCKETS),
        histogram("time_to_first_token_seconds", "From submission to the first token.", TTFT_BUCKETS),
        histogram("inter_token_latency_seconds", "Between consecutive tokens of one choice.", INTER_TOKEN_BUCKETS),
        histogram("e2e_request_latency_seconds", "From submission to the end.", TOTAL_BUCKETS),
        histogram("request_time_per_output_token_seconds", "Mean over one request.", INTER_TOKEN_BUCKETS),
        {FinishReason.TOOL_CALL.value: FinishReason.STOP.value},
    )


def _own_families(stats: EngineStats, settings: ServerSettings, book: MessageBook) -> Iterator[Metric]:
    """The engine's counts under our own names."""
    facts = {
        "version": __version__,
        "model": settings.served_names[0],
        "backend": settings.backend,
        "exact": str(settings.exact).lower(),
    }
    yield _labelled(GaugeMetricFamily, PREFIX + "info", "Always 1; the labels say what runs.", facts, 1)
    yield _gauge("requests_running", "Sequences in the running batch.", stats.running)
    yield _gauge("requests_waiting", "Sequences in the queue.", stats.waiting)
    yield _gauge("requests_loading", "Of these, wait for their beginning to come from a disk.", stats.loading)
    yield _counter("prompt_tokens", "Prompt tokens of requests that have begun to answer.", stats.prompt_tokens)
    yield _counter("cached_tokens", "Prompt tokens that were not computed.", stats.cached_tokens)
    yield _counter("moved_tokens", "Of these, taken from stored messages by choreographies.", stats.moved_tokens)
    yield _counter("computed_tokens", "Prompt tokens computed, repeats included.", stats.computed_tokens)
    yield _counter("generated_tokens", "Tokens chosen.", stats.generated_tokens)
    received = "Prompt tokens made from what another model has of the prompt."
    yield _counter("received_tokens", received, stats.received_tokens)
    yield _counter("twin_tokens", "Prompt tokens that were at once written for another model.", stats.twin_tokens)
    yield _counter("commit_tokens", "Generated tokens computed again while idle, to be cached.", stats.commit_tokens)
    yield _counter("preemptions", "Sequences that gave their memory back and began again.", stats.num_preemptions)
    yield _counter("steps", "Forward passes.", stats.steps)
    yield _counter("failed_steps", "Forward passes and choices of tokens that ended with an error.", stats.failures)
    yield _gauge("step_age_seconds", "Since the step under way began; 0 between steps.", stats.step_age_s)
    yield _counter("out_of_memory_steps", "Steps that the device had no memory for.", stats.num_out_of_memory)
    yield _counter("graph_replays", "Decode steps that were one launch of a CUDA graph.", stats.num_graph_replays)
    yield _counter("flops_saved", "Operations that cached tokens would have cost.", stats.flops_saved)
    yield _counter("flops_computed", "Operations that prefill took.", stats.flops_computed)
    yield _gauge(
        "memory_beside_bytes", "Most that is needed beside weights and cache; 0: unknown.", settings.beside_bytes
    )
    yield _counter("log_records_lost", "Records that could not be written to the log.", lines_lost())
    yield _gauge("message_book_messages", "Messages that requests may refer to.", len(book))
    yield _gauge("message_book_bytes", "What they and the names of forgotten ones take.", book.num_bytes)
    yield _gauge("message_book_limit_bytes", "Most that they may take.", book.most_bytes)
    yield from _pause_families(stats.pauses)
    yield from _cache_families(stats.cache)


def _pause_families(pauses: PauseStats) -> Iterator[Metric]:
    resumed = {"resident": pauses.num_resident, "evicted": pauses.num_resumed - pauses.num_resident}
    text = "Tasks that came back from a tool: half of their context or more was cached, or less."
    yield _gauge("tasks_paused", "Tasks that wait for a tool.", pauses.num_paused)
    yield _by_kind(CounterMetricFamily, "tasks_resumed", text, resumed)
    yield _counter("tasks_forgotten", "Tasks that waited for a tool for too long.", pauses.num_forgotten)


def _cache_families(cache: CacheStats) -> Iterator[Metric]:
    tokens = {"full": cache.hit_tokens, "kv_only": cache.kv_only_tokens, "miss": cache.miss_tokens}
    yield _by_kind(CounterMetricFamily, "hit_tokens", "Tokens looked up: skipped, state gone, or not there.", tokens)
    yield _by_kind(GaugeMetricFamily, "cache_bytes", "Where the budget is, by what takes it.", cache.bytes_by_kind)
    yield _gauge("cache_budget_bytes", "Bytes for KV pages and states together.", cache.budget_bytes)
    yield _gauge("cache_nodes", "Nodes of the prefix tree.", cache.nodes)
    yield _gauge("cache_checkpoints", "Recurrent states kept.", cache.checkpoints)
    yield _gauge("cache_prompt_ends", "Ends of whole prompts kept.", cache.prompt_ends)
    yield _gauge("cache_messages", "Messages kept by choreographies.", cache.messages)
    yield _by_kind(CounterMetricFamily, "admissions", "States kept.", cache.admissions)
    yield _by_kind(CounterMetricFamily, "declines", "States not kept.", cache.declines)
    yield _by_kind(CounterMetricFamily, "evictions", "States and pages that had to make room.", cache.evictions)
    yield _by_kind(
        CounterMetricFamily, "misses", "Prompts by the reason why most of what they missed was.", cache.misses
    )
    yield _by_kind(
        CounterMetricFamily,
        "missed_tokens",
        "Prompt tokens by the reason why they were not cached.",
        cache.missed_tokens,
    )
    yield _counter("compactions", "Times that small items were moved to make room for a large one.", cache.compactions)
    if cache.disk is not None:
        yield from _disk_families(cache.disk)


def _disk_families(disk: DiskStats) -> Iterator[Metric]:
    loads = "Prompts that could be resumed from the disk, by what became of that."
    refused = "Entries that could not be read, or were not what they had been, by why; each is a miss, and dropped."
    yield _gauge("disk_budget_bytes", "Most that the folder of the disk tier takes.", disk.budget_bytes)
    yield _gauge("disk_bytes", "What it takes, whoever wrote it.", disk.used_bytes)
    yield _gauge("disk_entries", "Files there of the models that are served.", disk.entries)
    yield _gauge("disk_waiting", "States that wait to be copied there.", disk.waiting)
    yield _by_kind(CounterMetricFamily, "disk_saved", "Files written.", disk.saved)
    yield _by_kind(CounterMetricFamily, "disk_not_saved", "States that were not written, by why.", disk.not_saved)
    yield _by_kind(CounterMetricFamily, "disk_loads", loads, disk.loads)
    yield _by_kind(CounterMetricFamily, "disk_refused", refused, disk.refused)
    yield _counter("disk_loaded_tokens", "Tokens that came back from the disk.", disk.loaded_tokens)
    yield _counter("disk_loaded_bytes", "Bytes that were read and checked for them.", disk.loaded_bytes)
    yield _counter("disk_cpu_seconds", "Processor time of copies and of writing.", disk.spent_s)


def gate_families(gate: Gate, work: TextWork) -> Iterator[Metric]:
    """What requests take of the server before and beside the engine."""
    refused = {"over_share": gate.num_over_share, "overloaded": gate.num_overloaded}
    yield _gauge("requests_open", "Prompts of requests that have come and are not answered.", gate.requests.total)
    yield _gauge("request_body_bytes", "Bytes of the bodies of these.", gate.bytes.total)
    yield _by_kind(CounterMetricFamily, "requests_refused", "Requests for which there was no room.", refused)
    yield _gauge("texts_waiting", "Long texts that wait to be tokenised.", work.num_waiting)


def _vllm_families(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The same counts under vLLM's names."""

    def counter(name: str, text: str, value: float) -> Metric:
        return _labelled(CounterMetricFamily, VLLM_PREFIX + name, text, labels, value)

    def gauge(name: str, text: str, value: float) -> Metric:
        return _labelled(GaugeMetricFamily, VLLM_PREFIX + name, text, labels, value)

    yield gauge("num_requests_running", "Sequences in the running batch.", stats.running)
    yield gauge("num_requests_waiting", "Sequences in the queue.", stats.waiting)
    # As there, what a new request may evict does not count as used.
    used = stats.cache.working_bytes / stats.cache.budget_bytes
    yield gauge("kv_cache_usage_perc", "Share of the budget that running sequences hold; 1 is all.", used)
    yield counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prompt_tokens)
    yield counter("prefix_cache_hits", "Prompt tokens that were not computed.", stats.cached_tokens)
    yield counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
    yield counter("generation_tokens", "Tokens chosen.", stats.generated_tokens)
    yield counter("num_preemptions", "Sequences that gave their memory back and began again.", stats.num_preemptions)


Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _by_kind(family: Family, name: str, text: str, values: Mapping[str, float]) -> Metric:
    made = family(PREFIX + name, text, labels=["kind"])
    for kind, value in sorted(values.items()):
        made.add_metric([kind], value)
    return made


def _labelled(family: Family, name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    made = family(name, text, labels=list(labels))
    made.add_metric(list(labels.values()), value)
    return made
