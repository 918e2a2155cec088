"""One line for each request, true to what happened, without its content, and not to be forged."""

import asyncio
import fcntl
import io
import json
import logging
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
from typing import Any

import httpx
import pytest

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.outlet import MOST_WAITING, Outlet
from hybrid_cache.api.server import remarks
from hybrid_cache.api.server.logs import LogOptions, logging_to
from hybrid_cache.api.server.tenants import tenant_of
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.servers import GatedModel, new_app, new_engine, over_the_wire, script_messages, script_prompt

Line = dict[str, Any]
FIELDS = {
    *("time", "level", "logger", "message"),
    *("request_id", "method", "path", "status", "client", "key", "model", "stream"),
    *("prompt_tokens", "cached_tokens", "generated_tokens", "queued_s", "first_token_s", "total_s"),
    *("finish_reasons", "trace_id", "error_code", "error"),
}
PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()")
CANARY = "canary7f3a"  # what no line may hold


class Log:
    """What a server under test has logged."""

    def __init__(self, written: io.StringIO) -> None:
        self._written = written

    @property
    def text(self) -> str:
        return self._written.getvalue()

    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.text.splitlines()]

    def requests(self) -> list[Line]:
        return [line for line in self.lines() if line["logger"] == "hybrid_cache.request"]

    def one(self, request_id: str) -> Line:
        """The line of a request. It is written when the answer is out already, so that it may come a little later."""
        return self.until(lambda: [line for line in self.requests() if line.get("request_id") == request_id])[0]

    def until(self, found: Callable[[], list[Line]]) -> list[Line]:
        for _ in range(500):
            if lines := found():
                return lines
            time.sleep(0.01)
        raise AssertionError(self.text)


@contextmanager
def logged(level: str = "info", form: str = "json", *, content: bool = False) -> Iterator[Log]:
    written = io.StringIO()
    with logging_to(written, LogOptions(level, form, content)):
        yield Log(written)


@contextmanager
def serving(text: TextModel, engine: AsyncEngine | None = None, **settings: object) -> Iterator[httpx.Client]:
    app = new_app(engine or new_engine(), text, **settings)
    with over_the_wire(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def ask(client: httpx.Client, path: str, body: object, **headers: str) -> tuple[httpx.Response, str]:
    response = client.post(path, json=body, headers=headers)
    return response, response.headers["x-request-id"]


def test_a_chat_request_is_one_line_with_all_fields(sum_text: TextModel) -> None:
    messages = script_messages(sum_text)
    with logged() as log, serving(sum_text) as client:
        response, name = ask(client, "/v1/chat/completions", {"messages": messages})
        line = log.one(name)
    usage = response.json()["usage"]
    assert set(line) == FIELDS
    assert (line["level"], line["method"], line["path"], line["status"]) == (
        "info",
        "POST",
        "/v1/chat/completions",
        200,
    )
    assert (line["model"], line["stream"], line["key"], line["error"]) == ("sum", False, None, None)
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["generated_tokens"] == usage["completion_tokens"]
    assert line["finish_reasons"] == ["stop"]
    assert 0 < line["first_token_s"] <= line["total_s"]
    assert 0 <= line["queued_s"] <= line["first_token_s"]
    assert line["client"].startswith("127.0.0.1:")


DIALECTS = {
    "/v1/completions": {"prompt": script_prompt(), "max_tokens": 20},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "model": "sum-alias"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_every_dialect_says_what_it_used(sum_text: TextModel, path: str, stream: bool) -> None:
    body = {"model": "sum-alias", **DIALECTS[path], "stream": stream}
    with logged() as log, serving(sum_text) as client:
        response, name = ask(client, path, body)
        line = log.one(name)
    assert response.status_code == line["status"] == 200
    assert (line["model"], line["stream"]) == ("sum-alias", stream)
    assert line["prompt_tokens"] > 0
    assert line["generated_tokens"] > 0
    assert len(line["finish_reasons"]) == 1


def test_cached_tokens_and_several_choices_are_counted(sum_text: TextModel) -> None:
    body = {"prompt": [7] * 200, "max_tokens": 2, "n": 2}
    with logged() as log, serving(sum_text) as client:
        ask(client, "/v1/completions", body)
        response, name = ask(client, "/v1/completions", body)
        line = log.one(name)
    assert line["cached_tokens"] == response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert line["generated_tokens"] == 4
    assert line["finish_reasons"] == ["length", "length"]


def test_counted_messages_say_their_tokens(sum_text: TextModel) -> None:
    with logged() as log, serving(sum_text) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "model": "sum"}
        response, name = ask(client, "/v1/messages/count_tokens", body)
        line = log.one(name)
    assert line["prompt_tokens"] == response.json()["input_tokens"]
    assert line["generated_tokens"] is None


CALL = {"id": CANARY, "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: dict[str, tuple[str, object, int, str]] = {
    "no such model": ("/v1/completions", {"model": "gpt", "prompt": "a"}, 404, "not served here"),
    "too long": ("/v1/completions", {"prompt": [1] * 5000}, 400, "5000"),
    "a wrong value": ("/v1/chat/completions", {"messages": [], "temperature": "x"}, 400, "temperature is '...'"),
    "calls without results": (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "a"}]},
        400,
        "An assistant message with '...'",
    ),
    "a wrong value in the query": ("/v1/responses?limit=x", {"input": 3}, 400, "input is 3"),
    "no such route": ("/v1/nothing", {}, 404, "/v1/nothing"),
    "a wrong type": ("/v1/messages", {"model": "sum", "messages": 3, "max_tokens": 1}, 400, "messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_says_why(sum_text: TextModel, case: str) -> None:
    path, body, status, why = REFUSED[case]
    with logged() as log, serving(sum_text) as client:
        response, name = ask(client, path, body)
        line = log.one(name)
    assert response.status_code == line["status"] == status
    assert why in line["error"]
    assert line["level"] == "info"
    assert CANARY not in log.text


def test_a_key_is_shown_by_its_digest_and_a_wrong_one_not_at_all(sum_text: TextModel) -> None:
    with logged() as log, serving(sum_text, api_keys=("sk-secret",)) as client:
        body = {"prompt": "a", "max_tokens": 1}
        _, good = ask(client, "/v1/completions", body, authorization="Bearer sk-secret")
        _, bad = ask(client, "/v1/completions", body, authorization="Bearer sk-guessed")
        assert log.one(good)["key"] == tenant_of("sk-secret")[:8]
        refused = log.one(bad)
    assert (refused["status"], refused["key"], refused["error_code"]) == (401, None, "invalid_api_key")
    assert "sk-" not in log.text


def test_what_is_no_http_is_a_line_with_all_fields(sum_text: TextModel) -> None:
    with logged() as log, serving(sum_text) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(CANARY.encode() + b"\r\n\r\n")
            assert b" 400 " in connection.recv(4096)
        (line,) = log.until(log.requests)
    assert set(line) == FIELDS
    assert (line["status"], line["message"], line["error_code"]) == (400, "- - 400", "invalid_http")
    assert line["client"].startswith("127.0.0.1:")
    assert CANARY not in log.text


def test_probes_are_for_debugging(sum_text: TextModel) -> None:
    paths = ("/health", "/ready", "/ping", "/version", "/metrics")
    with logged("info") as log, serving(sum_text) as client:
        assert [client.get(path).status_code for path in paths] == [200] * 5
        assert client.get("/v1/models").status_code == 200
        log.until(log.requests)
    assert [line["path"] for line in log.requests()] == ["/v1/models"]
    with logged("debug") as log, serving(sum_text) as client:
        assert [client.get(path).status_code for path in paths] == [200] * 5
        log.until(lambda: log.requests()[4:])
    assert [line["path"] for line in log.requests()] == [*paths]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_499(sum_text: TextModel, stream: bool) -> None:
    model = GatedModel()
    body = json.dumps({"prompt": [5] * 100, "max_tokens": 50, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: gone\r\ncontent-type: application/json\r\n"
    with logged() as log, serving(sum_text, new_engine(model)) as client:
        address = client.base_url.host, client.base_url.port
        with socket.create_connection(address) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert model.reached.wait(10)
        line = log.one("gone")
        model.gate.set()
    assert (line["status"], line["finish_reasons"], line["stream"]) == (499, ["abort"], stream)
    assert line["level"] == "info"
    assert line["first_token_s"] is None


class Failing(GatedModel):
    """A model whose passes fail."""

    def forward(self, *args: Any) -> Any:
        raise RuntimeError("the pass failed")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_is_told_with_the_request_that_it_ended(sum_text: TextModel, stream: bool) -> None:
    with logged() as log, serving(sum_text, new_engine(Failing())) as client:
        body = {"prompt": "a", "max_tokens": 5, "stream": stream}
        response, _ = ask(client, "/v1/completions", body, **{"x-request-id": "mine"})
        line = log.one("mine")
    assert response.status_code == (200 if stream else 500)
    assert (line["status"], line["level"]) == (response.status_code, "error")
    assert "gave this request up" in line["error"]
    assert any("mine" in each["message"] for each in log.lines() if each["logger"] == "hybrid_cache")


HOSTILE = "a\r\n2026 INFO hybrid_cache.request: POST /forged 200\x1b[2J\u202e\u2028\x00"


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_client_forges_a_line(sum_text: TextModel, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remarks, "_recent", remarks.RecentNames())
    with logged("debug", form) as log, serving(sum_text) as client:
        _, name = ask(client, "/v1/completions", {"prompt": "a", "model": HOSTILE})
        client.get("/%0d%0aINFO%20x%20status=200%1b[2J%e2%80%a8", headers={"x-request-id": name + "/"})
        client.post("/v1/completions", content=b"{}", headers={"x-request-id": "a b status=200\x7f"})
        client.post("/v1/completions", json={"prompt": "a", HOSTILE: 1, "logit_bias": {HOSTILE: 1}})
        time.sleep(0.2)
    lines = log.text.removesuffix("\n").split("\n")
    assert len(lines) == 5  # one for the field, too
    assert all(line.isprintable() for line in lines)
    start = "{" if form == "json" else "20"
    assert all(line.startswith(start) and re.search(r"hybrid_cache\.re(quest|marks)", line) for line in lines)
    if form == "text":
        assert not any("status=200" in line.split('"')[0] for line in lines)


FREE = ("metadata", "logit_bias", "chat_template_kwargs", "properties", "schema", "input")  # whose keys are content


def spread(body: object, canary: str, *, free: bool = False) -> Iterator[object]:
    """Copies of a body in each of which one text is another or holds more. free: the same for its keys"""
    if isinstance(body, str):
        yield from (canary, f"{body} {canary}'\" {canary}", {"text": [canary]})
        return
    if isinstance(body, dict):
        yield {**body, canary if free else "unknown": canary}
        for key, value in body.items():
            if free:
                yield {canary if each == key else each: body[each] for each in body}
            for changed in spread(value, canary, free=key in FREE):
                yield {**body, key: changed}
    elif isinstance(body, list):
        yield [*body, canary]
        for i, value in enumerate(body):
            for changed in spread(value, canary):
                yield [*body[:i], changed, *body[i + 1 :]]
    else:
        yield [canary]


TALK = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "b"},
]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
RICH: dict[str, list[dict[str, object]]] = {
    "/v1/chat/completions": [
        {
            "messages": TALK,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "max_tokens": 1,
            "metadata": {"a": "b"},
            "logit_bias": {"1": 1},
            "stop": ["x"],
        },
        {"messages": TALK[:1], "max_tokens": 1, "structured_outputs": {"regex": "a+"}},
        {"messages": TALK[:1], "max_tokens": 1, "structured_outputs": {"grammar": 'start: "a"'}},
        {"messages": TALK[:1], "max_tokens": 1, "chat_template_kwargs": {"a": "b"}, "cache_salt": "s"},
        {
            "messages": TALK[:1],
            "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        },
    ],
    "/v1/messages": [
        {
            "model": "sum",
            "max_tokens": 1,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "c"}]},
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]}],
        }
    ],
    "/v1/responses": [
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "o"},
            ],
            "instructions": "i",
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 16,
            "previous_response_id": None,
        }
    ],
    "/v1/completions": [{"prompt": "a", "max_tokens": 1, "stop": "x", "suffix": None, "model": "sum"}],
    "/tokenize": [{"prompt": "a"}, {"messages": TALK}],
}


@pytest.mark.parametrize("path", RICH)
def test_nothing_of_the_content_is_logged(sum_text: TextModel, path: str) -> None:
    """But for the name of a model that is asked for."""
    statuses = set()
    with logged("debug", "json") as log, serving(sum_text) as client:
        for body in RICH[path]:
            for changed in spread(body, CANARY):
                if isinstance(changed, dict) and changed.get("model", "sum") != body.get("model", "sum"):
                    continue
                statuses.add(client.post(path, json=changed).status_code)
                assert CANARY not in log.text, changed
            log.until(log.requests)
    assert statuses >= {200, 400}
    assert statuses <= {200, 400, 404}


def test_content_is_logged_where_that_is_asked_for(sum_text: TextModel) -> None:
    with logged("debug", "json", content=True) as log, serving(sum_text, log_content=True) as client:
        body = {"prompt": f"{CANARY} {'x' * 4030} {CANARY}end", "max_tokens": 1}
        _, name = ask(client, "/v1/completions", body)
        ask(client, "/v1/completions", {"prompt": "a", "temperature": f"{CANARY}hot"})
        log.until(lambda: [line for line in log.lines() if "hot" in str(line.get("error"))])
    shown = [line for line in log.lines() if line.get("request_id") == name and line["level"] == "debug"]
    body_line, answer_line = shown
    assert CANARY in body_line["body"]
    assert f"{CANARY}end" in body_line["body"]
    assert len(body_line["body"]) < 4096 + 20
    assert "text_completion" in answer_line["answer"]


def test_a_bug_leaves_a_traceback_without_values(sum_text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **more: object) -> None:
        raise ValueError(f"cannot read '{CANARY}'")

    monkeypatch.setattr("hybrid_cache.api.server.routes.completions._spec", broken)
    with logged() as log, serving(sum_text) as client:
        response, name = ask(client, "/v1/completions", {"prompt": CANARY})
        line = log.one(name)
    assert (response.status_code, line["status"], line["level"]) == (500, 500, "error")
    assert line["error"] == "ValueError: cannot read '...'"
    trace = next(each["traceback"] for each in log.lines() if "traceback" in each)
    assert trace[-1] == "ValueError: cannot read '...'"
    assert any("completions.py" in place for place in trace)
    assert CANARY not in log.text


def test_more_than_an_outlet_holds_is_dropped_and_counted() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(writer, "w") as target, os.fdopen(reader, "rb"):
        outlet = Outlet(target)
        outlet.write("x" * 5000)  # on which its thread waits
        for _ in range(MOST_WAITING + 110):
            outlet.write("y")
        assert 110 <= outlet.num_dropped <= 111  # one more if the thread has taken none of them
        assert os.read(reader, 4096)  # so that it ends


def test_an_error_that_ends_a_thread_is_a_line(sum_text: TextModel) -> None:
    def fail() -> None:
        raise ValueError(f"'{CANARY}' at the end")

    with logged() as log:
        thread = threading.Thread(target=fail, name="mine")
        thread.start()
        thread.join()
    (line,) = log.lines()
    assert (line["level"], line["message"]) == ("critical", "the thread mine has ended with an error")
    assert line["traceback"][-1] == "ValueError: '...' at the end"


@pytest.mark.parametrize("bad", [("--log-level", "loud"), ("--log-format", "xml"), ("--log-content",)])
def test_a_setting_that_cannot_be_is_one_line(bad: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--port", "0", *bad])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {bad[0][2:].replace('-', '_')} ")
    assert said.count("\n") == 1


def test_all_that_a_process_says_is_json_where_that_is_asked_for() -> None:
    command = [*PROGRAM, "serve", "--port", "0", "--budget", "64MiB", "--log-format", "json", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = [next(process.stderr)]
            url = json.loads(lines[0])["url"].replace("0.0.0.0", "127.0.0.1")
            for _ in range(500):
                with suppress(httpx.ConnectError):
                    assert httpx.get(f"{url}/models").status_code == 200
                    break
                time.sleep(0.02)
            answer = httpx.post(f"{url}/completions", json={"prompt": "a", "max_tokens": 2}, timeout=30)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            lines += process.stderr
            assert process.wait(30) == 0
        finally:
            process.kill()
    said = [json.loads(line) for line in lines]
    assert [each["message"] for each in said if each["logger"] == "hybrid_cache.request"] == [
        "GET /v1/models 200",
        "POST /v1/completions 200",
    ]
    assert any(each["level"] == "warning" and "API key" in each["message"] for each in said)
    assert any("finishing" in each["message"] for each in said)


def test_a_traceback_in_text_cannot_be_taken_for_lines_of_the_log() -> None:
    with logged(form="text") as log:
        try:
            raise ValueError("2026 INFO\n2026 INFO hybrid_cache.request: forged") from KeyError(CANARY)
        except ValueError:
            logging.getLogger("hybrid_cache.api").exception("it failed")
    first, heading, *rest = log.text.splitlines()
    assert first.endswith("hybrid_cache.api: it failed")
    assert heading == "    Traceback (most recent call last)"
    assert all(line.startswith("    ") for line in rest)
    assert CANARY not in log.text


def test_a_log_that_cannot_be_written_harms_no_request_and_is_counted(sum_text: TextModel) -> None:
    broken = io.StringIO()
    broken.close()
    with logging_to(broken, LogOptions()) as handler, serving(sum_text) as client:
        response, _ = ask(client, "/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert response.status_code == 200
        for _ in range(100):
            asyncio.run(asyncio.sleep(0.01))
            metrics = client.get("/metrics").text
            if "hybrid_cache_log_records_lost_total 1.0" in metrics:
                break
        else:
            raise AssertionError(metrics)
        assert handler.num_lost == 1
