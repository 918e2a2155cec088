import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hybrid_cache.bench.engine.bookkeeping import NUM_TOKENS, bookkeeping, measure
from hybrid_cache.kernels.grid import TILE


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(bookkeeping)
    return app


@pytest.mark.parametrize("policy", ["flops-per-byte", "lru"])
@pytest.mark.parametrize("full", [True, False])
def test_requests_hit_what_their_names_say(full: bool, policy: str) -> None:
    branch, repeat = measure(1_000, full, 50, policy, seed=1)
    assert branch.hit_tokens == NUM_TOKENS // 2 // TILE * TILE
    assert repeat.hit_tokens > 0.99 * NUM_TOKENS


@pytest.mark.parametrize("full", [True, False])
def test_only_a_full_budget_evicts(full: bool) -> None:
    branch, _ = measure(1_000, full, 50, "flops-per-byte", seed=1)
    assert (branch.evictions > 0) == full


def test_the_tree_has_about_the_size_that_was_asked_for() -> None:
    assert all(500 < t.nodes < 2_000 for t in measure(1_000, True, 10, "lru", seed=1))


def test_the_numbers_are_printed_and_written(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = CliRunner().invoke(app, ["--nodes", "100", "--requests", "5", "--seed", "3", "--json", str(file)])
    assert result.exit_code == 0
    assert "roomy" in result.output
    report = json.loads(file.read_text())
    assert report["seed"] == 3
    assert [(t["budget"], t["request"]) for t in report["timings"]] == [
        ("full", "branch"),
        ("full", "repeat"),
        ("roomy", "branch"),
        ("roomy", "repeat"),
    ]
    assert all(0 < t["median_us"] <= t["p95_us"] for t in report["timings"])


def test_an_unknown_policy_is_an_error_message(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--nodes", "100", "--policy", "best"])
    assert result.exit_code == 1
    assert "must be one of" in result.output
