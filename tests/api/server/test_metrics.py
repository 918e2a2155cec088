"""What /metrics says."""

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hybrid_cache.api.server.metrics import Metrics
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.choreography.book import MessageBook
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.stats import EngineStats
from hybrid_cache.tokens import Prompt
from tests.fakes import SumModel, tokens_of

SETTINGS = ServerSettings(served_names=("tiny", "other"), backend="torch", model_path="somewhere")
RECORD = RequestRecord(
    finish_reasons=("stop", "length"),
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=5,
    queued_s=0.002,
    first_token_s=0.015,
    inter_token_s=(0.002, 0.03),
    total_s=0.6,
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(metrics: Metrics) -> Samples:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


@pytest.fixture
def engine() -> Engine:
    return Engine(SumModel(), EngineConfig(budget_bytes=1 << 20))


def ask(engine: Engine, name: str) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=3)
    engine.submit(Request(name, Prompt(tokens_of(0, 200)), sampling))
    engine.run_until_idle()


def test_counters_of_the_engine_move_with_it(engine: Engine) -> None:
    metrics = Metrics(engine, SETTINGS)
    before = samples_of(metrics)
    ask(engine, "first")
    ask(engine, "again")
    after = samples_of(metrics)
    assert value(before, "hybrid_cache_prompt_tokens_total") == 0
    assert value(after, "hybrid_cache_prompt_tokens_total") == 400
    assert value(after, "hybrid_cache_cached_tokens_total") == 200
    assert value(after, "hybrid_cache_generated_tokens_total") == 6
    assert value(after, "hybrid_cache_hit_tokens_total", kind="full") >= 200
    assert value(after, "hybrid_cache_flops_saved_total") > 0
    assert value(after, "hybrid_cache_requests_running") == 0


def test_the_kinds_of_cache_bytes_fill_the_budget(engine: Engine) -> None:
    metrics = Metrics(engine, SETTINGS)
    ask(engine, "first")
    samples = samples_of(metrics)
    total = sum(v for (name, _), v in samples.items() if name == "hybrid_cache_cache_bytes")
    budget = value(samples, "hybrid_cache_cache_budget_bytes")
    assert 0.9 * budget < total <= budget
    assert value(samples, "hybrid_cache_cache_bytes", kind="kv") > 0
    assert value(samples, "hybrid_cache_cache_nodes") > 0


def test_memory_is_told_by_what_takes_it(engine: Engine) -> None:
    book = MessageBook(1 << 20)
    metrics = Metrics(engine, replace(SETTINGS, beside_bytes=12345), book)
    before = samples_of(metrics)
    book.add("n", "user", tokens_of(0, 100), sent_bytes=50_000)
    after = samples_of(metrics)
    assert value(before, "hybrid_cache_message_book_bytes") == 0
    assert value(after, "hybrid_cache_message_book_bytes") == book.num_bytes > 50_000
    assert value(after, "hybrid_cache_message_book_messages") == 1
    assert value(after, "hybrid_cache_message_book_limit_bytes") == 1 << 20
    assert value(after, "hybrid_cache_memory_beside_bytes") == 12345
    if Path("/proc/self/statm").exists():
        assert value(after, "process_resident_memory_bytes") > 50 << 20
        assert value(after, "process_open_fds") > 2


def test_the_labels_of_info_say_what_runs(engine: Engine) -> None:
    labels = next(dict(labels) for name, labels in samples_of(Metrics(engine, SETTINGS)) if name == "hybrid_cache_info")
    assert labels["model"] == "tiny"
    assert labels["exact"] == "true"


def test_a_finished_request_lands_in_the_histograms(engine: Engine) -> None:
    metrics = Metrics(engine, SETTINGS)
    metrics.observe(RECORD)
    samples = samples_of(metrics)
    assert value(samples, "hybrid_cache_choices_finished_total", finished_reason="stop") == 1
    assert value(samples, "hybrid_cache_choices_finished_total", finished_reason="length") == 1
    assert value(samples, "hybrid_cache_time_to_first_token_seconds_bucket", le="0.01") == 0
    assert value(samples, "hybrid_cache_time_to_first_token_seconds_bucket", le="0.02") == 1
    assert value(samples, "hybrid_cache_inter_token_latency_seconds_count") == 2
    assert value(samples, "hybrid_cache_e2e_request_latency_seconds_sum") == 0.6


def test_a_request_without_a_token_has_no_time_to_the_first(engine: Engine) -> None:
    metrics = Metrics(engine, SETTINGS)
    metrics.observe(replace(RECORD, first_token_s=None, inter_token_s=(), finish_reasons=("abort",)))
    samples = samples_of(metrics)
    assert value(samples, "hybrid_cache_time_to_first_token_seconds_count") == 0
    assert value(samples, "hybrid_cache_choices_finished_total", finished_reason="abort") == 1


def test_vllm_names_come_only_on_request(engine: Engine) -> None:
    assert not [name for name, _ in samples_of(Metrics(engine, SETTINGS)) if name.startswith("vllm:")]


def test_vllm_names_carry_the_same_numbers(engine: Engine) -> None:
    metrics = Metrics(engine, replace(SETTINGS, vllm_metrics=True))
    ask(engine, "first")
    ask(engine, "again")
    metrics.observe(RECORD)
    samples, labels = samples_of(metrics), {"model_name": "tiny", "engine": "0"}
    assert value(samples, "vllm:prefix_cache_queries_total", **labels) == 400
    assert value(samples, "vllm:prefix_cache_hits_total", **labels) == 200
    assert value(samples, "vllm:prompt_tokens_total", **labels) == 400
    assert value(samples, "vllm:generation_tokens_total", **labels) == 6
    assert value(samples, "vllm:num_requests_running", **labels) == 0
    assert value(samples, "vllm:num_requests_waiting", **labels) == 0
    assert value(samples, "vllm:num_preemptions_total", **labels) == 0
    assert 0 <= value(samples, "vllm:kv_cache_usage_perc", **labels) < 1
    assert value(samples, "vllm:request_success_total", finished_reason="stop", **labels) == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert value(samples, f"vllm:{name}_seconds_count", **labels) == 1
    assert value(samples, "vllm:inter_token_latency_seconds_count", **labels) == 2


def test_two_servers_in_one_process_do_not_share_numbers(engine: Engine) -> None:
    one, other = Metrics(engine, SETTINGS), Metrics(engine, SETTINGS)
    one.observe(RECORD)
    assert value(samples_of(other), "hybrid_cache_e2e_request_latency_seconds_count") == 0


def test_a_scrape_reads_the_engine_once() -> None:
    class Counting:
        reads = 0

        def stats(self) -> EngineStats:
            self.reads += 1
            return Engine(SumModel(), EngineConfig(budget_bytes=1 << 20)).stats()

    source = Counting()
    metrics = Metrics(source, SETTINGS)
    source.reads = 0
    metrics.render()
    assert source.reads == 1
