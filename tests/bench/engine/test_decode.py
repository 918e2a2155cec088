"""`hybrid-cache bench decode` on the embedded model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import app
from hybrid_cache.bench.common.ceilings import QUICK, SIZES


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["bench", "decode", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_steps_are_timed_beside_their_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "cpu", QUICK)
    file = tmp_path / "out.json"
    text = run("--streams", "1,3", "--prefixes", "64", "--steps", "2", "--json", str(file))
    assert "prefill of 1,024 tokens" in text
    report = json.loads(file.read_text())
    one, three = report["decode"]
    assert (one["streams"], three["streams"]) == (1, 3)
    assert one["apart_ms"] is None
    assert three["apart_ms"] > 0
    assert three["states_ms"] == pytest.approx(3 * one["states_ms"])
    assert three["weights_ms"] == one["weights_ms"] > 0
    assert all(row["share"] > 0 and row["tokens_per_s"] > 0 for row in report["decode"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--streams", "a"], "not a list of numbers"),
        (["--prefixes", "0"], "0 is less than 1"),
        (["--prefixes", "40000"], "more than the model's context"),
    ],
)
def test_bad_values_are_named(args: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", *args])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
