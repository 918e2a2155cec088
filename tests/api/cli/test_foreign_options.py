"""Options of other servers: each is one of ours, or says in a line what to do instead."""

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.foreign_options import BY_NAME, MODEL, TABLE, THINK_TAGS, TILE, TOOL_PARSERS
from hybrid_cache.api.cli.translation import arguments
from hybrid_cache.api.text.tool_formats import FORMATS
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import grid
from tests.api.cli.test_configured import file, run, shown


def options() -> dict[str, object]:
    serve = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return dict(serve.by_option())


def set_by(*args: str) -> set[str]:
    """What a command line sets, as --show-config says it."""
    return {line.split("  # ")[0] for line in shown(*args) if line.endswith("# command line")}


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("--model some/x", {"model: some/x"}),
        ("-m some/x -a name -c 4096 -np 4 -t 2", {
            "model: some/x", "served-model-name: [name]", "max-model-len: 4096", "max-running: 4", "threads: 2"}),
        ("-c 0 -np -1 -t -1", {"threads: 0"}),
        ("--max-num-seqs 7 --max_num_batched_tokens=200", {"max-running: 7", "max-tiles: 3"}),
        ("--max-num-batched-tokens 8K", {"max-tiles: 128"}),
        ("--max-model-len 8K", {"max-model-len: 8192"}),
        ("--max_model_len=8k", {"max-model-len: 8000"}),
        ("--enable-prefix-caching", {"prefix-cache: true"}),
        ("--no-enable-prefix-caching", {"prefix-cache: false"}),
        ("--enable-auto-tool-choice --tool-call-parser kimi_k2 --reasoning-parser qwen3", {"tool-parser: kimi"}),
        ("--enable-lora --lora-modules a=b c=d --fast", {'adapter: ["a=b", "c=d"]', "fast: true"}),
        ('--lora-modules {"name":"a","path":"b"}', {'adapter: ["a=b"]'}),
        ("--ssl-keyfile k --ssl-certfile c", {"tls-key: k", "tls-cert: c"}),
        ('--allowed-origins ["http://a","http://b"]', {'allow-origin: [http://a, http://b]'}),
        ("--tensor-parallel-size 1 --kv-cache-dtype auto", set()),
        ("--chat-template-file t --dtype bfloat16", {"chat-template: t", "dtype: bfloat16"}),
    ],
)  # fmt: skip
def test_options_of_other_servers_set_ours(line: str, lines: set[str]) -> None:
    assert set_by(*line.split()) == lines


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu-memory-utilization", "0.9"], "--budget"),
        (["--kv-cache-memory-bytes=1"], "--budget"),
        (["--swap-space", "4"], "--host-budget"),
        (["--trust-remote-code"], "no code out of a model's folder is ever run"),
        (["--tensor-parallel-size", "2"], "'2', only 1"),
        (["-ngl", "99"], "--backend"),
        (["--tool-call-parser", "pythonic"], f"'pythonic', must be one of {', '.join(sorted(TOOL_PARSERS))}"),
        (["--reasoning-parser", "granite"], "'granite', only auto or "),
        (["--max-num-batched-tokens", "63"], "63, must be at least 64"),
        (["--max-num-batched-tokens", "many"], "'many' is no whole number"),
        (["--max-num-seqs"], "--max-num-seqs has no value"),
        (["--lora-modules"], "wanted NAME=PATH"),
        (["--lora-modules", "{}"], "neither NAME=PATH nor JSON"),
        (["--allowed-origins", "["], "no list in JSON"),
        (["--root_path", "/x"], "have the proxy take its prefix off"),
        (["--seed", "1"], "a request says it"),
    ],
)
def test_what_is_not_here_says_what_to_do_instead(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", *args) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith(f"error: {args[0].partition('=')[0].replace('_', '-')}")
    assert error.count("\n") == 1


def test_a_config_file_of_another_server_is_understood(tmp_path: Path) -> None:
    text = (
        "model: some/x\nmax-num-seqs: 8\nenable-prefix-caching: false\ntrust-remote-code: false\nlora-modules: [a=b]\n"
    )
    path = file(tmp_path, text)
    lines = {line.split("  # ")[0] for line in shown("--config", path) if str(path) in line}
    assert lines == {"model: some/x", "max-running: 8", "prefix-cache: false", 'adapter: ["a=b"]'}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu-memory-utilization: 0.9", "o.yaml: --gpu-memory-utilization: the cache has one budget"),
        ("max-num-seqs: 1\nmax-running: 2", "o.yaml: max-running sets max-running, which is set already"),
        ("max-num-seqs: lots", "o.yaml: max-num-seqs is 'lots'"),
    ],
)
def test_what_a_file_of_another_server_cannot_ask_for(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--config", file(tmp_path, text, "o.yaml")) == 2
    assert words in capsys.readouterr().err


def test_values_that_look_like_options_of_others_stay_values() -> None:
    assert arguments(["--host", "--seed", "x", "--", "-ngl"], options()) == ["--host", "--seed", "x", "--", "-ngl"]


def test_each_name_is_there_once_and_none_is_ours() -> None:
    names = [name for entry in TABLE for name in entry.names]
    assert sorted(names) == sorted(set(names))
    assert set(names).isdisjoint(options())


def test_all_lead_to_options_that_are_here() -> None:
    tried = {"--lora-modules": "a=b", "--tool-call-parser": "qwen3_coder"}
    for name, entry in BY_NAME.items():
        if entry.settings is None:
            continue
        values = [tried.get(name, "64")]
        try:
            settings = entry.translate(name, values)
        except ConfigError:  # takes some words only
            assert "only" in entry.here
            continue
        assert {option for option, _ in settings} <= {*options(), MODEL}


def test_parsers_of_others_are_parsers_here() -> None:
    assert set(TOOL_PARSERS.values()) == set(FORMATS)
    assert grid.TILE == TILE
    assert all(BY_NAME["--reasoning-parser"].translate("", [name]) == [] for name in THINK_TAGS)


def test_the_table_can_be_read() -> None:
    done = CliRunner().invoke(cli.app, ["serve", "--help-aliases"])
    assert done.exit_code == 0
    assert all(name in done.output for name in BY_NAME)


def test_the_options_in_the_documentation_are_known() -> None:
    text = (Path(cli.__file__).resolve().parents[2] / "docs" / "options.md").read_text()
    said = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]+\b", text))
    assert said - {"--some-option", "--help"} <= {*options(), *BY_NAME}
