"""The command line, without a server."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_cache import __version__
from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.options import api_keys, read_api_keys
from hybrid_cache.api.server.exposure import Exposure
from hybrid_cache.api.server.kv_events.config import KVEventsConfig
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.api.server.logs import LogOptions
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.api.server.protocol import Patience
from hybrid_cache.api.server.recording.options import RecordOptions
from hybrid_cache.cache.policies.registry import policy_names
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.models.folders import resolve
from hybrid_cache.scheduling.registry import ORDERS

HEAVY = ("torch", "transformers", "fastapi", "httpx", "numpy")
PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()")


@pytest.fixture(autouse=True)
def _no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRID_CACHE_API_KEY", raising=False)


def exit_code(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    return int(caught.value.code or 0)


def error_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a failing command leaves."""
    assert exit_code(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, hybrid_cache.api.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_talking_to_a_server_needs_no_torch() -> None:
    code = "import sys, hybrid_cache.api.cli.terminal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["serve", "chat", "model", "cache", "bench"]),
        (["cache"], ["ls", "show", "drop"]),
        (["cache", "ls"], ["--url", "--api-key", "--salt", "--limit", "--json"]),
        (["cache", "drop"], ["--all", "--api-key-file", "--json"]),
        (
            ["serve"],
            ["--host", "--port", "--api-key-file", "--budget", "--policy", "--backend", "--fast", "--drain-timeout"],
        ),
        (["serve"], ["--api-key", "--allow-host", "--allow-origin", "--tls-cert", "--tls-key", "--max-connections"]),
        (["serve"], ["--forwarded-allow-ips", "--header-timeout", "--body-timeout", "--reader-timeout"]),
        (["serve"], [*policy_names(), "--order", *ORDERS]),
        (["chat"], ["--url", "--system", "--temperature", "--max-tokens", "--seed", "--backend", "--fast"]),
        (["model", "info"], ["--budget", "--json"]),
        (["model", "list"], ["--budget", "--json"]),
        (["model", "convert"], ["--dtype", "--quantize", "--shard-size"]),
        (["bench"], ["serve", "exactness", "bookkeeping"]),
        (["bench", "serve"], ["--url", "--scenarios"]),
        (["bench", "exactness"], ["--rows", "--seed"]),
        (["bench", "bookkeeping"], ["--nodes", "--seed"]),
    ],
)
def test_help_names_the_options(args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(cli.app, [*args, "--help"])
    assert done.exit_code == 0
    assert [word for word in words if word not in done.output] == []


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.output == f"hybrid-cache {__version__}\n"


def test_the_defaults_of_serve_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ServeOptions] = []
    monkeypatch.setattr("hybrid_cache.api.server.process.serve", told.append)
    assert exit_code("serve", "--port", "0") == 0
    assert told[0].engine == EngineConfig(max_step_ms=100)  # a program that steps by itself knows its own times
    assert told[0].budget_bytes is None


def test_every_option_of_serve_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[ServeOptions] = []
    monkeypatch.setattr("hybrid_cache.api.server.process.serve", told.append)
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n\nother \n")
    operators = tmp_path / "operators"
    operators.write_text("root\n")
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        Path(name).touch()
    line = (
        f"serve recall --host 0.0.0.0 --port 0 --api-key-file {keys} --served-model-name a --served-model-name b "
        "--budget 64MiB --policy lru --order fcfs --backend torch --dtype float32 --threads 1 --max-running 3 "
        "--max-waiting 4 "
        "--max-tiles 5 --max-tiles-beside-decode 2 --max-body 1MiB --no-prefix-cache --vllm-metrics --no-pages "
        "--drain-timeout 1.5 --hung-after 7 --fast --max-step-ms 0 --shared-cache --api-key first --api-key other "
        "--allow-host a.example --allow-host b.example --allow-origin * --allow-origin https://c.example "
        "--forwarded-allow-ips 10.0.0.0/8,::1 --max-connections 7 "
        "--header-timeout 1 --body-timeout 2 --reader-timeout 3 --special-tokens-in-content --message-book 2MiB "
        f"--keep-billing-header --tool-parser jamba --operator-key-file {operators} "
        "--response-store-mb 7 --response-ttl 30m --profile a.json --profile b.json --sharing profiled --max-loss 0.25 "
        "--log-level debug --log-format json --log-content --otlp-endpoint http://c:4318 "
        '--kv-events-config {"enable_kv_cache_events":true,"topic":"t"} --record-memory 1MiB --record-limit 5GiB'
    )
    assert exit_code(*line.split()) == 0
    options = told[0]
    assert options.engine == EngineConfig(
        max_running=3,
        max_waiting=4,
        policy="lru",
        order="fcfs",
        prefix_cache=False,
        max_tiles=5,
        max_tiles_beside_decode=2,
    )
    assert options.load == LoadOptions("recall", "torch", fast=True, dtype="float32", threads=1, path=resolve("recall"))
    assert options.exposure == Exposure(
        allow_hosts=("a.example", "b.example"),
        allow_origins=("*", "https://c.example"),
        trusted_proxies="10.0.0.0/8,::1",
        max_connections=7,
        patience=Patience(header_timeout_s=1, body_timeout_s=2, reader_timeout_s=3),
    )
    rest = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("engine", "load", "exposure")}
    assert rest == {
        "budget_bytes": 64 << 20,
        "record": RecordOptions(limit_bytes=5 << 30, memory_bytes=1 << 20),
        "message_book_bytes": 2 << 20,
        "response_store": None,
        "response_store_bytes": 7 << 20,
        "response_life_s": 1800.0,
        "host": "0.0.0.0",
        "port": 0,
        "shared_cache": True,
        "special_tokens_in_content": True,
        "keep_billing_header": True,
        "tool_parser": "jamba",
        "chat_template": None,
        "served_names": ("a", "b"),
        "api_keys": ("first", "other", "secret"),
        "max_body_bytes": 1 << 20,
        "vllm_metrics": True,
        "pages": False,
        "kv_events": KVEventsConfig(enable_kv_cache_events=True, topic="t"),
        "drain_timeout_s": 1.5,
        "hung_after_s": 7.0,
        "operator_keys": ("root",),
        "profiles": (Path("a.json"), Path("b.json")),
        "profiled": True,
        "max_loss": 0.25,
        "log": LogOptions("debug", "json", content=True),
        "otlp_endpoint": "http://c:4318",
    }


def test_an_operators_key_needs_another_one_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operators = tmp_path / "operators"
    operators.write_text("root\n")
    assert exit_code("serve", "--port", "0", "--operator-key-file", str(operators)) == 2
    assert "operator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["serve", "--budget", "lots"], "'lots'"),
        (["serve", "--budget", "1KiB"], "1024"),
        (["serve", "--policy", "magic"], "'magic'"),
        (["serve", "--order", "magic"], f"unknown order 'magic', must be one of {', '.join(ORDERS)}"),
        (["serve", "--backend", "abacus"], "'abacus'"),
        (["serve", "--dtype", "int3"], "'int3'"),
        (["serve", "--max-running", "0"], "max_running"),
        (["serve", "--served-model-name", ""], "served_names"),
        (["serve", "--host", "256.0.0.1"], "256.0.0.1"),
        (["serve", "--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["serve", "/nowhere/model"], "/nowhere/model"),
        (["serve", "--api-key", ""], "API key"),
        (["serve", "--allow-host", "*"], "'*'"),
        (["serve", "--allow-host", "name:80"], "'name:80'"),
        (["serve", "--allow-origin", "chat.example"], "'chat.example'"),
        (["serve", "--allow-origin", "https://chat.example/"], "'https://chat.example/'"),
        (["serve", "--allow-origin", "*"], "API key"),
        (["serve", "--forwarded-allow-ips", "proxy"], "'proxy'"),
        (["serve", "--tls-cert", "a.pem"], "tls_key is None"),
        (["serve", "--tls-key", "a.pem"], "tls_cert is None"),
        (["serve", "--tls-cert", "/nowhere/cert", "--tls-key", "/nowhere/key"], "/nowhere/cert"),
        (["serve", "--header-timeout", "0"], "header_timeout_s is 0"),
        (["serve", "--reader-timeout", "-1"], "reader_timeout_s is -1"),
        (["serve", "--body-timeout", "0"], "body_timeout_s is 0"),
        (["model", "info", "/nowhere/model"], "/nowhere/model"),
        (["chat", "--url", "ftp://host"], "ftp://host"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["chat", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_exit_code_2(
    args: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = ["--port", "0"] if args[0] == "serve" else []
    assert word in error_line(capsys, *args, *port)


def test_an_empty_file_of_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="no API key"):
        read_api_keys(path)


def test_keys_come_from_everywhere_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert api_keys() == ()
    path = tmp_path / "keys"
    path.write_text("two\nthree\n")
    for text in ("three four,five\n , six", " three\tfour , five,,six "):
        monkeypatch.setenv("HYBRID_CACHE_API_KEY", text)
        assert api_keys([" one", "two"], path) == ("one", "two", "three", "four", "five", "six")
    monkeypatch.setenv("HYBRID_CACHE_API_KEY", " , ")
    assert api_keys(path=path) == ("two", "three")


def test_chat_sends_a_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[str | None] = []
    partner = "hybrid_cache.api.cli.terminal.ServerPartner"
    monkeypatch.setattr(partner, lambda url, model, key, asked: sent.append(key))
    monkeypatch.setattr("hybrid_cache.api.cli.terminal.run", lambda partner, system: 0)
    path = tmp_path / "keys"
    path.write_text("of-file\n")
    assert exit_code("chat", "--url", "http://x") == 0
    monkeypatch.setenv("HYBRID_CACHE_API_KEY", "of-environment,other")
    assert exit_code("chat", "--url", "http://x") == 0
    assert exit_code("chat", "--url", "http://x", "--api-key-file", str(path)) == 0
    assert sent == [None, "of-environment", "of-file"]


def test_an_unknown_option_is_a_usage_error() -> None:
    done = CliRunner().invoke(cli.app, ["serve", "--no-such-option"])
    assert done.exit_code == 2
    assert "--no-such-option" in done.output


def test_a_bench_command_checks_its_own_options() -> None:
    done = CliRunner().invoke(cli.app, ["bench", "exactness", "--rows", "many"])
    assert done.exit_code == 2
    assert "--rows" in done.output


def test_model_info_exits_with_1_for_a_model_that_is_not_supported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert exit_code("model", "info", str(tmp_path), "--json") == 1
    assert json.loads(capsys.readouterr().out)["supported"] is False


def test_the_budget_of_model_info_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for budget in ("256MiB", "512MiB"):
        assert exit_code("model", "info", "--budget", budget, "--json") == 0
        counts.append(json.loads(capsys.readouterr().out)["facts"]["conversations_in_budget"])
    assert 0 <= counts[1] - 2 * counts[0] <= 1


def test_a_broken_model_folder_leaves_one_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{ this is not JSON")
    done = subprocess.run(
        [*PROGRAM, "serve", str(tmp_path), "--port", "0"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "config.json cannot be read" in done.stderr
