"""`hybrid-cache bench turns` on short conversations: what is committed as it will be sent is there."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hybrid_cache.bench.turns.command import turns

TEMPLATES = Path(__file__).parents[2] / "api" / "text" / "templates"
SHORT = ["--turns", "4", "--answer", "5", "--thought", "30", "--system", "60", "--result", "40", "--threads", "1"]


def test_thoughts_that_leave_the_history_are_no_miss(tmp_path: Path) -> None:
    app, file = typer.Typer(), tmp_path / "turns.json"
    app.command()(turns)
    template = str(TEMPLATES / "qwen3_next.jinja")
    shown = CliRunner().invoke(app, [*SHORT, "--chat-template", template, "--json", str(file)])
    assert shown.exit_code == 0, shown.output
    results = json.loads(file.read_text())
    assert [(r["thoughts"], r["expected"]) for r in results] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    for result in results:
        assert len(result["turns"]) == 3
        for turn in result["turns"] if result["expected"] else ():
            assert turn["unchanged"] - turn["cached"] < 64 + 64, (
                "less than two tiles: one of a message end, one of a turn"
            )
    ours, raw = results[2:]
    assert ours["share"] > raw["share"]


@pytest.mark.parametrize("arguments", [["no/such folder"], ["--chat-template", "no such file"]])
def test_what_is_not_there_is_named(arguments: list[str]) -> None:
    app = typer.Typer()
    app.command()(turns)
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2
    assert "no" in shown.output
