"""The table of faults is in step with the code, and a fault in a copy is found there and nowhere else."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.__main__ import Verdict, all_targets
from tests.mutants.mutant import ROOT, Mutant, out_of_step
from tests.mutants.table import MUTANTS
from tests.mutants.workshop import Workshop


def test_each_mutant_replaces_one_place_and_is_python_and_has_tests() -> None:
    assert list(out_of_step(MUTANTS)) == []


def test_each_fault_is_named_once_and_changes_something() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert [mutant.name for mutant in MUTANTS if mutant.old == mutant.new or not mutant.targets] == []


FILE = "tests/mutants/mutant.py"


@pytest.mark.parametrize(
    ("old", "new", "target", "problem"),
    [
        ("no such text, " * 2, "", "tests/test_mutants.py", "found 0 times"),
        ("def ", "def ", "tests/test_mutants.py", "found"),
        ("def _compiles(", "def (", "tests/test_mutants.py", "is no Python"),
        ("def _compiles(", "def _parses(", "tests/no_such_file.py", "no test tests/no_such_file.py"),
        ("def _compiles(", "def _parses(", "tests/test_mutants.py::test_nothing[1]", "no test"),
    ],
)
def test_a_table_that_is_out_of_step_is_told_apart(old: str, new: str, target: str, problem: str) -> None:
    (line,) = out_of_step([Mutant(FILE, "a fault", old, new, (target,))])
    assert line.startswith("mutant: a fault: ")
    assert problem in line


def test_single_tests_of_a_file_that_is_run_as_a_whole_are_not_named_too() -> None:
    targets = [("a.py::test_x", "b.py"), ("a.py", "c.py::test_y"), ("a.py::test_x", "c.py::test_y")]
    assert all_targets([Mutant(FILE, "", "", "", each) for each in targets]) == ["b.py", "a.py", "c.py::test_y"]


def test_a_survivor_says_why_it_may_survive() -> None:
    mutant = Mutant("a/b.py", "a fault", "old", "new", (), equivalent="nobody can tell")
    assert str(Verdict(mutant, "survived", "", 1.2)) == "survived b: a fault (nobody can tell) (1 s)"
    assert str(Verdict(mutant, "killed", "x.py::test", 1.2)) == "killed   b: a fault by x.py::test (1 s)"


LAYERING = ("tests/test_layering.py",)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory):
    with Workshop(tmp_path_factory.mktemp("workshop")) as made:
        yield made


@pytest.mark.slow
def test_tests_run_on_the_copy_and_the_tree_stays_as_it_is(workshop: Workshop) -> None:
    path = ROOT / "hybrid_cache/cache/lease.py"
    before = path.read_text()
    first = "import numpy as np\n"
    wrong = Mutant(
        "hybrid_cache/cache/lease.py",
        "imports what lies above it",
        first,
        f"{first}import hybrid_cache.api\n",
        LAYERING,
    )
    assert workshop.run(LAYERING, 100).code == 0
    found = workshop.run_mutant(wrong, 100)
    assert found.code == 1
    assert found.test == "tests/test_layering.py::test_a_folder_imports_only_what_lies_below_it[hybrid_cache]"
    assert workshop.run(LAYERING, 100).code == 0
    assert path.read_text() == before == (workshop.tree / "hybrid_cache/cache/lease.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import time; time.sleep(100)", "hangs"),
        ("import os; os._exit(3)", "crashes"),
        ("import sys, types; sys.modules['hybrid_cache'] = types.SimpleNamespace(__file__='/elsewhere')", "wrong tree"),
    ],
)
def test_a_test_that_does_not_end_is_named(workshop: Workshop, body: str, code: str) -> None:
    target = Path("tests/test_of_no_use.py")
    (workshop.tree / target).write_text(f"def test_one():\n    pass\n\ndef test_two():\n    {body}\n")
    found = workshop.run((str(target),), 6)
    assert (found.code, found.test) == (code, "" if code == "wrong tree" else f"{target}::test_two")
