"""A span for each request, sent to an OpenTelemetry collector.

The server's span has the time from the first byte to the last, and as children the time in the queue, that of the
prompt and that of the answer. Names are those of OpenTelemetry's conventions for HTTP and for generative AI; nothing
of the content is in them. Spans are made when a request has ended, and sent by a thread of the library's own.
"""

import os
import threading
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from hybrid_cache import __version__
from hybrid_cache.api.server.facts import Facts
from hybrid_cache.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

NAME = "hybrid-cache"
TRACES = "/v1/traces"
NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
LAST_S = 1.0  # for spans that are not sent yet at the end
OPERATIONS = {"/v1/completions": "text_completion"}  # all other answers are to chats

Attributes = dict[str, str | bool | int | float | list[str]]


class Tracing:
    """Makes spans, and hands them to an exporter."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(NAME, __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, url: str) -> "Tracing":
        """url: of a collector that takes OTLP over HTTP; what it does not say, the variables OTEL_* may.

        Raises ConfigError for one that is none, or without the library.
        """
        endpoint = endpoint_of(url)
        if not all(map(_is_installed, NEEDED)):
            raise ConfigError("spans need OpenTelemetry, which is not installed: pip install 'hybrid-cache[otel]'")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = new_provider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def request(self, scope: Scope, facts: Facts, fields: dict[str, object]) -> str | None:
        """Makes the spans of a request that has ended -> the id of their trace.

        fields: of its line in the log
        """
        from opentelemetry import trace

        end_s, to_epoch_s = time.monotonic(), time.time() - time.monotonic()

        def at(seconds: float) -> int:
            return int((seconds + to_epoch_s) * 1e9)

        parent = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(
            _name_of(scope),
            parent,
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(scope, facts, fields),
            start_time=at(facts.began_s),
        )
        within = trace.set_span_in_context(span)
        for name, start_s, stop_s in _phases(facts):
            self._tracer.start_span(name, within, start_time=at(start_s)).end(at(stop_s))
        if facts.problem is not None and facts.problem.status >= 500:
            span.set_status(trace.StatusCode.ERROR, facts.problem.for_log)
        span.end(at(end_s))
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else None

    def close(self) -> None:
        """Sends what is left, and does not wait for a collector that does not answer."""
        thread = threading.Thread(target=self._provider.shutdown, name="hybrid-cache-last-spans", daemon=True)
        thread.start()
        thread.join(LAST_S)


def new_provider() -> "TracerProvider":
    """One that says whose spans these are."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    about = {"service.version": __version__} | ({} if named else {"service.name": NAME})
    return TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)


def endpoint_of(url: str) -> str:
    """Where spans go at a collector: what is given, or the usual place where that has no path. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"otlp_endpoint is {url!r}, must be like http://127.0.0.1:4318")
    return url if parts.path.strip("/") else url.rstrip("/") + TRACES


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it would be in
        return False


def _name_of(scope: Scope) -> str:
    return f"{scope['method']} {route}" if (route := _route_of(scope)) else str(scope["method"])


def _route_of(scope: Scope) -> str | None:
    """The pattern of the path, of which there are few."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path


def _attributes(scope: Scope, facts: Facts, fields: dict[str, object]) -> Attributes:
    route, client = _route_of(scope), scope.get("client") or (None, 0)
    known: dict[str, object] = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": fields["status"],
        "url.scheme": scope.get("scheme", "http"),
        "url.path": fields["path"],
        "client.address": client[0],
        "error.type": facts.problem and (facts.problem.code or str(facts.problem.status)),
        "hybrid_cache.request_id": fields["request_id"],
        "hybrid_cache.api_key": facts.key,
    }
    if facts.model is not None:
        known |= {
            "gen_ai.operation.name": OPERATIONS.get(route or "", "chat") if facts.finish_reasons else None,
            "gen_ai.provider.name": NAME,
            "gen_ai.request.model": fields["model"],
            "gen_ai.request.stream": facts.stream,
            "gen_ai.usage.input_tokens": facts.prompt_tokens,
            "gen_ai.usage.output_tokens": facts.generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": facts.cached_tokens,
            "gen_ai.response.finish_reasons": [*facts.finish_reasons] or None,
            "gen_ai.response.time_to_first_chunk": fields["first_token_s"],
        }
    return {name: value for name, value in known.items() if isinstance(value, str | bool | int | float | list)}


def _phases(facts: Facts) -> list[tuple[str, float, float]]:
    """(name, start, end) of what the engine did, on the clock of the facts."""
    if facts.submitted_s is None or facts.ended_s is None or facts.queued_s is None:
        return []
    begun_s = min(facts.submitted_s + facts.queued_s, facts.ended_s)
    first_s = facts.first_token_s
    phases = [("queue", facts.submitted_s, begun_s)]
    if first_s is not None:
        phases += [("prefill", begun_s, max(first_s, begun_s)), ("decode", max(first_s, begun_s), facts.ended_s)]
    return phases
