"""`serve --help` and `chat --help` as a page to search.

Where people look at a terminal, an option is a line with its names, and under it what it does. Where a program reads,
such as grep, it is one line with all of it. No name is ever cut or broken.
"""

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from textwrap import fill
from typing import Any, Protocol

import typer

WIDEST = 110
KINDS = {"str": "TEXT", "Path": "PATH", "path": "PATH", "int": "N", "float": "NUMBER"}
_KIND = re.compile(r" <?(?:list\[)?(?:\w+\.)*(str|[Pp]ath|int|float)(?: range)?\]?>?(?= |$)")

Entry = tuple[str, str]  # an option with its kind of value, and what is said of it


class Parameter(Protocol):
    """An option or argument of a command."""

    def get_help_record(self, ctx: Any) -> tuple[str, str] | None:
        """Its names with the kind of its value, and its text; None if it is hidden."""


def entry(parameter: Parameter, ctx: typer.Context, also: Iterable[str] = ()) -> Entry | None:
    """None if it is hidden. also: names that other programs have for it."""
    record = parameter.get_help_record(ctx)
    if record is None:
        return None
    text = " ".join(record[1].split()).replace("env var: ", "")
    names = ", ".join(also)
    return _KIND.sub(lambda found: f" {KINDS[found[1]]}", record[0]), f"{text} (or {names})" if names else text


def page(head: str, sections: Mapping[str, Iterable[Entry]], *, wide: bool | None = None) -> str:
    """wide: each entry in one line; by default if no terminal reads it."""
    wide = not sys.stdout.isatty() if wide is None else wide
    lines = _in_one_line if wide else _in_a_column
    paragraphs = [" ".join(paragraph.split()) for paragraph in head.strip().split("\n\n")]
    found = paragraphs if wide else [_filled(paragraph, 0) for paragraph in paragraphs]
    for heading, entries in sections.items():
        found.append("\n".join([typer.style(heading, bold=True), *(line for each in entries for line in lines(each))]))
    return "\n\n".join(found) + "\n"


def _in_one_line(each: Entry) -> Iterator[str]:
    yield f"  {each[0]}  {each[1]}"


def _in_a_column(each: Entry) -> Iterator[str]:
    yield "  " + typer.style(each[0], fg="cyan")
    yield _filled(each[1], 6)


def _filled(text: str, num_blanks: int) -> str:
    """As wide as the terminal, behind so many blanks."""
    width, margin = max(40, min(WIDEST, shutil.get_terminal_size().columns - 1)), " " * num_blanks
    return fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
