"""Two replicas of the embedded model on Ray Serve, as a command starts them.

Ray is in an environment of its own, which `make ray` sets up; HYBRID_CACHE_RAY names its interpreter.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HYBRID_CACHE_RAY", ROOT / ".venv/ray/bin/python"))
START_S = 180
PERIODS_S = 4.5  # for replicas to have said what they hold, and for what was expected of them to be forgotten
REPLICA = "x-replica"
KEY = "a-key"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"Ray Serve is not installed at {PYTHON}: make ray installs it"),
]

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Running:
    """Replicas behind Ray's proxy."""

    client: httpx.Client
    process: "subprocess.Popen[bytes]"
    log: Path

    def turn(self, messages: Messages, **more: Any) -> tuple[str, int]:
        """-> which replica answered, and its cached tokens; the answer is added to the messages."""
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **more}
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        reply = answer.json()
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        return answer.headers[REPLICA], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def running(folder: Path, *words: str) -> Iterator[Running]:
    """All processes that it starts are of one group, which ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "hybrid_cache.api.ray", "replicas=2", "budget=64MiB", f"port={port}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder)}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True, cwd=ROOT)
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers=headers) as client:
            wait_until_ready(process, log)
            yield Running(client, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while "serving on" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "the replicas did not start: " + log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = Path("/tmp") / f"hc-ray-{os.getpid()}"  # sockets have short names
    folder.mkdir()
    with running(folder, f"temp={folder}", "log_level=warning", f"api_key={KEY}") as started:
        yield started


def talk(name: str) -> Messages:
    system = f"You keep the boxes of {name}, and look into them one after the other. " * 12
    return [{"role": "system", "content": system}, {"role": "user", "content": "Hello!"}]


def ask(messages: Messages, turn: int) -> Messages:
    messages.append({"role": "user", "content": f"What is in box {turn} of the upper row?"})
    return messages


def test_conversations_go_on_where_they_began(fleet: Running) -> None:
    talks = [talk(f"house {place}") for place in range(8)]
    first = [fleet.turn(messages)[0] for messages in talks]
    assert len(set(first)) == 2
    for turn in range(2):
        time.sleep(PERIODS_S)  # nothing is expected any more: from now on all is as replicas have said
        for messages, mark in zip(talks, first, strict=True):
            found, cached = fleet.turn(ask(messages, turn))
            assert found == mark
            assert cached >= 128


def test_a_conversation_whose_state_is_gone_goes_where_another_has_it(fleet: Running) -> None:
    messages, other = talk("two"), talk("two")
    mark = fleet.turn(messages)[0]
    second = next(each for each in marks(fleet) if each != mark)
    answer = fleet.client.post(
        "/v1/chat/completions", json={"messages": other, "max_tokens": 8, "temperature": 0}, headers={REPLICA: second}
    )
    assert answer.headers[REPLICA] == second
    assert fleet.client.delete("/cache/conversations", headers={REPLICA: mark}).status_code == 200
    time.sleep(PERIODS_S)
    found, cached = fleet.turn(ask(messages, 0))
    assert found == second
    assert cached >= 128


def marks(fleet: Running) -> list[str]:
    found = set[str]()
    for number in range(40):
        found.add(fleet.turn(talk(f"street {time.monotonic()} {number}"), max_tokens=1)[0])
        if len(found) == 2:
            return sorted(found)
    raise AssertionError(f"one replica gets everything: {found}")


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/chat/completions", {"messages": talk("a"), "max_tokens": 8}, "data: [DONE]"),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 8}, "data: [DONE]"),
        (
            "/v1/messages",
            {"messages": talk("a")[1:], "max_tokens": 8, "model": "embedded"},
            'data: {"type":"message_stop"}',
        ),
        ("/v1/responses", {"input": "Hello"}, "event: response.completed"),
    ],
)
def test_every_dialect_streams(fleet: Running, path: str, body: dict[str, Any], last: str) -> None:
    with fleet.client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert any(line.startswith(last) for line in lines[-2:]), lines[-2:]
    assert len(lines) > 3


def test_a_stored_response_is_continued(fleet: Running) -> None:
    for number in range(4):
        first = fleet.client.post("/v1/responses", json={"input": f"Look into box {number}.", "max_output_tokens": 8})
        name = first.json()["id"]
        second = fleet.client.post(
            "/v1/responses", json={"input": "And the next?", "previous_response_id": name, "max_output_tokens": 8}
        )
        assert second.status_code == 200, second.text
        assert second.headers[REPLICA] == first.headers[REPLICA]
        assert fleet.client.get(f"/v1/responses/{name}").status_code == 200
    missing = fleet.client.get("/v1/responses/resp_" + "0" * 32)
    assert missing.status_code == 404
    assert "not found" in missing.json()["error"]["message"]


def test_errors_are_those_of_one_server(fleet: Running) -> None:
    with httpx.Client(base_url=fleet.client.base_url) as stranger:
        assert stranger.post("/v1/chat/completions", json={"messages": talk("a")}).status_code == 401
    wrong = fleet.client.post("/v1/chat/completions", json={"messages": "none"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert fleet.client.post("/v1/chat/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    assert fleet.client.get("/nothing").status_code == 404


def test_a_client_that_goes_away_frees_its_request(fleet: Running) -> None:
    body = {"prompt": "Count: ", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    with fleet.client.stream("POST", "/v1/completions", json=body) as answer:
        mark = answer.headers[REPLICA]
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while "hybrid_cache_requests_running 0.0" not in fleet.client.get("/metrics", headers={REPLICA: mark}).text:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.2)


def test_a_killed_replica_loses_no_request_and_breaks_streams_with_an_error(fleet: Running) -> None:
    """Whole answers are sent again, streams end with an event that says so."""
    results, lasts, stop = list[int](), list[str](), threading.Event()

    def whole(worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = {"messages": talk(f"garden {worker} {number}"), "max_tokens": 8}
            results.append(fleet.client.post("/v1/chat/completions", json=body).status_code)

    def stream(mark: str) -> None:
        body = {"prompt": "Count: ", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
        with fleet.client.stream("POST", "/v1/completions", json=body, headers={REPLICA: mark}) as answer:
            lines = filter(None, answer.iter_lines())
            seen = list(itertools.takewhile(lambda _: not stop.is_set(), lines))
            lasts.append(seen[-1])

    threads = [threading.Thread(target=whole, args=(worker,)) for worker in range(2)]
    threads += [threading.Thread(target=stream, args=(mark,)) for mark in marks(fleet)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(replicas(fleet)[0], signal.SIGKILL)
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert set(results) == {200}
    assert len(results) > 4
    codes = [json.loads(last.removeprefix("data: ")).get("error", {}).get("code") for last in lasts]
    assert sorted(codes, key=str) == [None, "replica_gone"]


def replicas(fleet: Running) -> list[int]:
    """Processes of replicas."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 1) for line in listed.splitlines()[1:])
    return [int(pid) for pid, words in rows if "ServeReplica:default:Replica" in words and descends(pid, fleet)]


def descends(pid: str, fleet: Running) -> bool:
    """Whether the process was started by this test's command, by way of others."""
    number = int(pid)
    while number > 1 and number != fleet.process.pid:
        number = int(Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()[1])
    return number == fleet.process.pid


def test_on_a_signal_running_requests_are_finished(fleet: Running) -> None:
    """The last one: the replicas end."""
    answers = list[httpx.Response]()

    def send() -> None:
        body = {"prompt": "Count: ", "max_tokens": 400, "ignore_eos": True}
        answers.append(fleet.client.post("/v1/completions", json=body))

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.5)
    fleet.process.send_signal(signal.SIGTERM)
    thread.join(90)
    assert fleet.process.wait(90) == 0
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["usage"]["completion_tokens"] == 400
