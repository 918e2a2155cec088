"""Clients that keep a connection to themselves: half-open, slow, or too many. Raw sockets against a real server."""

import asyncio
import errno
import json
import logging
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from hybrid_cache.api.server import connections
from hybrid_cache.api.server.connections import Connections, Listener, connection_limit
from hybrid_cache.api.server.protocol import HEADER_BYTES, TRAILING_BYTES, Patience, Protocol
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.errors import ConfigError
from tests.api.servers import GatedModel, new_app, new_engine, over_the_wire, until_free
from tests.fakes import SumModel

SHORT = Patience(header_timeout_s=0.3, reader_timeout_s=0.4)
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BIG = 32 << 20  # more than the buffers of two sockets take


def dial(url: str, *, receive_buffer: int = 0) -> socket.socket:
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(5)
    made.connect((urlsplit(url).hostname, urlsplit(url).port))
    return made


def until_closed(client: socket.socket) -> bytes:
    """All that still comes."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            received += part
    return bytes(received)


def seconds_until_closed(client: socket.socket, drip: bytes = b"") -> float:
    """How long the other side keeps it, while a byte is sent now and then."""
    begin = time.monotonic()
    client.settimeout(0.05)
    with suppress(ConnectionResetError, BrokenPipeError):
        while time.monotonic() < begin + 5:
            try:
                if not client.recv(1 << 16):
                    break
            except TimeoutError:
                client.sendall(drip)
    return time.monotonic() - begin


def answer(client: socket.socket) -> bytes:
    """One answer that has a length."""
    received, length = b"", 1
    while len(received) < length:
        part = client.recv(1 << 16)
        assert part, f"closed after {received!r}"
        received += part
        head, end, _ = received.partition(b"\r\n\r\n")
        if found := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            length = len(head) + len(end) + int(found[1])
    return received


@pytest.fixture(scope="module")
def quick(sum_text: TextModel) -> Iterator[str]:
    """A server with little patience."""
    with over_the_wire(new_app(new_engine(), sum_text, body_timeout_s=0.4), patience=SHORT) as url:
        yield url


@pytest.mark.parametrize(
    ("begun", "drip"),
    [(b"", b""), (b"GET /health HTTP/1.1\r\nHost: x\r\n", b""), (b"GET /health HTTP/1.1\r\nX: ", b"x")],
    ids=["silent", "half", "dripping"],
)
def test_headers_that_do_not_end_end_the_connection(quick: str, begun: bytes, drip: bytes) -> None:
    with dial(quick) as client:
        client.sendall(begun)
        assert 0.2 < seconds_until_closed(client, drip) < 2


def test_so_do_headers_of_a_second_request(quick: str) -> None:
    with dial(quick) as client:
        client.sendall(HEALTH)
        assert answer(client).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # longer than headers may take: between requests another time counts
        client.sendall(HEALTH)
        assert answer(client).startswith(b"HTTP/1.1 200")
        client.sendall(HEALTH[:10])
        assert 0.2 < seconds_until_closed(client, b"x") < 2


@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_body_that_does_not_end_is_408(quick: str, framing: bytes) -> None:
    with dial(quick) as client:
        begin = time.monotonic()
        client.sendall(POST + framing)
        received = until_closed(client)
        assert 0.3 < time.monotonic() - begin < 2
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_body_that_drips_is_408(quick: str) -> None:
    with dial(quick) as client:
        client.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        assert 0.3 < seconds_until_closed(client, b" ") < 2


def test_a_large_body_may_take_longer(quick: str) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode() + b" " * 400_000
    with dial(quick) as client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for begin in range(0, len(body), 50_000):
            client.sendall(body[begin : begin + 50_000])
            time.sleep(0.1)
        assert answer(client).startswith(b"HTTP/1.1 200")


def test_what_follows_an_answer_is_not_read_for_ever(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("k",)), patience=SHORT) as url, dial(url) as client:
        client.sendall(POST + b"Content-Length: 100000\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 401")
        assert 0.2 < seconds_until_closed(client, b" ") < 2


def test_the_connection_idle_longest_makes_room(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text), max_connections=4) as url, ExitStack() as stack:
        clients = [stack.enter_context(dial(url)) for _ in range(4)]
        clients[0].sendall(HEALTH)  # the second is now idle longest
        assert answer(clients[0]).startswith(b"HTTP/1.1 200")
        clients.append(stack.enter_context(dial(url)))
        assert until_closed(clients.pop(1)) == b""
        for client in clients[::-1]:
            client.sendall(HEALTH)
            assert answer(client).startswith(b"HTTP/1.1 200")


def test_a_flood_of_idle_connections_does_not_shut_others_out(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text), max_connections=8) as url, ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(url))
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=2).status_code == 200


def test_one_too_many_is_closed_while_all_others_are_busy(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        app = new_app(new_engine(model), sum_text)
        with over_the_wire(app, max_connections=2) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                body = {"prompt": "x", "max_tokens": 2}
                asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
                await asyncio.to_thread(model.reached.wait, 10)
                await asyncio.sleep(0.1)
                with dial(url) as third:
                    assert await asyncio.to_thread(until_closed, third) == b""
                model.gate.set()
                assert [(await reply).status_code for reply in asked] == [200, 200]
                assert (await client.get("/health")).status_code == 200

    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("status", ["Connection: close\r\n", ""], ids=["last", "one of many"])
def test_an_answer_that_nobody_reads_is_dropped(status: str) -> None:
    async def big(request: Request) -> Response:
        return Response(bytes(BIG))

    with over_the_wire(Starlette(routes=[Route("/", big)]), patience=SHORT) as url, dial(url) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{status}\r\n".encode())
        time.sleep(1)
        assert len(until_closed(client)) < BIG


def test_an_answer_that_is_read_slowly_arrives() -> None:
    parts = 60

    async def slow(request: Request) -> Response:
        return StreamingResponse(iter([bytes(1 << 18)] * parts))

    with over_the_wire(Starlette(routes=[Route("/", slow)]), patience=SHORT) as url, dial(url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while part := client.recv(1 << 20):
            received += len(part)
            time.sleep(0.02)
    assert received > parts << 18


class SlowModel(SumModel):
    """It takes its time for a step."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        time.sleep(0.003)
        return super().forward(batch, cache)


def test_a_stream_that_nobody_reads_is_aborted(sum_text: TextModel) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 5})
    engine = new_engine(SlowModel())  # it would take 12 seconds
    with (
        over_the_wire(new_app(engine, sum_text), patience=SHORT, send_buffer=1 << 12) as url,
        dial(url, receive_buffer=1 << 12) as client,
    ):
        client.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        while not engine.stats().generated_tokens:
            time.sleep(0.01)
        asyncio.run(until_free(engine))
        assert engine.stats().generated_tokens < 3000
        assert b"[DONE]" not in until_closed(client)


FRAMINGS = {
    "two lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "lengths that differ": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "a signed length": b"Content-Length: +4\r\n\r\nabcd",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_a_request_whose_end_is_in_doubt_is_400_and_the_last(quick: str, name: str) -> None:
    with dial(quick) as client:
        client.sendall(POST + FRAMINGS[name] + HEALTH)
        received = until_closed(client)
    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1") == 1
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_what_is_no_http_about_a_resource_without_its_body_has_no_body_either(
    quick: str, caplog: pytest.LogCaptureFixture
) -> None:
    for framing in FRAMINGS.values():
        with dial(quick) as client:
            client.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\n" + framing)
            received = until_closed(client)
        assert received.startswith(b"HTTP/1.1 400")
        assert received.count(b"HTTP/1.1") == 1
    with dial(quick) as client:
        client.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\n" + FRAMINGS["two lengths"])
        assert until_closed(client).endswith(b"\r\n\r\n")
    assert not [record for record in caplog.records if record.exc_info]


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """uvicorn's records, which its servers keep from the root when they start, are in `caplog`, too."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def test_nonsense_after_an_answer_leaves_no_traceback(sum_text: TextModel, caplog: pytest.LogCaptureFixture) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("k",))) as url, heard(caplog), dial(url) as client:
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        assert answer(client).startswith(b"HTTP/1.1 401")
        client.sendall(b"this is no chunk\r\n")
        assert until_closed(client) == b""
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert any("Invalid HTTP request" in record.message for record in caplog.records), "the log is seen"


def test_nonsense_while_an_answer_is_made_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The application answers when another answer is out, and before it hears that its client is gone."""
    refuse, refused = Protocol.send_400_response, threading.Event()

    def noted(protocol: Protocol, msg: str) -> None:
        refuse(protocol, msg)
        refused.set()

    async def answers_late(request: Request) -> Response:
        while not refused.is_set():
            await asyncio.sleep(0)
        return Response("too late")

    monkeypatch.setattr(Protocol, "send_400_response", noted)
    app = Starlette(routes=[Route("/", answers_late, methods=["POST"])])
    with over_the_wire(app) as url, heard(caplog), dial(url) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        time.sleep(0.1)
        client.sendall(b"this is no chunk\r\n")
        assert until_closed(client).count(b"HTTP/1.1 400") == 1
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


LONG_HEADERS = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: "


@pytest.mark.parametrize("pause_s", [0, 0.05])
@pytest.mark.parametrize(("size", "status"), [(HEADER_BYTES - 1000, 200), (HEADER_BYTES, 400)])
def test_headers_have_one_bound_however_they_come(quick: str, size: int, status: int, pause_s: float) -> None:
    rest = b"x" * size + b"\r\n\r\n"
    with dial(quick) as client:
        client.sendall(LONG_HEADERS + rest[:10_000])
        time.sleep(pause_s)
        client.sendall(rest[10_000:])
        received = answer(client)
    assert received.startswith(b"HTTP/1.1 %d" % status)
    assert status == 200 or b"more than 65536 bytes of headers" in received


@pytest.mark.parametrize(("number", "status"), [(15_000, 200), (17_000, 400)])
def test_so_have_many_short_headers_at_once(quick: str, number: int, status: int) -> None:
    with dial(quick) as client:
        client.sendall(HEALTH[:-2] + b"a:\r\n" * number + b"\r\n")
        assert answer(client).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize("late", [b"\r\n", HEALTH, b"x" * 10_000])
def test_who_goes_after_sending_more_is_noticed(sum_text: TextModel, late: bytes) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True})
    engine = new_engine(SlowModel())  # it would take 12 seconds
    with over_the_wire(new_app(engine, sum_text)) as url:
        with dial(url) as client:
            client.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n{body}".encode() + late)
            while not engine.stats().generated_tokens:
                time.sleep(0.01)
        asyncio.run(until_free(engine))
        assert engine.stats().generated_tokens < 3000


def test_what_comes_during_a_request_is_read_to_a_bound_and_answered(sum_text: TextModel) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 50, "ignore_eos": True})
    number = 2 * TRAILING_BYTES // len(HEALTH)
    with over_the_wire(new_app(new_engine(SlowModel()), sum_text)) as url, dial(url) as client:
        client.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        sender = threading.Thread(target=client.sendall, args=(HEALTH * number,))
        sender.start()
        received = b""
        while received.count(b"HTTP/1.1 200") < number + 1:
            received += client.recv(1 << 16)
        sender.join(10)


def test_the_body_of_a_get_is_not_waited_for(quick: str) -> None:
    with dial(quick) as client:
        client.sendall(HEALTH[:-2] + b"Content-Length: 100000\r\n\r\n" + b"x" * 50_000)
        assert answer(client).startswith(b"HTTP/1.1 200")
        client.sendall(b"x" * 50_000 + HEALTH)
        assert answer(client).startswith(b"HTTP/1.1 200")


def test_chunks_of_a_byte_leave_others_their_turn(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text)) as url, dial(url) as client:
        client.settimeout(30)
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        with ThreadPoolExecutor(1) as threads:
            client.sendall(b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n")
            answered, served = threads.submit(answer, client), 0
            while not answered.done():
                assert httpx.get(f"{url}/health", timeout=5).status_code == 200
                served += 1
    assert answered.result().startswith(b"HTTP/1.1 400")
    assert served > 3


def test_a_body_refused_at_its_end_is_refused_at_once(sum_text: TextModel) -> None:
    app = new_app(new_engine(), sum_text, max_body_bytes=1 << 20)
    with over_the_wire(app) as url:
        begin = time.monotonic()
        reply = httpx.post(f"{url}/v1/completions", content=b"," * 600_000)
        assert reply.status_code == 413
        assert time.monotonic() - begin < 2


def test_a_request_to_upgrade_is_answered_in_silence(quick: str, caplog: pytest.LogCaptureFixture) -> None:
    with dial(quick) as client:
        client.sendall(HEALTH[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")
    assert caplog.records == []


def test_a_body_awaited_at_the_end_of_the_server_is_503(sum_text: TextModel, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        with over_the_wire(new_app(new_engine(), sum_text), timeout_graceful_shutdown=1) as url:
            client = stack.enter_context(dial(url))
            client.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
            time.sleep(0.2)
        received = until_closed(client)
    assert received.startswith(b"HTTP/1.1 503")
    assert b'"the server is ending"' in received
    assert not [record for record in caplog.records if record.exc_info]


def test_without_descriptors_the_idle_leave_and_nothing_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with Listener(socket.create_server(("127.0.0.1", 0)), Connections(10)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as client, socket.create_connection(address):
            accepted, _ = listener.accept()
            monkeypatch.setattr(socket.socket, "accept", exhausted)
            with accepted, pytest.raises(BlockingIOError):
                listener.accept()
            assert client.recv(1) == b""


def test_no_more_are_open_than_the_limit_and_those_who_leave() -> None:
    with Listener(socket.create_server(("127.0.0.1", 0)), Connections(8)) as listener, ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        accepted = [stack.enter_context(listener.accept()[0]) for _ in range(8 + 2)]
        with pytest.raises(BlockingIOError):
            listener.accept()
        for left in accepted[:2]:
            left.close()
        accepted.append(stack.enter_context(listener.accept()[0]))
        assert [made.fileno() < 0 for made in accepted] == [True] * 2 + [False] * 9


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """Pretends that these are the limits on open files. What they are set to will be in the list."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: told.append(limits))
    return told


def used() -> int:
    return len(os.listdir("/proc/self/fd")) + connections.SPARE_DESCRIPTORS


@pytest.mark.parametrize(
    ("asked", "soft", "hard", "room", "raised"),
    [
        (None, 20000, 20000, lambda used: 1024, None),
        (None, 256, 4096, lambda used: 1024, lambda used: used + 1024),
        (None, 256, 512, lambda used: 512 - used, lambda used: 512),
        (None, 512, 512, lambda used: 512 - used, None),
        (None, resource.RLIM_INFINITY, resource.RLIM_INFINITY, lambda used: 1024, None),
        (None, 256, resource.RLIM_INFINITY, lambda used: 1024, lambda used: used + 1024),
        (5000, 1024, 20000, lambda used: 5000, lambda used: used + 5000),
        (1, 20000, 20000, lambda used: 1, None),
    ],
)
def test_there_is_room_for_as_many_connections_as_files(
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    soft: int,
    hard: int,
    room: Callable[[int], int],
    raised: Callable[[int], int] | None,
) -> None:
    told = limits(monkeypatch, soft, hard)
    assert connection_limit(asked) == room(used())
    assert told == ([] if raised is None else [(raised(used()), hard)])


@pytest.mark.parametrize(("asked", "hard", "words"), [(0, 512, "0 conn"), (500, 512, "500 conn"), (None, 1, "1 files")])
def test_more_connections_than_files_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, hard: int, words: str
) -> None:
    limits(monkeypatch, hard, hard)
    with pytest.raises(ConfigError, match=words):
        connection_limit(asked)


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_no_patience_at_all_is_refused(bad: float) -> None:
    for name in ("header_timeout_s", "body_timeout_s", "reader_timeout_s"):
        with pytest.raises(ConfigError, match=name):
            Patience(**{name: bad})


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"Host: evil.example\r\n", 421), (b"Host: 127.0.0.1\r\nAuthorization: Bearer wrong\r\n", 401)],
    ids=["host", "key"],
)
def test_who_is_refused_gets_to_read_why_after_a_large_body(sum_text: TextModel, head: bytes, status: int) -> None:
    app = new_app(new_engine(), sum_text, api_keys=("right",), allowed_hosts=("127.0.0.1",))
    body = b"x" * 3_000_000
    with over_the_wire(app) as url:
        for _ in range(5):
            with dial(url) as client:
                framing = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
                client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + framing)
                client.sendall(body)
                assert until_closed(client).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize("version", [b"2.0", b"9.9", b"0.9"])
def test_a_version_that_nobody_speaks_is_refused(quick: str, version: bytes) -> None:
    with dial(quick) as client:
        client.sendall(HEALTH.replace(b"HTTP/1.1", b"HTTP/" + version))
        assert until_closed(client).startswith(b"HTTP/1.1 400")
