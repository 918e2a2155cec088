"""What a check of a GPU has found, as Markdown and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | int | float | bool | None


@dataclass(slots=True)
class Table:
    """Rows of cells under column names."""

    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    title: str = ""

    def add(self, *cells: Cell) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append(list(cells))

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        return "\n".join(
            [*([f"{self.title}:\n"] if self.title else []), *(f"| {' | '.join(line)} |" for line in lines)]
        )


@dataclass(slots=True)
class Section:
    """One part of the check. `failures` are what makes the whole check fail, if the part is of that kind."""

    name: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    error: str = ""  # a traceback, where the part did not come to its end
    seconds: float = 0.0

    def table(self, *columns: str, title: str = "") -> Table:
        """A new table, which may be filled later."""
        self.tables.append(Table(list(columns), title=title))
        return self.tables[-1]

    def markdown(self) -> str:
        verdict = "FAILED" if self.failures else "broke off" if self.error else "done"
        parts = [f"## {self.name}\n\n{verdict} in {self.seconds:.0f} s"]
        parts += ["\n".join(f"- {line}" for line in lines) for lines in (self.failures, self.notes) if lines]
        parts += [table.markdown() for table in self.tables if table.rows]
        parts += [f"```\n{self.error.strip()}\n```"] if self.error else []
        return "\n\n".join(parts)


def section_of(values: dict[str, Any]) -> Section:
    """What `dataclasses.asdict` made of a section."""
    return Section(**{**values, "tables": [Table(**table) for table in values["tables"]]})


def markdown(title: str, sections: Sequence[Section]) -> str:
    return "\n\n".join([f"# {title}", *(section.markdown() for section in sections)]) + "\n"


def as_json(title: str, sections: Sequence[Section]) -> dict[str, Any]:
    return {"title": title, "sections": [asdict(section) for section in sections]}


def shown(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return "" if cell is None else cell.replace("|", "/").replace("\n", " ")
