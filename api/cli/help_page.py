"""The help of a command as a page to search.

Where people look at a terminal, an option is a line with its names, and under it what it does. Where a program reads,
such as grep, it is one line with all of it. No name is ever cut or broken.
"""

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from textwrap import fill
from typing import Any, Protocol

import typer
from typer.core import TyperCommand

WIDEST = 110
KINDS = {"str": "TEXT", "Path": "PATH", "path": "PATH", "int": "N", "float": "NUMBER"}
_KIND = re.compile(r" <?(?:list\[)?(?:\w+\.)*(str|[Pp]ath|int|float)(?: range)?\]?>?(?= |$)")
_COLUMNS = re.compile(r"\S {2,}\S")

Entry = tuple[str, str]  # an option with its kind of value, and what is said of it


class Parameter(Protocol):
    """An option or argument of a command."""

    def get_help_record(self, ctx: Any) -> tuple[str, str] | None:
        """Its names with the kind of its value, and its text; None if it is hidden."""


class SearchedCommand(TyperCommand):
    """Its help is such a page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(f"{self.get_usage(ctx)}\n\n{cleandoc(self.help or '')}", self.sections(ctx)))

    def sections(self, ctx: Any) -> dict[str, list[Entry]]:
        """What stands under which heading."""
        parameters = sorted(self.get_params(ctx), key=lambda each: each.param_type_name != "argument")
        return {"Options": [*filter(None, (entry(each, ctx) for each in parameters))]}


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
    found = [_paragraph(each, wide=wide) for each in head.strip().split("\n\n")]
    for heading, entries in sections.items():
        found.append("\n".join([typer.style(heading, bold=True), *(line for each in entries for line in lines(each))]))
    return "\n\n".join(found) + "\n"


def _paragraph(text: str, *, wide: bool) -> str:
    """One with columns in it keeps its lines."""
    if _COLUMNS.search(text):
        return text
    text = " ".join(text.split())
    return text if wide else _filled(text, 0)


def _in_one_line(each: Entry) -> Iterator[str]:
    yield f"  {each[0]}  {each[1]}"


def _in_a_column(each: Entry) -> Iterator[str]:
    yield "  " + typer.style(each[0], fg="cyan")
    yield _filled(each[1], 6)


def _filled(text: str, num_blanks: int) -> str:
    """As wide as the terminal, behind so many blanks."""
    width, margin = max(40, min(WIDEST, shutil.get_terminal_size().columns - 1)), " " * num_blanks
    return fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
