"""`hybrid-cache bench grammar` on a small model."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hybrid_cache.bench.common.random_model import SMALL
from hybrid_cache.bench.engine import grammar


def test_steps_with_and_without_a_schema_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grammar, "MID_GRANITE", SMALL["granite"])
    app, file = typer.Typer(), tmp_path / "numbers.json"
    app.command()(grammar.grammar)
    result = CliRunner().invoke(app, ["--rows", "3", "--vocab", "4200", "--steps", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "3 rows, vocabulary of 4,200" in result.output
    found = json.loads(file.read_text())
    assert found["free_ms"] > 0
    assert found["constrained_ms"] > 0
    assert all(ms > 0 for ms in found["parts_ms"].values())


def test_the_wide_vocabulary_says_what_the_narrow_one_says() -> None:
    tokenizer = grammar.wide_tokenizer(5000)
    text = 'a {"name": "Ada"} and\n more'
    assert tokenizer.vocab_size == 5000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]
