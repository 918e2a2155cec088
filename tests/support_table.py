"""Which architecture does what, from test results.

    python -m tests.support_table [--write docs/models.md]

Runs the tests of tests/models, prints a table with a line for each architecture, and puts it between the two markers of
a file. A cell says yes when all tests behind it pass, and otherwise how many fail.
"""

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers

from hybrid_cache.models import loading, registry
from hybrid_cache.models.shapes import ways_to_compose
from tests.models.case import Case, all_cases

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- architectures: python -m tests.support_table --write docs/models.md -->", "<!-- end -->"
# Which tests stand behind a column.
COLUMNS = {
    "loads": ("test_describe_agrees_with_the_loaded_model",),
    "parity": (
        "test_packed_prompts_of_unequal_lengths_give_the_logits_of_transformers",
        "test_batched_decoding_chooses_the_tokens_that_transformers_would",
    ),
    "prefix reuse": ("test_a_longer_conversation_goes_on_where_the_shorter_one_ended",),
    "branch reuse": ("test_an_edited_conversation_goes_on_from_the_last_message_that_is_the_same",),
    "exact": (
        "test_resuming_from_any_captured_tile_is_the_same_as_one_pass",
        "test_neighbours_in_the_batch_do_not_change_bits",
        "test_a_busy_server_gives_the_bits_of_a_plain_one",
    ),
}
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"  # what this file needs is imported before pytest starts
Cell = tuple[str, str]  # model_type and column


class Results:
    """A pytest plugin that counts what passed and what did not, by architecture and column."""

    def __init__(self) -> None:
        self.passed: Counter[Cell] = Counter()
        self.failed: Counter[Cell] = Counter()
        self._cells: dict[str, Cell] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        column = next((c for c, tests in COLUMNS.items() if item.originalname in tests), None)  # type: ignore[attr-defined]
        if isinstance(case, Case) and column is not None:
            self._cells[item.nodeid] = model_type(case), column

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._cells]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self._cells[report.nodeid]
        if report.failed:
            self.failed[cell] += 1
        elif report.when == "call" and report.passed:
            self.passed[cell] += 1


def model_type(case: Case) -> str:
    return str(getattr(transformers, case.config_class).model_type)


def table(results: Results) -> str:
    """One line for each architecture that has a test."""
    names = list(dict.fromkeys(model_type(case) for case in all_cases()))
    lines = [
        "| architecture | " + " | ".join(COLUMNS) + " | choreography possible | CPU | GPU |",
        "|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name in sorted(names):
        cells = [_cell(results, name, column) for column in COLUMNS]
        cpu = "yes" if all(cell == "yes" for cell in cells) else "in part"
        lines.append(f"| {_title(name)} | {' | '.join(cells)} | {_modes(name)} | {cpu} | not yet |")
    return "\n".join(lines)


def _cell(results: Results, name: str, column: str) -> str:
    passed, failed = results.passed[name, column], results.failed[name, column]
    if failed:
        return f"{failed} of {passed + failed} fail"
    return "yes" if passed else "-"


def _title(name: str) -> str:
    """What the file of an architecture calls it."""
    name = registry.ALIASES.get(name, name)
    doc = ast.get_docstring(ast.parse((ROOT / "models" / f"{name}.py").read_text())) or name
    return f"{doc.split(':')[0].splitlines()[0]} (`{name}`)"


def _modes(name: str) -> str:
    """What a choreography may do with this architecture's layers, beside going on from a checkpoint."""
    case = next(case for case in all_cases() if model_type(case) == name)
    config = getattr(transformers, case.config_class)(**case.settings).to_dict()
    return ", ".join(("exact", *ways_to_compose(loading.describe(config).shape)))


def write(text: str, path: Path) -> None:
    """Puts the table between the markers of a file."""
    content = path.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file that holds the table")
    parser.add_argument("-k", help="only tests that match, as for pytest")
    given = parser.parse_args()
    results = Results()
    chosen = ["-k", given.k] if given.k else []
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-W", IMPORTED, *chosen, str(ROOT / "tests/models")], plugins=[results]
    )
    text = table(results)
    print(text)
    if given.write:
        write(text, given.write)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
