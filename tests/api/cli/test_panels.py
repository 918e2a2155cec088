"""The headings of `serve --help`."""

from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.panels import ELSEWHERE, OTHER, PANELS, PLACES, panel_of
from tests.api.cli.test_foreign_options import options


def names() -> set[str]:
    return {parameter.name for parameter in options().values()}  # type: ignore[attr-defined]


def test_every_option_has_a_heading() -> None:
    assert {name for name in names() if panel_of(name) == OTHER} == set()
    assert set(PLACES) - names() == {"help"}
    assert len(PLACES) == sum(len(text.split()) for text in PANELS.values())


def test_the_headings_are_shown_in_their_order() -> None:
    output = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    found = [output.index(f"\n{heading}\n") for heading in (*PANELS, ELSEWHERE)]
    assert found == sorted(found)
    assert OTHER not in output
    assert found[0] < output.index("  model ") < output.index("  --max-model-len") < found[1]
    assert found[1] < output.index("  --budget ") < found[2]
