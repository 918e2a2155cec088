"""`hybrid-cache bench policy` on tiny traffic, and against a real server."""

import json
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import main
from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.bench.common.files import write_whole
from hybrid_cache.bench.policy import command
from hybrid_cache.bench.policy.command import KNOWN, policy, speed
from hybrid_cache.bench.policy.live import Server, check_sizes
from hybrid_cache.bench.policy.plot import alike
from hybrid_cache.bench.policy.report import conclusion
from hybrid_cache.bench.policy.rows import PolicyRow, with_gaps
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.models.tools.presets import preset
from tests.api.servers import over_the_wire

TINY = ("--workload", "few-shot", "--scale", "0.04", "--model", "embedded", "--capacity", "5%,30%")
FEW = ("--policy", "none,lru,gdsf")


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*args: str | Path) -> Result:
    app = typer.Typer()
    app.command()(policy)
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    return Result(result.exit_code, result.stdout, result.stderr)


def rows_of(tmp_path: Path, *args: str | Path) -> list[PolicyRow]:
    file = tmp_path / "rows.json"
    result = run(*args, "--json", file)
    assert result.exit_code == 0, result.stderr
    return [PolicyRow(**row) for row in json.loads(file.read_text())]


def error_of(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 1
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_the_command_is_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "policy", "--help"])
    assert left.value.code == 0
    assert "--capacity" in capsys.readouterr().out


def test_every_policy_makes_a_row_at_every_capacity(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *TINY, "--policy", ",".join(KNOWN))
    assert {f.name for f in fields(PolicyRow)} == set(json.loads((tmp_path / "rows.json").read_text())[0])
    assert [r.policy for r in rows] == [*KNOWN, "bound", "infinite"] * 2
    assert {(r.trace, r.model, r.seed, r.concurrency) for r in rows} == {("few-shot", "embedded", 0, 1)}
    assert [round(r.capacity_share, 2) for r in rows] == [0.05] * (len(rows) // 2) + [0.3] * (len(rows) // 2)
    for row in rows:
        assert 0 <= row.flops_saved <= 1
        assert 0 <= row.token_hit_rate <= 1
        assert (row.alpha is None) == (row.policy != "marconi-static")
        if row.policy not in ("bound", "infinite"):
            assert row.kv_bytes is not None
            assert row.state_bytes is not None
            assert 0 < row.kv_bytes + row.state_bytes <= row.capacity_bytes


def test_a_policy_is_also_known_by_its_former_name(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *TINY[:-2], "--capacity", "10%", "--policy", "ours,ours-hindsight,learned", "--no-bound")
    assert [r.policy for r in rows] == ["learned", "learned-hindsight"]


def test_nothing_saves_nothing_and_no_policy_passes_the_bound(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *TINY)
    for size in {r.capacity_bytes for r in rows}:
        at = {r.policy: r for r in rows if r.capacity_bytes == size}
        limit, everything, nothing = at.pop("bound"), at["infinite"], at["none"]
        assert nothing.flops_saved == nothing.token_hit_rate == nothing.admissions == 0
        assert all(r.flops_saved <= limit.flops_saved + 1e-9 for r in at.values() if r is not everything)
        assert limit.flops_saved <= everything.flops_saved
        times = [r.ttft_p50_s for r in at.values() if r.ttft_p50_s is not None]
        assert len(times) == len(at)
        assert max(times) == nothing.ttft_p50_s


def test_gaps_run_from_lru_to_the_bound(tmp_path: Path) -> None:
    at = {r.policy: r for r in rows_of(tmp_path, *TINY, *FEW) if r.capacity_share > 0.1}
    assert at["lru"].gap_closed == 0
    assert at["gdsf"].gap_closed == pytest.approx(
        (at["gdsf"].flops_saved - at["lru"].flops_saved) / (at["bound"].flops_saved - at["lru"].flops_saved)
    )
    assert at["bound"].gap_closed is None
    assert at["bound"].planned_flops_saved is not None
    assert 0 < at["bound"].planned_flops_saved <= at["bound"].flops_saved
    other, bound = max(at["lru"].flops_saved, at["none"].flops_saved), at["bound"].flops_saved
    assert at["gdsf"].gap_from_best == pytest.approx((at["gdsf"].flops_saved - other) / (bound - other))
    assert (at["gdsf"].best_other, at["lru"].best_other) == ("lru", "gdsf")
    assert {r.gap_closed for r in rows_of(tmp_path, *TINY, *FEW, "--no-bound")} == {None}


def test_the_same_seed_makes_the_same_rows_in_any_number_of_processes(tmp_path: Path) -> None:
    def numbers(*args: str) -> list[str]:
        return [re.sub(r"seconds=[^,]*", "", repr(r)) for r in rows_of(tmp_path, *TINY, *FEW, *args)]

    first = numbers("--seed", "3")
    assert numbers("--seed", "3", "--jobs", "2") == first
    assert numbers("--seed", "4") != first


def test_requests_in_progress_pin_what_they_use(tmp_path: Path) -> None:
    alone, crowded = (rows_of(tmp_path, *TINY, *FEW, "--concurrency", n) for n in ("1", "6"))
    assert {r.concurrency for r in crowded} == {6}
    assert sum(r.flops_saved for r in crowded) < sum(r.flops_saved for r in alone)


def test_bytes_and_shares_name_the_same_capacity(tmp_path: Path) -> None:
    (share,) = rows_of(tmp_path, *TINY[:-2], "--policy", "lru", "--no-bound", "--capacity", "10%")
    (size,) = rows_of(tmp_path, *TINY[:-2], "--policy", "lru", "--no-bound", "--capacity", f"{share.capacity_bytes}B")
    assert size.capacity_share == share.capacity_share
    assert size.flops_saved == share.flops_saved


def test_files_are_replayed_beside_made_up_traffic(tmp_path: Path) -> None:
    file = written(tmp_path / "talk.jsonl", talks(random.Random(0), 6, 3))
    result = run("--trace", file, *TINY, *FEW, "--limit", "10", "--capacity", "40%")
    assert result.exit_code == 0
    assert "talk on embedded: 10 requests" in result.stdout
    assert "few-shot on embedded: 10 requests" in result.stdout
    assert "made-up pauses" in result.stdout  # what was assumed about the file


def test_the_last_lines_say_what_the_numbers_say(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = run(*TINY, *FEW, "--json", file)
    rows = [PolicyRow(**row) for row in json.loads(file.read_text())]
    assert result.stdout.splitlines()[-1] == conclusion(rows)


def test_a_conclusion_names_the_best_and_what_was_possible() -> None:
    def row(policy: str, size: int, saved: float) -> PolicyRow:
        return replace(blank, policy=policy, capacity_bytes=size, flops_saved=saved)

    unknown = dict.fromkeys(("ttft_p50_s", "ttft_p95_s", "kv_bytes", "state_bytes", "gap_closed", "alpha"))
    blank = PolicyRow(
        "t", "m", "", 1, 0.1, 0.0, 0.0, **unknown, admissions=0, evictions=0, seconds=0.0, seed=0, concurrency=1
    )
    rows = [row("lru", 1, 0.1), row("gdsf", 1, 0.2), row("bound", 1, 0.5)]
    more = [row("lru", 2, 0.4), row("gdsf", 2, 0.3), row("bound", 2, 0.7)]
    assert conclusion(rows) == (
        "t on m: gdsf saves 20.0 % of prefill FLOPs, the most; "
        "lru saves 10.0 % and no policy could save more than 50.0 %."
    )
    assert conclusion([row("lru", 1, 0.2), *rows[1:]]) == (
        "t on m: lru and gdsf tie at 20.0 % of prefill FLOPs; no policy could save more than 50.0 %."
    )
    tied = [row("lru", 3, 0.3), row("gdsf", 3, 0.3), row("bound", 3, 0.3)]
    assert conclusion(rows + tied).startswith(
        "t on m: gdsf saves 25.0 % of prefill FLOPs on average, the most at 1 of 2 sizes, ties with lru at 1; "
    )
    assert conclusion(rows + more) == (
        "t on m: lru and gdsf save 25.0 % of prefill FLOPs on average; no policy could save more than 60.0 %."
    )
    assert conclusion([row("lru", 1, 0.0), row("bound", 1, 0.0)]) == (
        "t on m: nothing is saved, and no policy could save more than 0.0 %."
    )
    assert with_gaps(rows)[1].gap_closed == pytest.approx(0.25)


def test_a_policy_that_knows_the_trace_is_no_rival() -> None:
    blank = {field.name: None for field in fields(PolicyRow)} | {"trace": "t", "model": "m", "capacity_bytes": 1}
    rows = [
        PolicyRow(**{**blank, "policy": policy, "flops_saved": saved})
        for policy, saved in (("lru", 0.1), ("gdsf", 0.2), ("marconi-static", 0.4), ("belady", 0.45), ("bound", 0.5))
    ]
    at = {row.policy: row for row in with_gaps(rows)}
    assert (at["gdsf"].best_other, at["belady"].best_other) == ("lru", "gdsf")
    assert at["belady"].gap_from_best == pytest.approx(0.25 / 0.3)


def test_equal_lines_are_drawn_once_if_they_are_equal_in_every_panel() -> None:
    line, other = ([1.0, 2.0], [10.0, 20.0]), ([1.0, 2.0], [10.0, 20.1])
    panels = [{"lru": line, "gdsf": line, "seglen": line, "bound": other}, {"lru": line, "gdsf": other, "seglen": line}]
    assert alike(panels) == [["lru", "seglen"], ["gdsf"]]


def test_a_size_that_holds_nothing_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = run(*TINY[:-1], "0.01%,30%", "--policy", "lru", "--json", file)
    assert result.exit_code == 0
    assert re.search(r"all\s+-\s+-", result.stdout)
    assert "one checkpoint and one page of embedded take" in result.stdout
    *rows, missing = json.loads(file.read_text())
    assert [row["policy"] for row in rows] == ["lru", "bound", "infinite"]
    assert "one checkpoint" in missing["error"]


@pytest.mark.parametrize(
    ("statement", "said"),
    [("raise KeyError('gone')", "KeyError: 'gone' ("), ("raise SystemExit('enough')", "SystemExit: enough (")],
)
def test_a_policy_that_fails_leaves_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, said: str
) -> None:
    (tmp_path / "failing.py").write_text(
        "from hybrid_cache.cache.policies.lru import LRU\n\n\nclass Failing(LRU):\n"
        f"    def lowest(self):\n        {statement}\n"
    )
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    result = run(*TINY[:-1], "30%", "--policy", "failing:Failing,lru", "--no-bound")
    assert result.exit_code == 0
    assert re.search(r"Failing\s+-\s+-", result.stdout)
    assert f"policy failing:Failing raised {said}" in result.stdout
    assert re.search(r"lru\s+\d", result.stdout)


def test_lines_of_json_come_one_by_one_and_say_how_to_repeat_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    seen: list[int] = []

    def counted(row: command.AnyRow) -> str:
        seen.append(len(file.read_text().splitlines()))
        return ""

    monkeypatch.setattr(command, "in_brief", counted)
    monkeypatch.setattr(command, "LINE_EVERY_S", 0.0)
    trace = written(tmp_path / "talk.jsonl", talks(random.Random(0), 6, 3))
    result = run("--trace", trace, *TINY[4:-1], "40%", *FEW, "--limit", "10", "--seed", "3", "--json", file)
    assert result.exit_code == 0
    assert seen == [1, 2, 3, 4, 5]
    assert result.stderr.count("of 5 cells") == 5, "nobody sees a bar here"
    rows = [PolicyRow(**json.loads(line)) for line in file.read_text().splitlines()]
    first = rows[0]
    assert (first.options, first.num_requests, first.seed) == ("--limit 10 --seed 3", 10, 3)
    assert "made-up" in first.note
    assert first.version
    assert first.capacity_bytes == int(0.4 * first.unique_bytes)
    assert min(first.page_bytes, first.slot_bytes, first.page_tokens) > 0


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert run(*TINY, *FEW, "--plot", file).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [file]


def test_times_to_the_first_token_scale_with_flops() -> None:
    jamba, embedded = preset("jamba-1.5-mini"), preset("embedded")
    assert speed(None, jamba) == speed("17.8:53", jamba)
    assert speed(None, embedded).flops_per_s == speed(None, jamba).flops_per_s
    given = speed("10:500", embedded)
    assert given.base_s == 0.01
    assert embedded.prefill_cost.per_token * 1000 / given.flops_per_s == pytest.approx(0.5)


# Bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "best"], "unknown policy 'best', must be one of none, lru"),
        (["--policy", "nowhere:Best"], "policy 'nowhere:Best': module 'nowhere' cannot be imported"),
        (["--sort"], "are for files, name one with --trace"),
        (["--policy", ","], "policy ',' names nothing"),
        (["--model", "gpt"], "'gpt' is neither a preset nor a config.json"),
        (["--workload", "coffee"], "unknown workload 'coffee'"),
        (["--capacity", "0%"], "capacity '0%' is not a share above 0 %"),
        (["--capacity", "-5%"], "capacity '-5%' is not a share"),
        (["--capacity", "abc"], "capacity 'abc' is not a size"),
        (["--capacity", "1KiB"], "one checkpoint and one page of embedded take"),
        (["--ttft", "17"], "wanted BASE_MS:MS_PER_1K_TOKENS"),
        (["--ttft", "1:0"], "wanted BASE_MS:MS_PER_1K_TOKENS"),
        (["--rate", "2"], "name one with --trace"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--plot", "plot.pdf"], "a plot is a PNG file"),
        (["--json", "nowhere/rows.json"], "cannot be written"),
        (["--live", "http://127.0.0.1:9"], "no connection, is the server running?"),
    ],
)
def test_bad_input_is_one_clear_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*TINY, "--json", "rows.json", *args]
    assert message in error_of(*given)
    assert not list(tmp_path.iterdir())


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.touch()
    assert "empty.jsonl:1: requests: expected at least one" in error_of("--trace", file)


def test_an_old_file_survives_a_failure_to_write_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text("old")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


# Against a server

BUDGET = 2 << 20  # 32 pages of the embedded model; a state takes two


def talks(rng: random.Random, num_talks: int, turns: int) -> list[dict[str, object]]:
    """Conversations under two system prompts that take turns; some prompts are sent again."""
    systems = [ids(rng, 150), ids(rng, 90)]
    histories = [list(rng.choice(systems)) for _ in range(num_talks)]
    records: list[dict[str, object]] = []
    for _ in range(turns):
        for number, history in enumerate(histories):
            start = len(history)
            history += ids(rng, rng.randrange(20, 120))
            marks = [{"position": p, "role": "user"} for p in (start, len(history))]
            if (len(history) + 1) % TILE:  # else the server computes the answer again in its own time
                records += [{"prompt": list(history), "session": str(number), "marks": marks}] * rng.choice(
                    (1, 1, 1, 2)
                )
    return records


def ids(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(100_000) for _ in range(num)]


def written(file: Path, records: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@contextmanager
def embedded_server(policy: str) -> Iterator[str]:
    model = load(embedded_path(), ops=dispatch.select("auto"))
    engine = AsyncEngine(model, EngineConfig(budget_bytes=BUDGET, policy=policy))
    settings = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded")
    with over_the_wire(create_app(engine, TextModel.load(embedded_path()), settings)) as url:
        yield url


# Their decisions follow from the order of requests alone, not from milliseconds: the replay can be held to every token.
@pytest.mark.parametrize("name", ["lru", pytest.param("flops-per-byte", marks=pytest.mark.slow), "marconi"])
def test_a_replay_hits_what_the_server_hits(name: str, tmp_path: Path) -> None:
    trace = written(tmp_path / "talks.jsonl", talks(random.Random(1), 8, 6))
    file = tmp_path / "live.json"
    with embedded_server(name) as url:
        result = run("--live", url, "--trace", trace, "--policy", name, "--json", file)
        assert result.exit_code == 0, result.stderr
        assert "start the server afresh" in error_of("--live", url, "--trace", trace)
    report = json.loads(file.read_text())
    assert report["capacity_bytes"] == BUDGET
    assert report["live_evictions"] > 50
    assert report["simulated_evictions"] > 50
    assert 0.1 * report["prompt_tokens"] < report["live_cached_tokens"] < 0.9 * report["prompt_tokens"]
    assert report["relative_difference"] < 0.01
    assert f"in {len(report['differing'])} of {report['requests']} requests" in result.stdout


def test_a_trace_without_tokens_cannot_be_sent(tmp_path: Path) -> None:
    record = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    trace = written(tmp_path / "blocks.jsonl", [record])
    with embedded_server("lru") as url:
        assert "request 0 has no tokens" in error_of("--live", url, "--trace", trace)


def test_another_model_than_the_servers_is_noticed() -> None:
    geometry = Geometry.of(preset("embedded").cache_spec, BUDGET)
    page, slot = (geometry.stride_bytes(kind) for kind in (Kind.PAGE, Kind.SLOT))
    check_sizes("embedded", geometry, Server("m", 100, "float32", BUDGET, 3, 3 * page, 2, 2 * slot, 0))
    with pytest.raises(ConfigError, match="name the server's model with --model"):
        check_sizes("embedded", geometry, Server("m", 100, "float32", BUDGET, 3, 3 * page, 2, 4 * slot, 0))
