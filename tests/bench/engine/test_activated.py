"""`hybrid-cache bench activated` on a small model."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hybrid_cache.bench.common.random_model import SMALL
from hybrid_cache.bench.engine import activated


def test_calls_behind_what_the_base_has_read_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(activated, "MID_GRANITE", SMALL["granite"])
    app, file = typer.Typer(), tmp_path / "numbers.json"
    app.command()(activated.activated)
    options = ["--before", "1000", "--before", "1024", "--new", "5", "--calls", "3", "--json", str(file)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())["timings"]
    assert [(t["before"], t["new"]) for t in found] == [(1000, 5), (1024, 5)]
    assert all(0 < t["adapter_ms"] < t["whole_ms"] for t in found)
