"""vllm-router, unmodified, in front of two servers: `--policy kv_aware` sends conversations where they can go on.

The router comes from an environment of its own, which `make router` sets up; VLLM_ROUTER names its program.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import MODEL, serving

ROUTER = Path(os.environ.get("VLLM_ROUTER", Path(__file__).parents[2] / ".venv/router/bin/vllm-router"))
EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}'
SALTED = EVENTS.replace("{", '{"publish_salted": true, ')
KEY = "a-key"
NUM_TALKS = 10
HEARD_S = 0.5  # for events to arrive
FINISHED = re.compile(r"^hybrid_cache_choices_finished_total\{.*\} (\S+)$", re.MULTILINE)
START_S = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROUTER.exists(), reason=f"no vllm-router at {ROUTER}: make router installs it"),
]

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Fleet:
    """Two servers, and the router in front of them."""

    router: httpx.Client
    servers: tuple[httpx.Client, ...]

    def send(self, to: httpx.Client, messages: Messages, **more: str) -> dict[str, Any]:
        """The next turn: the answer is added to the messages."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **more}
        answer = to.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        reply = answer.json()
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        return reply  # type: ignore[no-any-return]

    def route(self, messages: Messages) -> tuple[int, int]:
        """The next turn by way of the router -> which server answered, and its cached tokens."""
        before = self._answered()
        usage = self.send(self.router, messages)["usage"]
        moved = [place for place, (old, new) in enumerate(zip(before, self._answered(), strict=True)) if new > old]
        assert len(moved) == 1
        return moved[0], usage["prompt_tokens_details"]["cached_tokens"]

    def _answered(self) -> list[float]:
        return [sum(map(float, FINISHED.findall(server.get("/metrics").text))) for server in self.servers]

    def forget(self, place: int) -> None:
        """A server drops all that it has cached."""
        assert self.servers[place].delete("/cache/conversations").status_code == 200


@contextmanager
def routing(urls: list[str], log: Path, *options: str) -> Iterator[httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, metrics = one.getsockname()[1], other.getsockname()[1]
    command = [ROUTER, "--host", "127.0.0.1", "--port", port, "--prometheus-host", "127.0.0.1"]
    command += ["--prometheus-port", metrics, "--policy", "kv_aware", *options, "--worker-urls", *urls]
    with log.open("w") as out, subprocess.Popen(list(map(str, command)), stdout=out, stderr=out) as process:
        try:
            with client_of(f"http://127.0.0.1:{port}") as client:
                wait_until_ready(client, process, log)
                yield client
        finally:
            process.kill()


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"})


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the router did not start: " + log.read_text())


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[list[str]]:
    with ExitStack() as running:
        logs = (tmp_path / "first", tmp_path / "second")
        yield [running.enter_context(serving(log, "--kv-events-config", EVENTS)) for log in logs]


@pytest.fixture
def fleet(urls: list[str], tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as clients:
        servers = tuple(clients.enter_context(client_of(url)) for url in urls)
        yield Fleet(clients.enter_context(routing(urls, tmp_path / "router")), servers)


def talk(name: str) -> Messages:
    system = f"You keep the boxes of {name}, and look into them one after the other. " * 12
    return [{"role": "system", "content": system}, {"role": "user", "content": "Hello!"}]


def ask(messages: Messages, turn: int) -> Messages:
    messages.append({"role": "user", "content": f"What is in box {turn} of the upper row?"})
    return messages


def test_conversations_go_on_where_they_began(fleet: Fleet) -> None:
    """Half of them on either server, which the router has only heard of."""
    talks = [(place % 2, talk(f"house {place}")) for place in range(NUM_TALKS)]
    for server, messages in talks:
        fleet.send(fleet.servers[server], messages)
    for turn in range(3):
        time.sleep(HEARD_S)
        for server, messages in talks:
            found, cached = fleet.route(ask(messages, turn))
            assert found == server
            assert cached >= 128


def test_new_conversations_are_shared_out_and_stay_where_the_router_put_them(fleet: Fleet) -> None:
    talks = [talk(f"street {place}") for place in range(NUM_TALKS)]
    first = []
    for messages in talks:
        first.append(fleet.route(messages)[0])
    for turn in range(2):
        time.sleep(HEARD_S)
        assert [fleet.route(ask(messages, turn))[0] for messages in talks] == first


def test_a_conversation_goes_to_the_server_that_still_has_it(fleet: Fleet) -> None:
    """Both had it; one has dropped it, and has said so."""
    for dropped in (0, 1):
        messages = talk(f"the server {dropped}")
        for server in fleet.servers:
            fleet.send(server, list(messages))
        ask(messages, 0)
        fleet.forget(dropped)
        time.sleep(HEARD_S)
        found, cached = fleet.route(messages)
        assert found == 1 - dropped
        assert cached >= 128


def test_a_router_that_comes_late_knows_what_was_said_before(urls: list[str], tmp_path: Path) -> None:
    with ExitStack() as clients:
        servers = tuple(clients.enter_context(client_of(url)) for url in urls)
        early = Fleet(servers[0], servers)
        talks = [(place % 2, talk(f"garden {place}")) for place in range(4)]
        for server, messages in talks:
            early.send(servers[server], messages)
        fleet = Fleet(clients.enter_context(routing(urls, tmp_path / "router")), servers)
        time.sleep(2 + HEARD_S)  # a heartbeat shows the router what it has missed
        assert [fleet.route(ask(messages, 0))[0] for _, messages in talks] == [server for server, _ in talks]


def test_with_an_api_key_and_beside_salted_requests(tmp_path: Path) -> None:
    """The router drops batches with a salt, and goes on."""
    with ExitStack() as running:
        options = ("--api-key", KEY, "--kv-events-config", SALTED)
        urls = [running.enter_context(serving(tmp_path / name, *options)) for name in ("first", "second")]
        servers = tuple(running.enter_context(client_of(url)) for url in urls)
        fleet = Fleet(running.enter_context(routing(urls, tmp_path / "router", "--api-key", KEY)), servers)
        talks = [(place % 2, talk(f"yard {place}")) for place in range(6)]
        for server, messages in talks:
            fleet.send(servers[server], talk("nobody else"), cache_salt="mine")
            fleet.send(servers[server], messages)
        time.sleep(2 + HEARD_S)
        assert [fleet.route(ask(messages, 0))[0] for _, messages in talks] == [server for server, _ in talks]
        assert "unsupported KV event field: cache_salt" in (tmp_path / "router").read_text()


def test_after_a_restart_conversations_go_to_the_server_that_has_them_on_its_disk(tmp_path: Path) -> None:
    """Two servers with a folder each; both are killed, and nothing of what they had is in memory any more."""
    talks = [(place % 2, talk(f"bridge {place}")) for place in range(6)]
    with on_disks(tmp_path) as servers:
        early = Fleet(servers[0], servers)
        for server, messages in talks:
            early.send(servers[server], messages)
        wait_until_written(servers)
    with on_disks(tmp_path) as servers, routing([str(each.base_url) for each in servers], tmp_path / "router") as way:
        fleet = Fleet(way, servers)
        time.sleep(2 + HEARD_S)
        for turn in range(2):
            for server, messages in talks:
                found, cached = fleet.route(ask(messages, turn))
                assert found == server
                assert cached >= 128
            time.sleep(HEARD_S)


@contextmanager
def on_disks(path: Path) -> Iterator[tuple[httpx.Client, ...]]:
    """Servers with a folder each, which they find again."""
    with ExitStack() as running:
        options = ("--kv-events-config", EVENTS, "--disk-budget", "1GiB", "--disk")
        names = ("first", "second")
        urls = [running.enter_context(serving(path / f"{each}.log", *options, str(path / each))) for each in names]
        yield tuple(running.enter_context(client_of(url)) for url in urls)


def wait_until_written(servers: tuple[httpx.Client, ...]) -> None:
    deadline = time.monotonic() + START_S
    while any("hybrid_cache_disk_waiting 0.0" not in server.get("/metrics").text for server in servers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # what is being written now
