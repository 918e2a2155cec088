"""A real server process: `hybrid-cache serve` as people start it, with the embedded model."""

import asyncio
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.server.process import SEND_TWICE, curl_line
from hybrid_cache.models.loading import embedded_path
from tests.models.fake_hub import OLDER_COMMIT, Hub, running

PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()")
KEY = "a-secret-key"
START_TIMEOUT_S = 60
LONG_SYSTEM = "You are a careful friend who remembers what people say. " * 12


class Server:
    """A running process, and what it has written to its error stream so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = self._read_url()
        self._reader = threading.Thread(target=self._read_rest, daemon=True)
        self._reader.start()

    def _read_url(self) -> str:
        """Reads up to the line that shows how to use curl, which is the last of the greeting."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.match(r"curl (http://\S+)/v1/", line):
                return found[1]
        raise AssertionError("the server did not start: " + "".join(self.lines))

    def _read_rest(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def wait(self, timeout: float = 30) -> int:
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code


@contextmanager
def server(*options: str, program: tuple[str, ...] = PROGRAM) -> Iterator[Server]:
    command = [*program, "serve", "--port", "0", "--budget", "64MiB", "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            started = Server(process)
            watchdog.cancel()
            wait_until_ready(started.url)
            yield started
        finally:
            watchdog.cancel()
            process.kill()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server is not ready")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# of the tests\n{KEY}\n")
    return path


@pytest.fixture(scope="module")
def guarded(key_file: Path) -> Iterator[Server]:
    """A server with an API key, two names and vLLM's metrics."""
    names = ("--served-model-name", "small", "--served-model-name", "other")
    with server("--api-key-file", str(key_file), "--vllm-metrics", *names) as started:
        yield started


@pytest.fixture
def client(guarded: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def say(client: openai.OpenAI, messages: list[ChatCompletionMessageParam]) -> ChatCompletion:
    return client.chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=16)


def cached_tokens(answer: ChatCompletion) -> int:
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def metrics_of(started: Server) -> dict[str, float]:
    """Samples without labels of their own, by name."""
    response = httpx.get(f"{started.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_the_greeting_says_what_runs(guarded: Server) -> None:
    greeting = "".join(guarded.lines)
    assert guarded.url in greeting
    for fact in (
        "small",
        "parameters",
        "bfloat16",
        "exact",
        "64 MiB",
        "tokens of KV",
        "checkpoints",
        "conversations",
        "beside it",
    ):
        assert fact in greeting
    assert KEY not in greeting


def limited(limit_bytes: int) -> tuple[str, ...]:
    """The program, with a limit on the memory that it asks for."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit_bytes}, {limit_bytes})); "
    return PROGRAM[0], "-c", limit + PROGRAM[2]


def refusal(*options: str, limit_bytes: int | None = None) -> str:
    """What a server says that does not start."""
    program = PROGRAM if limit_bytes is None else limited(limit_bytes)
    command = [*program, "serve", "--port", "0", "--threads", "1", *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_budget_that_cannot_fit_ends_in_one_line_with_the_numbers() -> None:
    said = refusal("--budget", "500TiB")
    found = re.search(r"500 TiB does not fit: (\S+ \SiB) are free by (.+), of which up to (\S+ .iB) are needed", said)
    assert found, said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_by_default_a_process_without_room_for_a_conversation_does_not_start() -> None:
    said = refusal(limit_bytes=800 << 20)
    for word in ("RLIMIT_DATA", "beside the cache", "75% of the rest", "2,000 tokens"):
        assert word in said, said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_by_default_the_cache_takes_what_a_limit_leaves() -> None:
    with server("--budget", "auto", program=limited(2 << 30)) as started:
        values = metrics_of(started)
        budget, beside = values["hybrid_cache_cache_budget_bytes"], values["hybrid_cache_memory_beside_bytes"]
        assert 200 << 20 < budget < (2 << 30) - beside
        answer = httpx.post(f"{started.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
        assert answer.status_code == 200


def test_the_greeting_names_what_is_not_as_it_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hybrid_cache.kernels.native_library.reason_missing", lambda: "no C compiler found")
    monkeypatch.setattr("hybrid_cache.api.server.process.inexact_reasons", lambda loaded: ["linear 3 -> 4"])
    monkeypatch.setattr("hybrid_cache.api.server.process.run_server", lambda server, bound: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HYBRID_CACHE_BACKEND", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--port", "0", "--no-prefix-cache"])
    assert not caught.value.code
    greeting = capsys.readouterr().err
    for fact in ("NO: linear 3 -> 4", "torch, ", "no C compiler found", "prefix cache OFF"):
        assert fact in greeting
    assert SEND_TWICE not in greeting


def test_the_command_of_the_greeting_is_cached_when_it_is_sent_twice(guarded: Server) -> None:
    place = next(n for n, line in enumerate(guarded.lines) if line.startswith("curl "))
    assert guarded.lines[place - 1].strip() == SEND_TWICE
    words = shlex.split(guarded.lines[place].replace("Bearer KEY", f"Bearer {KEY}"))
    for _ in range(2):
        run = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True, timeout=60)
        usage = json.loads(run.stdout)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_a_model_without_a_chat_template_is_greeted_with_what_it_answers() -> None:
    command = curl_line("http://x:1", with_key=False, chats=False)
    assert command.startswith("curl http://x:1/v1/completions ")
    assert [*json.loads(shlex.split(command)[-1])] == ["prompt"]


def test_the_openai_client_talks_in_turns_and_pays_once(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": LONG_SYSTEM},
        {"role": "user", "content": "Hello, my name is Ada."},
    ]
    first = say(client, messages)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "What is my name?"})
    second = say(client, messages)
    assert first.choices[0].message.content
    assert first.usage is not None
    assert cached_tokens(second) >= first.usage.prompt_tokens - 64 > 64
    again = say(client, messages)
    assert again.choices[0].message.content == second.choices[0].message.content
    assert second.usage is not None
    assert cached_tokens(again) == second.usage.prompt_tokens


def test_streamed_text_is_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The code is 417. What is the code?"}]
    whole = say(client, messages).choices[0].message.content
    chunks = client.chat.completions.create(model="other", messages=messages, temperature=0, max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def test_a_wrong_key_is_refused(guarded: Server) -> None:
    made = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with made, pytest.raises(openai.AuthenticationError):
        made.models.list()


def test_the_models_are_those_that_were_named(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small", "other"]


def test_metrics_parse_and_move(guarded: Server, client: openai.OpenAI) -> None:
    before = metrics_of(guarded)
    for _ in range(2):
        say(client, [{"role": "user", "content": "Count to three, please, slowly."}])
    after = metrics_of(guarded)

    def moved(name: str) -> float:
        return after[name] - before[name]

    assert moved("hybrid_cache_prompt_tokens_total") > moved("hybrid_cache_cached_tokens_total") > 0
    assert moved("hybrid_cache_generated_tokens_total") > 0
    assert moved("hybrid_cache_time_to_first_token_seconds_count") == 2
    assert moved("vllm:prefix_cache_queries_total") == moved("hybrid_cache_prompt_tokens_total")
    assert moved("vllm:time_to_first_token_seconds_count") == 2
    assert moved("vllm:e2e_request_latency_seconds_count") == 2


def test_chat_talks_to_a_running_server(
    guarded: Server, key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there, who are you?\n/retry\n"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "--url", f"{guarded.url}/v1", "--api-key-file", str(key_file), "--temperature", "0"])
    captured = capsys.readouterr()
    assert not caught.value.code, captured.err
    first, again = captured.out.splitlines()
    assert first == again
    notes = captured.err.splitlines()
    assert notes[0].startswith("0 cached + ")
    assert " + 0 computed prompt tokens" in notes[1]


def test_what_is_cached_can_be_listed_and_dropped(
    guarded: Server, key_file: Path, client: openai.OpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    say(client, [{"role": "system", "content": LONG_SYSTEM}, {"role": "user", "content": "Will you remember this?"}])
    where = ["--url", guarded.url, "--api-key-file", str(key_file)]

    def run(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            cli.main(["cache", *args, *where, "--json"])
        assert not end.value.code
        return dict(json.loads(capsys.readouterr().out))

    newest = run("ls")["data"][0]
    shown = run("show", newest["name"])
    assert "Will you remember this?" in shown["text"]
    assert shown["states"][-1]["name"] == newest["name"]
    assert run("drop", "--all")["freed_bytes"] >= newest["bytes"] > 0
    assert run("ls") == {"data": [], "total": 0}


def test_chat_without_the_key_ends_in_one_line(guarded: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "--url", guarded.url])
    assert caught.value.code == 2
    assert "API key" in capsys.readouterr().err


def test_a_port_in_use_ends_in_one_line(guarded: Server, capsys: pytest.CaptureFixture[str]) -> None:
    port = guarded.url.rpartition(":")[2]
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--port", port])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert port in err
    assert err.count("\n") == 1


class LongAnswer:
    """A streamed answer of a given length, read on a thread of its own."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._url = url
        self._body = {
            "messages": [{"role": "user", "content": "Tell me a long story."}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        self.events: list[str] = []
        self.status = 0
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(30)
        assert self.status == 200

    def _read(self) -> None:
        asked = httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, timeout=60)
        with suppress(httpx.TransportError), asked as response:  # a server that aborts may close the connection
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data:"):
                    self.events.append(line)
                if len(self.events) > 3:
                    self._begun.set()
        self._begun.set()

    def wait(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def complete(self) -> bool:
        return self.events[-1:] == ["data: [DONE]"] and any('"finish_reason":"length"' in e for e in self.events)


def test_sigterm_lets_a_running_answer_finish_and_refuses_new_ones() -> None:
    with server() as started:
        answer = LongAnswer(started.url, max_tokens=1500)
        started.process.send_signal(signal.SIGTERM)
        wait_for_draining(started.url)
        refused = httpx.post(f"{started.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 1})
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        answer.wait()
        assert answer.complete
        assert started.wait() == 0


def wait_for_draining(url: str) -> None:
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/ready").status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sixty_four_descriptors_are_enough_beside_a_flood_of_idle_connections() -> None:
    few_files = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")
    with server(program=(*few_files, *PROGRAM)) as started, ExitStack() as stack:
        address = urlsplit(started.url)
        for _ in range(120):
            stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=5))
        for _ in range(3):
            assert httpx.get(f"{started.url}/health", timeout=2).status_code == 200
        reply = httpx.post(f"{started.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 1})
        assert reply.status_code == 200
        started.process.send_signal(signal.SIGTERM)
        assert started.wait() == 0
        assert "Traceback" not in "".join(started.lines)


def test_a_server_for_others_warns_without_a_key_and_one_for_this_machine_checks_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(
        "hybrid_cache.api.server.process.run_server", lambda server, bound: configs.append(server.config)
    )
    monkeypatch.delenv("HYBRID_CACHE_API_KEY", raising=False)
    for options, warned, status in (
        (("--host", "0.0.0.0"), True, 200),
        (("--api-key", KEY), False, 421),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", "--port", "0", "--threads", "1", *options])
        assert not caught.value.code
        greeting = capsys.readouterr().err
        assert ("WARNING: without an API key" in greeting) is warned
        assert KEY not in greeting
        assert asyncio.run(status_of(configs.pop().app, "evil.example")) == status


async def status_of(app: ASGIApp, host: str) -> int:
    """What `/version` answers to somebody who calls the server by this name."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
        return (await client.get("/version")).status_code


def test_a_second_signal_aborts() -> None:
    with server() as started:
        answer = LongAnswer(started.url, max_tokens=4000)
        started.process.send_signal(signal.SIGINT)
        wait_for_draining(started.url)
        started.process.send_signal(signal.SIGINT)
        assert started.wait() == 0
        answer.wait()
        assert not answer.complete
        assert "Traceback" not in "".join(started.lines)


def test_the_drain_timeout_bounds_the_wait() -> None:
    with server("--drain-timeout", "0.2") as started:
        answer = LongAnswer(started.url, max_tokens=4000)
        begin = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        assert started.wait() == 0
        assert time.monotonic() - begin < 5
        answer.wait()
        assert not answer.complete


def test_a_server_with_a_shorter_context_and_another_template(tmp_path: Path) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    message = {"role": "user", "content": "hello there"}
    with server("--max-model-len", "256", "--chat-template", str(template)) as started:
        assert any("context 256" in line for line in started.lines)
        (card,) = httpx.get(f"{started.url}/v1/models").json()["data"]
        assert card["max_model_len"] == 256
        tokens = httpx.post(f"{started.url}/tokenize", json={"messages": [message]}).json()["tokens"]
        assert httpx.post(f"{started.url}/detokenize", json={"tokens": tokens}).json()["prompt"] == "HELLO THERE"
        chat = f"{started.url}/v1/chat/completions"
        assert httpx.post(chat, json={"messages": [message], "max_tokens": 2}, timeout=60).status_code == 200
        refused = httpx.post(chat, json={"messages": [{"role": "user", "content": "one two " * 256}]}, timeout=60)
        assert refused.status_code == 400
        assert "this model's context leaves room for 256" in refused.json()["error"]["message"]


def test_a_server_of_a_model_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in embedded_path().iterdir() if path.is_file()}
    with running(Hub(files)) as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        with server("org/model", "--revision", "v1") as started:
            assert any(re.search(rf"revision +{OLDER_COMMIT}", line) for line in started.lines)
            (card,) = httpx.get(f"{started.url}/v1/models").json()["data"]
            assert card["id"] == "org/model"
            reply = httpx.post(f"{started.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 2}, timeout=60)
            assert reply.status_code == 200
