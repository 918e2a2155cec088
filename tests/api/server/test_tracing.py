"""Spans of requests: into memory, over HTTP to a collector, and what is said where that cannot be."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.tracing import Tracing, endpoint_of, new_provider
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ConfigError
from tests.api.servers import new_engine, over_the_wire

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "canary7f3a"


@contextmanager
def traced(text: TextModel, tracing: Tracing) -> Iterator[httpx.Client]:
    settings = ServerSettings(served_names=("sum",), backend="fake", model_path="models/sum", drain_timeout_s=1.0)
    app = create_app(new_engine(), text, settings, tracing=tracing)
    with over_the_wire(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@contextmanager
def in_memory(text: TextModel) -> Iterator[tuple[httpx.Client, Callable[[int], Sequence[ReadableSpan]]]]:
    """A client, and what waits for so many spans, the last one to end last."""
    exporter, provider = InMemorySpanExporter(), new_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def spans(count: int) -> Sequence[ReadableSpan]:
        for _ in range(500):
            if len(found := exporter.get_finished_spans()) >= count:
                return found
            time.sleep(0.01)
        raise AssertionError(exporter.get_finished_spans())

    with traced(text, Tracing(provider)) as client:
        yield client, spans


def test_a_request_is_a_span_with_its_phases_in_the_trace_of_its_client(sum_text: TextModel) -> None:
    with in_memory(sum_text) as (client, spans):
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        usage = client.post("/v1/chat/completions", json=body, headers=headers).json()["usage"]
        queue, prefill, decode, server = spans(4)
    assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert (server.name, server.kind) == ("POST /v1/chat/completions", SpanKind.SERVER)
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.attributes is not None
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "hybrid_cache.request_id": "mine",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sum",
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert {name: server.attributes.get(name) for name in expected} == expected
    times = [(span.start_time or 0, span.end_time or 0) for span in (queue, prefill, decode)]
    assert (server.start_time or 0) <= times[0][0]
    assert [start for start, _ in times[1:]] == [end for _, end in times[:2]]
    assert times[2][1] <= (server.end_time or 0)
    assert abs(time.time() - (server.end_time or 0) / 1e9) < 60
    for span in (queue, prefill, decode):
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == TRACE
        assert span.parent.span_id == server.context.span_id
    assert not any(SECRET in span.to_json() for span in (queue, prefill, decode, server))


def test_refusals_are_spans_without_values_and_probes_are_none(sum_text: TextModel) -> None:
    with in_memory(sum_text) as (client, spans):
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a", "temperature": SECRET}).status_code == 400
        assert client.get(f"/{SECRET}").status_code == 404
        refused, unknown = spans(2)
    assert refused.attributes is not None
    assert unknown.attributes is not None
    assert refused.attributes["error.type"] == "invalid_value"
    assert SECRET not in refused.to_json()
    assert (unknown.name, unknown.attributes["http.response.status_code"]) == ("GET", 404)


class Collector(HTTPServer):
    """Takes spans over HTTP, and keeps their names with the attributes of their resource."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.found: dict[str, dict[str, str]] = {}
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.server.paths.add(self.path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.server.found |= {span.name: about for scope in resource.scope_spans for span in scope.spans}
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        yield collector
        collector.shutdown()


def test_a_collector_has_all_spans_when_the_server_has_ended(sum_text: TextModel) -> None:
    with collecting() as collector:
        with traced(sum_text, Tracing.to_collector(collector.url)) as client:
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert set(collector.found) == {"queue", "prefill", "decode", "POST /v1/completions"}
        assert collector.found["queue"]["service.name"] == "hybrid-cache"
        assert collector.paths == {"/v1/traces"}


def test_a_collector_that_is_not_there_keeps_nobody_waiting(sum_text: TextModel) -> None:
    with collecting() as gone:
        url = gone.url
    begun = time.monotonic()
    with traced(sum_text, Tracing.to_collector(url)) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert time.monotonic() - begun < 10


def test_a_server_that_sends_no_spans_does_not_load_the_library() -> None:
    code = "import sys, hybrid_cache.api.server.process; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_service_has_the_name_that_its_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert new_provider().resource.attributes["service.name"] == "mine"


def test_a_collector_without_a_path_is_asked_at_the_usual_one() -> None:
    assert endpoint_of("http://c:4318") == endpoint_of("http://c:4318/") == "http://c:4318/v1/traces"
    assert endpoint_of("https://c/mine/v1/traces") == "https://c/mine/v1/traces"
    with pytest.raises(ConfigError, match="otlp_endpoint is 'c:4318'"):
        endpoint_of("c:4318")


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"])
def test_without_the_library_one_line_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:4318"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'hybrid-cache[otel]'")
