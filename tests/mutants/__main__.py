"""`python -m tests.mutants`: would the tests notice one-line faults in the core?

Applies each fault of the table, one at a time, to a copy of the tree, and runs the tests that ought to notice it there.
Ends with 1 if the tests fail without any fault, if the table is out of step with the code, or if too many survive.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.mutant import Mutant, out_of_step
from tests.mutants.table import MUTANTS
from tests.mutants.workshop import Workshop

LEAST_KILLED = 0.95
FAILED, INTERRUPTED = 1, 2  # exit statuses of pytest: a test failed, or could not be read
BROKEN = {FAILED: "killed", INTERRUPTED: "killed", "hangs": "killed (hangs)", "crashes": "killed (crashes)"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant: killed in one way or another, survived, or nothing that says anything."""

    mutant: Mutant
    found: str
    test: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.found.startswith("killed")

    def __str__(self) -> str:
        by = f" by {self.test}" if self.killed else f" ({self.mutant.equivalent})" if self.mutant.equivalent else ""
        return f"{self.found:8} {self.mutant.name}{by} ({self.seconds:.0f} s)"


def judge(workshop: Workshop, mutant: Mutant, timeout_s: float) -> Verdict:
    answer = workshop.run_mutant(mutant, timeout_s)
    found = "survived" if answer.code == 0 else BROKEN.get(answer.code, f"no verdict: pytest ended with {answer.code}")
    return Verdict(mutant, found, answer.test, answer.seconds)


def judge_all(workshops: Sequence[Workshop], mutants: Sequence[Mutant], timeout_s: float) -> Iterator[Verdict]:
    """In the order of the mutants, as many at a time as there are workshops."""
    free: SimpleQueue[Workshop] = SimpleQueue()
    for workshop in workshops:
        free.put(workshop)

    def work(mutant: Mutant) -> Verdict:
        workshop = free.get()
        try:
            return judge(workshop, mutant, timeout_s)
        finally:
            free.put(workshop)

    with ThreadPoolExecutor(len(workshops)) as pool:
        yield from pool.map(work, mutants)


def all_targets(mutants: Sequence[Mutant]) -> list[str]:
    """Each once; no single tests of a file that is run as a whole."""
    targets = list(dict.fromkeys(target for mutant in mutants for target in mutant.targets))
    return [target for target in targets if "::" not in target or target.split("::")[0] not in targets]


def report(console: Console, verdicts: Sequence[Verdict]) -> bool:
    """Prints the summary -> whether enough of the mutants were killed, and all have a verdict."""
    alive = [v for v in verdicts if not v.killed]
    counted = [v for v in verdicts if v.killed or not v.mutant.equivalent]
    num_killed = sum(v.killed for v in counted)
    for verdict in alive:
        console.print(f"  {verdict}", markup=False, highlight=False)
    share = num_killed / max(len(counted), 1)
    console.print(f"{num_killed} of {len(counted)} killed ({share:.0%}), {len(verdicts) - len(counted)} are equivalent")
    return share >= LEAST_KILLED and not any(v.found.startswith("no verdict") for v in verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="mutants whose file or fault has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts here")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree that work at the same time (1)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for the tests of one mutant (300)")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    mutants = [m for m in MUTANTS if options.only in m.name or options.only in m.file]
    wrong = list(out_of_step(mutants))
    for line in wrong if wrong else [m.name for m in mutants] if options.list else []:
        console.print(line, markup=False, highlight=False)
    if wrong or options.list or not mutants:
        return int(bool(wrong or not mutants))
    return run(console, mutants, options.jobs, options.timeout, options.json)


def run(console: Console, mutants: Sequence[Mutant], num_jobs: int, timeout_s: float, file: Path | None) -> int:
    verdicts = []
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(TemporaryDirectory())) for _ in range(num_jobs)]
        workshops = [stack.enter_context(Workshop(folder)) for folder in folders]
        targets = all_targets(mutants)
        with console.status(f"without a mutant: {len(targets)} targets"):
            plain = workshops[0].run(targets, len(mutants) * timeout_s)
        if plain.code != 0:
            console.print(f"{workshops[0].log}\nthe tests do not pass without a mutant", markup=False, highlight=False)
            return 1
        console.print(f"without a mutant all tests pass ({plain.seconds:.0f} s)")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("mutants", total=len(mutants))
            for verdict in judge_all(workshops, mutants, timeout_s):
                verdicts.append(verdict)
                progress.console.print(str(verdict), markup=False, highlight=False)
                progress.advance(task)
                if file is not None:
                    file.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return 0 if report(console, verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
