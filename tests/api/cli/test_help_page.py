"""Help can be searched: whole options in whole lines, no name cut, whatever the width."""

import re

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import help_page
from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.foreign_options import BY_NAME, taken_as
from tests.api.cli.test_foreign_options import options


def lines_of(command: str) -> list[str]:
    return CliRunner().invoke(cli.app, [command, "--help"]).output.splitlines()


def test_a_program_reads_each_option_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = lines_of("serve")
    for name in options():
        found = [line for line in lines if re.search(rf"(^  |, | / ){name}\b(?!-)", line.split("  [")[0])]
        assert len(found) == 1 or name == "MODEL", name
    assert any(line.startswith("  --temperature NUMBER  0 is greedy") for line in lines_of("chat"))


def test_a_terminal_shows_lines_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    long = ("--a-name-that-is-much-longer-than-the-terminal-of-60-columns-is-wide TEXT", "word " * 40)
    shown = help_page.page("Usage: x", {"Here": [("--a N", "word " * 40), long]}, wide=False)
    assert long[0] in shown
    assert max(len(line) for line in shown.splitlines() if "word" in line) < 60


@pytest.mark.parametrize("wide", [True, False])
def test_columns_in_a_text_stay_columns(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    columns, sentence = "hit %     tokens that were found\nevict     states that went", "One sentence\nin two lines."
    assert help_page.page(f"{columns}\n\n{sentence}", {}, wide=wide) == f"{columns}\n\nOne sentence in two lines.\n"


@pytest.mark.parametrize(
    "command",
    [
        *("serve", "chat", "demo", "train-lora", "bench policy", "bench serve", "bench agents", "bench exactness"),
        *("model info", "model list", "model convert", "cache ls", "cache drop", "variants profile"),
    ],
)
def test_no_command_cuts_a_name(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output = CliRunner().invoke(cli.app, [*command.split(), "--help"]).output
    assert "…" not in output
    assert "\nOptions\n" in output or command == "serve"
    assert output.count("--help") >= 1


def test_names_of_other_servers_stand_with_what_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by_line = {line.split(maxsplit=1)[0]: line for line in lines_of("serve") if line.startswith("  -")}
    assert by_line["--max-running"].endswith("(or --max-num-seqs, --max-running-requests, --parallel, -np)")
    assert "--disable-radix-cache" in by_line["--prefix-cache"]
    assert "--gpu-memory-utilization" not in "".join(by_line.values())  # it does not do the same
    assert all(BY_NAME[name].settings for option in options() for name in taken_as(option))


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ("--budget str", "--budget TEXT"),
        ("--budget <str>", "--budget TEXT"),
        ("--profile list[Path]", "--profile PATH"),
        ("--profile <list[Path]>", "--profile PATH"),
        ("--port <int range>", "--port N"),
        ("--string", "--string"),
        ("--a [NAME=]DIR", "--a [NAME=]DIR"),
    ],
)
def test_kinds_of_values_are_named_as_people_do(shown: str, wanted: str) -> None:
    class Parameter:
        def get_help_record(self, ctx: object) -> tuple[str, str]:
            return shown, "Text\n  of it. [env var: X; default: 1]"

    found = help_page.entry(Parameter(), None, ["-b"])
    assert found == (wanted, "Text of it. [X; default: 1] (or -b)")
