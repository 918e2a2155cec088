"""The headings of `serve --help`."""

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.panels import OTHER, PANELS, PLACES, panel_of
from tests.api.cli.test_foreign_options import options


def names() -> set[str]:
    return {parameter.name for parameter in options().values()} - {"model"}  # type: ignore[attr-defined]


def test_every_option_has_a_heading() -> None:
    assert {name for name in names() if panel_of(name) == OTHER} == set()
    assert set(PLACES) - names() == {"help"}
    assert len(PLACES) == sum(len(text.split()) for text in PANELS.values())


def test_the_headings_are_shown_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    found = [output.index(f"─ {heading} ─") for heading in PANELS]
    assert found == sorted(found)
    assert OTHER not in output
    assert output.index("--max-model-len") < found[1] < output.index("--budget ") < found[2]
