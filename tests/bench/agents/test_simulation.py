"""`hybrid-cache bench agents` on short simulations: what comes of a session can be worked out by hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import app
from hybrid_cache.bench.agents.machine import MACHINES, machine_named
from hybrid_cache.bench.agents.report import row_of
from hybrid_cache.bench.agents.simulation import Setting, Simulation
from hybrid_cache.bench.agents.workload import AgentSession, Turn
from hybrid_cache.errors import ConfigError
from hybrid_cache.scheduling.registry import ORDERS

MACHINE = machine_named("hybrid-7b")
ROOMY = 20_000_000_000


def session(*turns: Turn, shared: int = 0) -> AgentSession:
    return AgentSession("kind", shared, turns)


def two_turns(pause_s: float = 5.0) -> AgentSession:
    return session(Turn(640, 0, 10, "search", pause_s), Turn(700, 650, 20, "", None))


def run(*arrivals: tuple[float, AgentSession], memory: int = ROOMY, order: str = "learned", **fields: object):  # type: ignore[no-untyped-def]
    setting = Setting(MACHINE, memory, order, **fields)  # type: ignore[arg-type]
    return setting, Simulation(setting, list(arrivals)).run()


def test_a_session_alone_takes_the_time_of_its_steps() -> None:
    _, found = run((1.0, two_turns()))
    (ended,) = found.sessions
    # Two steps of at most 512 tokens for the first prompt, one for the second, and one for each further token.
    prefill = MACHINE.token_s * (640 + 64) + MACHINE.token_per_position_s * sum([*range(640), *range(640, 704)])
    rows = sum(
        MACHINE.spec.slot_bytes + MACHINE.spec.kv_bytes_per_token * n for n in [*range(640, 649), *range(700, 719)]
    )
    steps, decodes = 2 + 1 + 9 + 19, 9 + 19
    expected = steps * MACHINE.base_s + decodes * MACHINE.row_s + rows / MACHINE.bytes_per_s + prefill
    assert ended.end_s - ended.arrival_s - ended.paused_s == pytest.approx(expected, rel=1e-9)
    assert ended.paused_s == 5.0
    assert (found.num_returns, found.num_resident) == (1, 1)
    assert (found.prompt_tokens, found.new_tokens, found.computed_tokens) == (1340, 690, 700)


def test_what_left_is_computed_again_and_with_a_second_tier_is_not() -> None:
    tight = 1_500_000_000
    come = [(0.1 * i, two_turns(20.0)) for i in range(40)]
    _, without = run(*come, memory=tight)
    _, within = run(*come, memory=tight, host_bytes=20_000_000_000)
    _, ample = run(*come)
    assert without.num_resident < within.num_resident <= ample.num_resident == 40
    assert without.computed_tokens > within.computed_tokens


def test_sessions_of_one_kind_share_their_beginning() -> None:
    alike = session(Turn(640, 0, 5, "", None), shared=512)
    _, found = run((0.0, alike), (50.0, alike))
    assert found.computed_tokens == 640 + 128


def test_without_a_cache_everything_is_computed_each_time() -> None:
    _, found = run((0.0, two_turns()), prefix_cache=False, order="vllm")
    assert found.computed_tokens == 640 + 700


@pytest.mark.parametrize("order", ORDERS)
def test_all_sessions_end_and_the_same_seed_gives_the_same_numbers(order: str) -> None:
    come = [(0.05 * i, two_turns(0.2 * (i % 5))) for i in range(30)]
    rows = []
    for _ in range(2):
        setting, found = run(*come, memory=1_000_000_000, order=order)
        rows.append(row_of(setting.served, found, "t", 1.0, 1.0))
    assert rows[0] == rows[1]
    assert rows[0].sessions == 30
    assert rows[0].server_time_mean_s <= rows[0].e2e_mean_s


def test_the_command_writes_rows_and_a_plot(tmp_path: Path) -> None:
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--seconds", "5", "--rate", "2", "--memory", "40GB", "--max-tokens", "30000", "--policy", "fcfs,learned"]
    more = ["--no-cache-baseline", "--max-calls", "4", "--max-pause", "5", "--json", str(rows), "--plot", str(plot)]
    result = CliRunner().invoke(app, ["bench", "agents", *options, *more])
    assert result.exit_code == 0, result.output
    found = json.loads(rows.read_text())
    assert [(r["policy"], r["prefix_cache"]) for r in found["rows"]] == [
        ("vllm", False),
        ("fcfs", True),
        ("learned", True),
    ]
    assert found["note"]
    wanted = "trace model policy memory_bytes host_bytes rate seed prefix_cache e2e_mean_s e2e_p99_s server_time_mean_s"
    wanted += " server_time_p99_s ttft_mean_s recomputed_share resident_at_return longest_wait_s"
    assert set(wanted.split()) <= found["rows"][0].keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--policy", "lifo"], "unknown order 'lifo'"),
        (["--model", "gpt"], "model 'gpt': expected one of attention-6b"),
        (["--rate", "0"], "rate 0.0"),
        (["--seconds", "-1"], "seconds -1.0"),
        (["--seed", "x"], "'x': expected a whole number"),
        (["--memory", "much"], "'much' is not a size"),
        (["--memory", "1MB"], "holds no sequence"),
        (["--format", "mars"], "trace None: expected a file"),
        (["--half", "best"], "half 'best'"),
        (["--plot", "x.pdf"], "a plot is a PNG file"),
    ],
)
def test_what_cannot_be_run_is_an_error_in_a_line(options: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, ["bench", "agents", "--seconds", "1", *options])
    assert result.exit_code == 1
    assert problem in result.output
    assert "Traceback" not in result.output


def test_machines_are_named_in_errors() -> None:
    with pytest.raises(ConfigError, match="jamba-mini-long"):
        machine_named("x")
    assert all(machine.name == name for name, machine in MACHINES.items())
