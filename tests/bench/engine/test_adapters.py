import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from hybrid_cache.bench.engine import adapters
from hybrid_cache.bench.engine.adapters import run


def test_steps_of_the_same_sequences_are_timed_with_and_without_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    asked: list[int] = []
    step = adapters._step
    monkeypatch.setattr(
        adapters, "_step", lambda worker, work, models: (asked.append(len(models)), step(worker, work, models))
    )
    app, file = typer.Typer(), tmp_path / "times.json"
    app.command()(run)
    options = [
        "embedded",
        "--streams",
        "4,5",
        "--adapters",
        "0,2",
        "--steps",
        "2",
        "--memory",
        "3",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(app, options)
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert "3 adapters: " in result.output
    rows = json.loads(file.read_text())
    assert [(row["streams"], row["adapters"]) for row in rows] == [(n, k) for n in (4, 5) for k in (None, 0, 2)]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert asked == [1, 1, 3] * 2 * (2 + adapters.WARM_STEPS)
