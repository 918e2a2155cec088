"""What a run over HTTP gave: numbers, what was mixed, and requests that differ."""

from collections import Counter
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Difference:
    """A request whose answer is not the one that the server without a cache gives. Bodies are as they were sent."""

    request: int  # from 0, in the order of sending
    phase: str
    what: str  # the first place in which they differ
    path: str
    body: Json
    plain_path: str
    plain_body: Json


@dataclass(slots=True)
class Counts:
    """Of one phase, or of all. An answer is one choice; tokens are those whose log-probabilities were compared."""

    name: str
    budget: str
    requests: int = 0
    compared: int = 0
    differing: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    preemptions: int = 0
    mixed: dict[str, int] = field(default_factory=dict)  # requests that had this, or ended so

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: getattr(self, name) + getattr(other, name) for name in NUMBERS}
        mixed = dict((Counter(self.mixed) + Counter(other.mixed)).most_common())
        return Counts(self.name, self.budget, **sums, mixed=mixed)


NUMBERS = {
    "requests": "requests",
    "compared": "answers compared",
    "differing": "answers that differ",
    "tokens": "tokens compared",
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "of these cached",
    "evictions": "evictions",
    "preemptions": "preemptions",
}


@dataclass(frozen=True, slots=True)
class HttpReport:
    """What a run over HTTP gave. `replay` is all that the server with a cache was sent up to the first difference."""

    model: str
    dtype: str
    seed: int
    seconds: float
    total: Counts
    phases: tuple[Counts, ...]
    differences: tuple[Difference, ...] = ()  # the first few
    replay: tuple[Json, ...] = ()

    @property
    def exact(self) -> bool:
        return self.total.compared > 0 and not self.total.differing

    @property
    def untried(self) -> tuple[str, ...]:
        """What a run should meet and this one did not."""
        names = ("compared", "cached_tokens", "evictions", "preemptions")
        return tuple(NUMBERS[name] for name in names if not getattr(self.total, name))


def table(report: HttpReport) -> Table:
    """A column for each phase, and one for the whole run."""
    out = Table(title=f"over HTTP, cache on against cache off: {report.model} {report.dtype}, seed {report.seed}")
    out.box, out.caption = box.SIMPLE_HEAD, _verdict(report)
    columns = [*report.phases, report.total]
    out.add_column("")
    for column in columns:
        out.add_column(column.name, justify="right")
    out.add_row("budget", *(column.budget for column in columns))
    for name, shown in NUMBERS.items():
        out.add_row(shown, *(f"{getattr(c, name):,}" for c in columns), end_section=name == "preemptions")
    for name in report.total.mixed:
        out.add_row(name, *(f"{c.mixed.get(name, 0):,}" for c in columns))
    return out


def _verdict(report: HttpReport) -> str:
    lines = ["Every answer that was not labelled approximate is equal."]
    if not report.exact:
        lines = [f"NOT EXACT: {report.total.differing:,} answers differ.", *(d.what for d in report.differences[:1])]
    lines += [f"NOT TRIED: {name}, there were none." for name in report.untried]
    return "\n".join([*lines, f"{report.seconds:.0f} s"])
