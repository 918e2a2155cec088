"""The table of architectures is where the command that writes it looks for it, and has all of them."""

from hybrid_cache.models import registry
from tests.docs.pages import ROOT
from tests.models.case import all_cases
from tests.support_table import BEGIN, END, model_type, write

PAGE = ROOT / "docs" / "models.md"


def test_every_architecture_with_a_test_has_a_line() -> None:
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    names = {model_type(case) for case in all_cases()}
    assert len(names) == table.count("\n| ") - 1
    assert all(f"(`{registry.ALIASES.get(name, name)}`)" in table for name in names)


def test_a_new_table_takes_the_place_of_the_old_one(tmp_path) -> None:
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text())
    write("| new |", page)
    before, after = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    assert page.read_text() == f"{before}{BEGIN}\n| new |\n{END}{after}"
