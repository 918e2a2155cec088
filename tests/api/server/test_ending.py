"""A server process ends in time, whatever hangs in it, and says with its status how it ended."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from hybrid_cache.api.server.ending import SECOND_S, Deadline
from tests.api.server.test_server_process import LongAnswer, Server, server, wait_for_draining
from tests.soak.faulty_server import ENDS, FAILS, HANGING_TEXT, HANGS, SLEEPS

FAULTY = (sys.executable, "-m", "tests.soak.faulty_server")
SLACK_S = 2  # of a machine with other things to do


def ask(url: str, prompt: list[int] | str, **more: object) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@contextmanager
def asking(url: str, prompt: list[int] | str) -> Iterator[list[httpx.Response]]:
    """A request on a thread of its own; its reply is there at the end, if it has got one."""
    replies: list[httpx.Response] = []

    def run() -> None:
        with suppress(httpx.TransportError):
            replies.append(ask(url, prompt))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    yield replies
    thread.join(30)
    assert not thread.is_alive()


def seconds_to_end(started: Server, *signals: signal.Signals) -> tuple[float, int]:
    """From the last signal to the end of the process; its status."""
    for number in signals[:-1]:
        started.process.send_signal(number)
        time.sleep(0.3)
    begin = time.monotonic()
    started.process.send_signal(signals[-1])
    code = started.wait()
    return time.monotonic() - begin, code


@pytest.mark.parametrize("signals", [1, 2])
def test_a_step_that_hangs_turns_health_red_and_does_not_keep_the_process(signals: int) -> None:
    options = ("--hung-after", "1", "--drain-timeout", "1" if signals == 1 else "30")
    with server(*options, program=FAULTY) as started, asking(started.url, [HANGS] * 40) as replies:
        wait_for_ping(started.url, 503)
        for path in ("health", "ready"):
            reply = httpx.get(f"{started.url}/{path}")
            assert (reply.status_code, reply.json()["status"]) == (503, "hung")
        refused = ask(started.url, "Hello")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "hybrid_cache_step_age_seconds" in httpx.get(f"{started.url}/metrics").text
        seconds, code = seconds_to_end(started, *[signal.SIGTERM] * signals)
        assert code == 1
        assert seconds < (1 + 5 if signals == 1 else SECOND_S) + SLACK_S
    if signals == 1:
        assert [reply.status_code for reply in replies] == [503]


def wait_for_ping(url: str, status: int) -> None:
    deadline = time.monotonic() + 20
    while httpx.get(f"{url}/ping").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_thread_that_hangs_and_a_reader_that_does_not_read_do_not_keep_the_process() -> None:
    with server("--drain-timeout", "1", program=FAULTY) as started, asking(started.url, HANGING_TEXT):
        address = ("127.0.0.1", int(started.url.rpartition(":")[2]))
        with socket.create_connection(address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = '{"prompt": "a", "max_tokens": 20000, "ignore_eos": true, "stream": true, "n": 4}'
            kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n{body}".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            time.sleep(1)
            seconds, code = seconds_to_end(started, signal.SIGTERM)
        assert code == 1
        assert seconds < 1 + 5 + SLACK_S


def test_bad_requests_and_long_steps_pass_and_an_engine_that_fails_ends_the_process() -> None:
    """But only once clients are told."""
    with server("--hung-after", "1", program=FAULTY) as started:
        answer = LongAnswer(started.url, max_tokens=200)
        for _ in range(2):
            assert ask(started.url, [FAILS] * 40).status_code == 500
        answer.wait()
        assert answer.complete
        with asking(started.url, [SLEEPS] * 40) as replies:
            wait_for_ping(started.url, 503)
            wait_for_ping(started.url, 200)
        assert [reply.status_code for reply in replies] == [200]
        answer = LongAnswer(started.url, max_tokens=3000)
        reply = ask(started.url, [ENDS] * 40)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "as asked" not in reply.text
        answer.wait()
        assert "server_unavailable" in answer.events[-1]
        assert started.wait(10) == 1


@pytest.mark.parametrize("output", ["reader gone", pytest.param("reader stopped", marks=pytest.mark.slow), "full disk"])
def test_what_cannot_be_written_changes_nothing(output: str) -> None:
    """A running answer is finished after SIGTERM, and errors that are logged are answered."""
    with free_port() as port, unwritable(output) as (number, after_start):
        command = [*FAULTY, "serve", "--port", str(port), "--budget", "64MiB", "--threads", "1"]
        with subprocess.Popen(command, stdout=number, stderr=number) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                wait_for(url, process)
                after_start()
                for _ in range(3):
                    assert ask(url, [FAILS] * 40).status_code == 500  # which logs a traceback, more than the pipe holds
                lost = re.search(r"^hybrid_cache_log_records_lost_total (.+)$", httpx.get(f"{url}/metrics").text, re.M)
                assert lost is not None
                assert float(lost[1]) > 0 or output == "reader stopped"  # then they wait, up to a bound
                answer = LongAnswer(url, max_tokens=600)
                process.send_signal(signal.SIGTERM)
                wait_for_draining(url)
                answer.wait()
                assert answer.complete
                assert process.wait(15) == 0
            finally:
                process.kill()


@contextmanager
def free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    yield port


@contextmanager
def unwritable(output: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A file number, and what makes it unwritable once the server runs."""
    if output == "full disk":
        with open("/dev/full", "wb") as full:
            yield full.fileno(), lambda: None
        return
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    closed = []

    def leave() -> None:
        if output == "reader gone":
            os.close(reader)
            closed.append(reader)

    try:
        yield writer, leave
    finally:
        os.close(writer)
        if not closed:
            os.close(reader)


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the server is not ready")


class End:
    def __init__(self) -> None:
        self.came = threading.Event()
        self.began_s = time.monotonic()

    def __call__(self) -> None:
        self.seconds = time.monotonic() - self.began_s
        self.came.set()


def test_the_earlier_of_two_deadlines_counts() -> None:
    end = End()
    deadline = Deadline(30, end)
    deadline.within(20)
    deadline.within(0.2)
    deadline.within(10)
    assert end.came.wait(5)
    assert 0.2 <= end.seconds < 2


BUSY = """
import hashlib, signal
from hybrid_cache.api.server import ending
ending.FORCE_S, ending.SECOND_S = {force}, {second}
signal.signal(signal.SIGTERM, lambda *_: None)
ending.Deadline(0.0).watch_signals()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_are_seen_while_the_main_thread_is_in_one_long_call(signals: int) -> None:
    program = BUSY.format(force=0.2 if signals == 1 else 60, second=0.2)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.02)
            assert process.wait(20) == 1
        finally:
            process.kill()
