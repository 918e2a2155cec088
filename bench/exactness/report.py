"""What `hybrid-cache bench exactness` has found, and how it is shown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from rich import box
from rich.table import Table

from hybrid_cache.bench.exactness.origins import Behind

SHOWN = 5  # findings of one model


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be. The same command computes it again, up to this round."""

    round: int
    request: str  # id, or what else it belongs to
    what: str


@dataclass(slots=True)
class Compared:
    """Some rows, and what differed in them."""

    rows: int = 0
    differing_rows: int = 0
    differing_bits: int = 0


@dataclass(slots=True)
class Report:
    """What one model and dtype gave. A row is the logits of one token."""

    model: str
    dtype: str
    seed: int
    rows: int = 0  # of busy engines, compared
    differing_rows: int = 0
    differing_bits: int = 0
    unknown_rows: int = 0  # of busy engines, that no plain run computed: their tokens had already diverged
    answers: int = 0  # choices compared token by token, with log-probabilities
    differing_answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    received_tokens: int = 0  # whose entries were made from another model's
    behind: dict[Behind, Compared] = field(default_factory=lambda: {kind: Compared() for kind in Behind})
    mixed: Counter[str] = field(default_factory=Counter)  # what the busy engines met, by name
    needed: tuple[str, ...] = ("preemptions", "evictions")  # names without which a run proves nothing
    findings: list[Finding] = field(default_factory=list)  # the first ones

    @property
    def exact(self) -> bool:
        """Nothing was found. See `untried` for what that is worth."""
        return not (self.differing_rows or self.unknown_rows or self.differing_answers or self.findings)

    @property
    def untried(self) -> tuple[str, ...]:
        """What a run has to meet and this one did not."""
        met = self.mixed + Counter({kind.value: compared.rows for kind, compared in self.behind.items()})
        return tuple(name for name in self.needed if not met[name])

    def note(self, request: str, what: str) -> None:
        """Keeps a finding of the present round, if it is one of the first."""
        if len(self.findings) < SHOWN:
            self.findings.append(Finding(self.rounds, request, what))

    def as_json(self) -> dict[str, object]:
        behind = {kind.value: asdict(compared) for kind, compared in self.behind.items()}
        plain = asdict(replace(self, mixed=Counter(), behind={}))
        return {**plain, "behind": behind, "mixed": dict(self.mixed), "exact": self.exact}


def results(reports: Iterable[Report]) -> Table:
    """A line for each model and dtype."""
    table = Table(title="cache on against cache off", box=box.SIMPLE_HEAD)
    columns = ["model", "dtype", "rows", "differing rows", "differing bits", "unknown rows", "answers"]
    columns += ["differing answers", "tokens reused", "evictions", "preemptions", "rows a second"]
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for r in reports:
        counts = (r.rows, r.differing_rows, r.differing_bits, r.unknown_rows, r.answers, r.differing_answers)
        reused = f"{r.cached_tokens / max(r.prompt_tokens, 1):.0%}"
        more = (r.mixed["evictions"], r.mixed["preemptions"], round(r.rows / max(r.seconds, 1e-9)))
        table.add_row(r.model, r.dtype, *(f"{c:,}" for c in counts), reused, *(f"{c:,}" for c in more))
    return table


def shared(reports: Sequence[Report]) -> Table:
    """A line for each model and dtype, and one for all: rows that go on from what models share, counted apart."""
    table = Table(title="rows that go on from what models share", box=box.SIMPLE_HEAD)
    columns = ["model", "dtype", "tokens received"]
    columns += [name for kind in Behind for name in (kind.value, "differing bits")]
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    lines = [(r.model, r.dtype, _shared(r)) for r in reports]
    lines.append(("in all", "", [sum(column) for column in zip(*(line for *_, line in lines), strict=True)]))
    for model, dtype, counts in lines:
        table.add_row(model, dtype, *(f"{count:,}" for count in counts))
    return table


def _shared(report: Report) -> list[int]:
    counts = (n for each in report.behind.values() for n in (each.rows, each.differing_bits))
    return [report.received_tokens, *counts]


def mixture(reports: Sequence[Report]) -> Table:
    """What all runs met together, and the one that met least of it."""
    table = Table(title="what was mixed", box=box.SIMPLE_HEAD)
    for column in ("", "in all", "in one run at least"):
        table.add_column(column, justify="right" if column else "left")
    total: Counter[str] = sum((r.mixed for r in reports), Counter())
    for name in sorted(total):
        table.add_row(name, f"{total[name]:,}", f"{min(r.mixed[name] for r in reports):,}")
    return table


def verdicts(reports: Iterable[Report], options: str) -> list[str]:
    """What is to be said below the tables. options: of the command, so that a run can be repeated."""
    lines = []
    for r in reports:
        where = f"{r.model} {r.dtype}"
        lines += [f"PROVES NOTHING: {where} met no {name}" for name in r.untried]
        lines += [f"NOT EXACT: {where} seed {r.seed} round {f.round} {f.request}: {f.what}" for f in r.findings]
        if not r.exact:
            again = f"--dtype {r.dtype} --seed {r.seed} --rows {r.rows + 1}"
            lines.append(f"again: hybrid-cache bench exactness '{r.model}' {again}{options}")
    return lines
