"""HTTP/1.1 with bounds on how long a client may keep a connection to itself.

uvicorn bounds only the time between two requests. Here headers must come in time, and answers must be read in time.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hybrid_cache.api.server.connections import CONNECTION, Connection, Connections
from hybrid_cache.api.server.errors import invalid_http
from hybrid_cache.api.server.request_log import log_unreadable
from hybrid_cache.errors import ConfigError

HEADER_BYTES = 64 * 2**10  # most of one request, its first line included
TRAILING_BYTES = 64 * 2**10  # read of what comes after a request that is in progress
READ_BYTES = 8 * 2**10  # at once: in chunks of a byte each these take 20 ms


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a server waits for a client."""

    header_timeout_s: float = 10.0  # from the first byte of a request, or from connecting, to the end of its headers
    body_timeout_s: float = 30.0  # as in ServerSettings
    reader_timeout_s: float = 120.0  # while the client takes nothing, or next to nothing, of what is ready for it

    def __post_init__(self) -> None:
        for name in ("header_timeout_s", "body_timeout_s", "reader_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be more than 0")


class StrictConnection(h11.Connection):
    """Refuses long headers, and a request with two lengths, of which a proxy may have taken the other one.

    bodiless: the answer to the latest request has no body, whatever its headers say
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self.bodiless = False

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.bodiless = event.method == b"HEAD"
            size = len(event.target) + sum(len(name) + len(value) + 3 for name, value in event.headers)
            if size > HEADER_BYTES:  # h11 looks at the size of what is incomplete alone
                raise h11.RemoteProtocolError(f"headers of more than {HEADER_BYTES} bytes")
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("no version that is spoken here")
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        return event


class ServerConfig(uvicorn.Config):
    """uvicorn's, with our protocol and its bounds."""

    def __init__(self, app: ASGIApp, connections: Connections, patience: Patience, **more: Any) -> None:
        """more: as for `uvicorn.Config`"""
        self.connections = connections
        self.patience = patience
        super().__init__(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            access_log=False,
            log_config=None,  # see `logs`
            server_header=False,
            **{"log_level": "warning", **more},
        )


class _Clock:
    """Does something unless it is stopped in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, act: Callable[[], None]) -> None:
        self._loop, self._seconds, self._act = loop, seconds, act
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Does nothing while it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._ring)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._act()


class Protocol(H11Protocol):
    """HTTP/1.1 with a client who is not waited for without end."""

    conn: StrictConnection

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._connection = Connection()
        super().__init__(config, server_state, {**app_state, CONNECTION: self._connection}, _loop)
        self.conn = StrictConnection()
        self._connections = config.connections
        self._descriptor = -1
        self._header_clock = _Clock(self.loop, config.patience.header_timeout_s, self._drop_slow_writer)
        self._reader_clock = _Clock(self.loop, config.patience.reader_timeout_s, self._drop_slow_reader)

    @property
    def _busy(self) -> bool:
        """Whether a request is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # not under TLS
            transport.max_size = READ_BYTES
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._header_clock.start()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.close()
        self._header_clock.stop()
        self._reader_clock.stop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._busy:
            self._header_clock.stop()
            self._connections.work(self._descriptor)
        else:  # part of a header, or of a body that was answered before its end
            self._header_clock.start()

    def handle_events(self) -> None:
        super().handle_events()
        if self._busy and self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < TRAILING_BYTES:
            self.flow.resume_reading()  # or nobody would see that the client goes away

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which may begin with the next request
        if not self._busy:
            self._connections.rest(self._descriptor)
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_clock.stop()  # it took something
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless an answer is out already, and closes: a request in progress has no client."""
        if self._busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        problem = invalid_http(HEADER_BYTES)
        log_unreadable(self.client, problem)
        body = json.dumps(problem.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=problem.status, headers=headers, reason=b"Bad Request"),
            h11.Data(data=b"" if self.conn.bodiless else body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Says nothing: HTTP lets a server go on as if it had not been asked."""

    def _watch_reader(self) -> None:
        if self._must_read:
            self._reader_clock.start()

    @property
    def _must_read(self) -> bool:
        """Whether nothing goes on here until the client reads."""
        return self.flow.write_paused or (not self._busy and self.transport.get_write_buffer_size() > 0)

    def _drop_slow_reader(self) -> None:
        if self._must_read:
            self.transport.abort()

    def _drop_slow_writer(self) -> None:
        if not self._busy:
            self.transport.abort()
