"""One line in the log for each request, when it has ended, whatever its end is."""

import asyncio
import logging
import time
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_cache.api.server.errors import Problem, current_request_id
from hybrid_cache.api.server.facts import Facts, new_facts
from hybrid_cache.api.server.logs import FIELDS, IN_MESSAGE, text_of
from hybrid_cache.api.server.tracing import Tracing

CLIENT_LEFT = 499  # in place of a status: the client went away before it had all of its answer
PROBES = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})  # asked again and again
FIRST = ("method", "path", "status")  # what a line begins with
NAMES = (  # of the fields of a line, all of which are always there
    *("request_id", *FIRST, "client", "key", "model", "stream", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("queued_s", "first_token_s", "total_s", "finish_reasons", "trace_id", "error_code", "error"),
)
MOST_NAME = 200  # characters of a path or the name of a model
MOST_CONTENT = 4096  # bytes that are shown of a body

logger = logging.getLogger("hybrid_cache.request")


class RequestLog:
    """Logs each request with what is known of it, see `facts`. Outermost."""

    def __init__(self, app: ASGIApp, *, content: bool = False, tracing: Tracing | None = None) -> None:
        """content: bodies and answers are logged, too, at debug level   tracing: makes spans of requests, too"""
        self._app = app
        self._tracing = tracing
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = _Exchange(scope, receive, send, content=self._content)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.error = "the server ended before the answer did"
            raise
        except Exception as error:
            exchange.error = f"the answer broke off with {type(error).__name__}"
            raise
        finally:
            exchange.log(self._tracing)


def log_unreadable(client: tuple[str, int] | None, problem: Problem) -> None:
    """Logs the refusal of what was no request that could be read."""
    known = {"status": problem.status, "client": _address(client), "error_code": problem.code, "error": problem.for_log}
    _log(logging.INFO, {**dict.fromkeys(NAMES), **known})


class _Exchange:
    """A request and what is sent in answer to it, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, content: bool) -> None:
        self.facts = new_facts()
        self.error: str | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._status: int | None = None
        self._complete = self._left = False
        self._said = (_Excerpt(), _Excerpt()) if content and logger.isEnabledFor(logging.DEBUG) else None
        self._full_errors = content

    async def receive(self) -> Message:
        message = await self._receive()
        self._left |= message["type"] == "http.disconnect" and not self._complete
        if self._said:
            self._said[0].add(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not self._left:
            self._complete = not message.get("more_body", False)
        if self._said:
            self._said[1].add(message.get("body", b""))
        await self._send(message)

    def log(self, tracing: Tracing | None) -> None:
        level, probe = self._level(), self._scope["path"] in PROBES
        fields = self._fields()
        if tracing is not None and not probe:
            fields["trace_id"] = tracing.request(self._scope, self.facts, fields)
        if not logger.isEnabledFor(level):
            return
        _log(level, fields)
        for name, said in zip(("body", "answer"), self._said or (), strict=False):
            shown = {"request_id": fields["request_id"], name: str(said)}
            logger.debug("the %s of a request", name, extra={FIELDS: shown})

    @property
    def status(self) -> int | None:
        return CLIENT_LEFT if self._left else self._status

    def _level(self) -> int:
        if self._scope["path"] in PROBES:
            return logging.DEBUG
        status = self.facts.problem.status if self.facts.problem else self._status or 500
        if status in (429, 503):
            return logging.WARNING
        return logging.ERROR if status >= 500 or (self.error and not self._left) else logging.INFO

    def _fields(self) -> dict[str, object]:
        facts, now = self.facts, time.monotonic()
        return {
            "request_id": current_request_id.get(),
            "method": self._scope["method"],
            "path": cut(self._scope["path"]),
            "status": self.status,
            "client": _address(self._scope.get("client")),
            "key": facts.key,
            "model": facts.model and cut(facts.model),
            "stream": facts.stream,
            "prompt_tokens": facts.prompt_tokens,
            "cached_tokens": facts.cached_tokens,
            "generated_tokens": facts.generated_tokens,
            "queued_s": _rounded(facts.queued_s),
            "first_token_s": _rounded(facts.first_token_s and facts.first_token_s - facts.began_s),
            "total_s": _rounded(now - facts.began_s),
            "finish_reasons": list(facts.finish_reasons) or None,
            "trace_id": None,  # until there is a span
            "error_code": facts.problem and facts.problem.code,
            "error": self._error(facts),
        }

    def _error(self, facts: Facts) -> str | None:
        if facts.problem is None:
            return self.error
        return facts.problem.message if self._full_errors else facts.problem.for_log


class _Excerpt:
    """The beginning and the end of bytes that pass, within a bound."""

    def __init__(self) -> None:
        self._first = bytearray()
        self._last: deque[int] = deque(maxlen=MOST_CONTENT // 2)
        self._size = 0

    def add(self, data: bytes) -> None:
        room = MOST_CONTENT // 2 - len(self._first)
        self._first += data[:room]
        self._last.extend(data[room:][-MOST_CONTENT // 2 :])
        self._size += len(data)

    def __str__(self) -> str:
        between = self._size - len(self._first) - len(self._last)
        parts = [self._first.decode("utf-8", "replace"), bytes(self._last).decode("utf-8", "replace")]
        return f" [{between} bytes] ".join(parts) if between else "".join(parts)


def _log(level: int, fields: dict[str, object]) -> None:
    first = ["-" if fields[name] is None else text_of(fields[name]) for name in FIRST]
    logger.log(level, "%s", " ".join(first), extra={FIELDS: fields, IN_MESSAGE: FIRST})


def _address(client: tuple[str, int] | None) -> str | None:
    return f"{client[0]}:{client[1]}" if client else None


def cut(text: str) -> str:
    return text if len(text) <= MOST_NAME else text[:MOST_NAME] + "..."


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
