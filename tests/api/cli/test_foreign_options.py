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
        ("some/x --served-model-name a b --api-key k l", {
            "model: some/x", "served-model-name: [a, b]", "# api-key: ***"}),
        ("--served-model-name a b --model=some/x", {"model: some/x", "served-model-name: [a, b]"}),
        ("--served-model-name a some/x", {"model: some/x", "served-model-name: [a]"}),
        ("--alias a,b --mamba_ssm_cache_dtype float32", {"served-model-name: [a, b]"}),
        # As people have them in public guides and threads.
        ("Qwen/Qwen3.5-4B --enable-prefix-caching --max-model-len 1024 --dtype bfloat16", {
            "model: Qwen/Qwen3.5-4B", "prefix-cache: true", "max-model-len: 1024", "dtype: bfloat16"}),
        ("tiiuae/Falcon-H1-7B-Instruct --tensor-parallel-size 1 --data-parallel-size 1", {
            "model: tiiuae/Falcon-H1-7B-Instruct"}),
        ("--model-path Qwen/Qwen3-4B-FP8 --port 8080 --context-length 60000", {
            "model: Qwen/Qwen3-4B-FP8", "port: 8080", "max-model-len: 60000"}),
        ("-m granite.gguf -c 32768 --jinja --port 8080 --host 0.0.0.0 -np 4 -ub 512 --metrics --no-webui -a granite", {
            "model: granite.gguf", "max-model-len: 32768", "port: 8080", "host: 0.0.0.0", "max-running: 4",
            "max-tiles: 8", "served-model-name: [granite]"}),
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
        (["-O3"], "--backend chooses the kernels"),
        (["-O.mode=3"], "--backend chooses the kernels"),
        (["--compilation-config.mode", "3"], "--backend chooses the kernels"),
        (["--chunked-prefill-size", "-1"], "prompts are always read in pieces"),
        (["--mamba-ssm-dtype", "bfloat16"], "states in float32"),
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


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (
            "some/x --trust-remote-code -tp 2 --enable-auto-tool-choice --tool-call-parser qwen3_coder "
            "--gpu-memory-utilization 0.95 --max-num-seqs 8 --kv-cache-dtype fp8 --max-model-len 130k -O 3",
            ["--trust-remote-code", "-tp", "--gpu-memory-utilization", "--kv-cache-dtype", "-O"],
        ),
        (
            "some/x --speculative-config {} --block-size 8 --distributed-executor-backend mp --enable-expert-parallel",
            ["--speculative-config", "--block-size", "--distributed-executor-backend, --enable-expert-parallel"],
        ),
        (
            "--model-path some/x --tp 4 --mem-fraction-static 0.8 --speculative-algo NEXTN --speculative-num-steps 3 "
            "--mamba-scheduler-strategy extra_buffer --chunked-prefill-size 4096",
            [
                "--tp",
                "--mem-fraction-static",
                "--speculative-algo, --speculative-num-steps",
                "--mamba-scheduler-strategy",
            ],
        ),
        (
            "-hf some/x --jinja -ngl 99 -fa on --n-cpu-moe 3 -ctk f16 -ctv f16 --temp 0 --top-p 0.8 --no-mmap -tb 8",
            ["-ngl, --n-cpu-moe", "-fa", "-ctk, -ctv", "--temp, --top-p", "--no-mmap", "-tb"],
        ),
    ],
)
def test_all_that_a_command_line_cannot_have_is_said_at_once(
    line: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", *line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(f"{each}: " in error for each in options)
    assert len(re.findall(r"(?:^error:|[,;]) (?=--?[a-zA-Z][\w-]*[:,])", error)) == sum(
        1 + o.count(",") for o in options
    )


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
        ("max-num-seqs: [1, 2]", "o.yaml: max-num-seqs is a list, wanted one value"),
        ("model-path: [a, b]", "o.yaml: model-path is a list, wanted one value"),
        ("enable-prefix-caching: perhaps", "o.yaml: enable-prefix-caching is 'perhaps', wanted true or false"),
    ],
)
def test_what_a_file_of_another_server_cannot_ask_for(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--config", file(tmp_path, text, "o.yaml")) == 2
    assert words in capsys.readouterr().err


def test_a_list_in_a_file_of_another_server_counts_with_all_its_entries(tmp_path: Path) -> None:
    path = file(tmp_path, "alias: [a, b]\nallowed-origins: [http://a, http://b]\n")
    lines = {line.split("  # ")[0] for line in shown("--config", path) if str(path) in line}
    assert lines == {"served-model-name: [a, b]", "allow-origin: [http://a, http://b]"}


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
