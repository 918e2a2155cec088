"""Which folder may import which, read off the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "models", "api", "bench")
# A folder imports itself and those named here. `api` reaches `bench` only by name, when a bench command is run.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "hybrid_cache": {"hybrid_cache", "kernels"},
    "models": {"hybrid_cache", "kernels", "models"},
    "api": {"hybrid_cache", "kernels", "models", "api"},
    "bench": {"hybrid_cache", "kernels", "models", "api", "bench"},
}


def python_files(folder: str) -> Iterator[Path]:
    pattern = "*.py" if folder == "hybrid_cache" else "**/*.py"
    yield from sorted((ROOT / folder).glob(pattern))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "hybrid_cache":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "hybrid_cache"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(folder)
        for module in imported_modules(path)
        if (layer := layer_of(module)) and layer not in MAY_IMPORT[folder]
    ]
    assert not wrong


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tests"])
def test_nobody_imports_a_linked_folder_by_its_bare_name(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module in imported_modules(path)
        if module.split(".")[0] in LINKED
    ]
    assert not wrong


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_are_relative_links_without_an_init_file(folder: str) -> None:
    link = ROOT / "hybrid_cache" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert not list((ROOT / folder).rglob("__init__.py"))
