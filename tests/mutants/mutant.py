"""A one-line fault, and how to tell whether a table of them is in step with the code."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: `old`, which the file holds exactly once, becomes `new`."""

    file: str
    fault: str  # what goes wrong, in words
    old: str
    new: str
    targets: tuple[str, ...]  # of pytest: files or single tests, the quickest first
    equivalent: str = ""  # why no test can notice, if that is so

    @property
    def name(self) -> str:
        return f"{Path(self.file).stem}: {self.fault}"

    def applied(self, source: str) -> str:
        return source.replace(self.old, self.new)


def tests_of(file: str, *names: str) -> tuple[str, ...]:
    """Single tests of a file as targets, named without their `test_`."""
    return tuple(f"{file}::test_{name}" for name in names)


def out_of_step(mutants: Iterable[Mutant], root: Path = ROOT) -> Iterator[str]:
    """What has to be put right in the table before it says anything about this tree."""
    for mutant in mutants:
        source = (root / mutant.file).read_text()
        count = source.count(mutant.old)
        if count != 1:
            yield f"{mutant.name}: found {count} times: {mutant.old!r}"
        elif not _compiles(mutant.applied(source)):
            yield f"{mutant.name}: is no Python: {mutant.new!r}"
        yield from (f"{mutant.name}: no test {target}" for target in mutant.targets if not _exists(root, target))


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _exists(root: Path, target: str) -> bool:
    """Whether there is such a file, and such a function in it. Its parameters are not looked at."""
    file, *rest = target.split("::")
    path = root / file
    return path.is_file() and all(f"def {name.split('[')[0]}(" in path.read_text() for name in rest)
