"""Which folder may import which, read off the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hybrid_cache

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

# The same for the rooms of `hybrid_cache`, and the modules beside them that only some may import.
ROOMS = {
    "cache": {"cache"},
    "choreography": {"cache", "choreography"},
    "scheduling": {"cache", "scheduling"},
    "storage": {"cache", "storage"},
    "device": {"cache", "choreography", "device", "storage", "work"},
    "engine": {"cache", "choreography", "device", "engine", "scheduling", "storage", "work"},
}
OTHERS = {*ROOMS, "work", "workflow"}
# And for those of `api`, beside which stand two files for programs that import them.
API_ROOMS = {
    "text": {"text"},
    "server": {"server", "text"},
    "cli": {"cli", "llm", "server", "text"},
    "workflow": {"workflow", "server", "text"},
    "llm": {"llm", "server", "text"},
    "ray": {"ray", "cli", "server", "text"},
}
NAMED = ROOT / "api" / "ray" / "__init__.py"  # `serve run` is given the name of a module with an application in it
OFFERS = ROOT / "hybrid_cache" / "__init__.py"  # tells type checkers what it gives when it is asked, from all folders


def python_files(folder: str) -> Iterator[Path]:
    """All of a folder's modules, in sub-packages too; a folder that it links to has its own."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT / folder):
            yield path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hybrid_cache" else ("hybrid_cache", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Under TYPE_CHECKING and in functions too; of the package itself those that run when it is imported."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if path == OFFERS else ast.walk(tree)
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(path: Path) -> Iterator[str]:
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "hybrid_cache":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "hybrid_cache"


def imports_of_files(root: Path = ROOT) -> dict[str, set[str]]:
    """Each module of ours, and those of ours that it imports, under TYPE_CHECKING and in functions too."""
    files = {module_of(path): path for folder in MAY_IMPORT for path in python_files(folder)}
    return {name: {m for m in _named(path) if m in files and m != name} for name, path in files.items()}


def _named(path: Path) -> Iterator[str]:
    """What a file imports: a module, or a name of a package that may be a module."""
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no such circle."""
    sorter = TopologicalSorter(imports)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle_in(imports_of_files()) == []


def test_a_planted_circle_is_seen() -> None:
    imports = imports_of_files()
    assert "hybrid_cache.cache.tree" in imports["hybrid_cache.cache.books"]
    imports["hybrid_cache.cache.tree"].add("hybrid_cache.cache.books")
    assert set(circle_in(imports)) >= {"hybrid_cache.cache.tree", "hybrid_cache.cache.books"}


def test_every_module_is_read() -> None:
    """Sub-packages too."""
    modules = imports_of_files().keys()
    assert modules >= {
        "hybrid_cache.choreography.plan",
        "hybrid_cache.cache.policies.base",
        "hybrid_cache.models.arch.llama",
    }


def test_what_decides_knows_no_torch() -> None:
    """Whatever decides holds integers."""
    modules = [module_of(path) for room in ("cache", "choreography") for path in python_files(f"hybrid_cache/{room}")]
    modules += ["hybrid_cache.work", "hybrid_cache.request", "hybrid_cache.sampling", "hybrid_cache.engine.scheduler"]
    assert len(modules) > 25
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_to_import_the_package_loads_nothing_heavy() -> None:
    code = "import sys, hybrid_cache; sys.exit(any(m.startswith(('torch', 'hybrid_cache.')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def room_of(module: str) -> str:
    """A room of `hybrid_cache`, or a module that stands beside them."""
    return module.split(".")[1] if "." in module else ""


def floors_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms lie below each other, by room; what `hybrid_cache` itself offers stands above all."""
    core = {name: found for name, found in imports.items() if layer_of(name) == "hybrid_cache" and room_of(name)}
    below: dict[str, set[str]] = {}
    for name, found in core.items():
        below.setdefault(room_of(name), set()).update(room_of(m) for m in found if m in core)
    floors: dict[str, int] = {}
    for room in TopologicalSorter({r: b - {r} for r, b in below.items()}).static_order():
        floors[room] = 1 + max((floors[b] for b in below.get(room, set()) - {room}), default=1)
    return floors


def test_rooms_lie_on_eight_floors_at_most() -> None:
    """The lowest one is that of the kernels."""
    floors = floors_of(imports_of_files())
    assert floors["workflow"] > floors["engine"] > floors["device"] > floors["choreography"] > floors["cache"] > 1
    assert max(floors.values()) <= 8


@pytest.mark.parametrize(
    ("path", "planted"),
    [("cache/tree.py", "device.arena"), ("choreography/plan.py", "work"), ("device/worker.py", "engine.scheduler")],
)
def test_a_planted_import_of_a_higher_room_is_seen(path: str, planted: str, tmp_path: Path) -> None:
    file = ROOT / "hybrid_cache" / path
    assert higher_imports(file, path.split("/")[0]) == []
    copy = tmp_path / file.name
    copy.write_text(f"from hybrid_cache.{planted} import x\n" + file.read_text())
    assert higher_imports(copy, path.split("/")[0]) == [f"hybrid_cache.{planted}"]


def higher_imports(path: Path, room: str) -> list[str]:
    """What a file of a room imports of rooms that do not lie below it."""
    return [
        module
        for module in imported_modules(path)
        if (other := module.split(".")[1:2]) and other[0] in OTHERS and other[0] not in ROOMS[room]
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(f"hybrid_cache/{room}")
        for module in higher_imports(path, room)
    ]
    assert not wrong


def wrong_in_api(room: str, imports: dict[str, set[str]]) -> list[str]:
    """What a room of `api` imports of `api`, but may not."""
    files = {name: found for name, found in imports.items() if name.split(".")[1:3] == ["api", room]}
    assert files
    return [
        f"{name} imports {module}"
        for name, found in files.items()
        for module in found
        if (parts := module.split("."))[1:2] == ["api"] and parts[2] not in API_ROOMS[room]
    ]


@pytest.mark.parametrize("room", API_ROOMS)
def test_a_room_of_the_api_imports_only_what_lies_below_it(room: str) -> None:
    assert wrong_in_api(room, imports_of_files()) == []


def test_a_planted_import_of_a_room_above_is_seen() -> None:
    imports = imports_of_files()
    imports["hybrid_cache.api.text.answer"].add("hybrid_cache.api.server.serving")
    assert wrong_in_api("text", imports) == ["hybrid_cache.api.text.answer imports hybrid_cache.api.server.serving"]


def test_every_file_of_the_api_stands_in_a_room() -> None:
    assert {module_of(path).split(".")[2] for path in python_files("api")} == set(API_ROOMS)


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
    assert set((ROOT / folder).rglob("__init__.py")) <= {NAMED}


def test_what_users_import_is_at_the_top() -> None:
    assert {"LLM", "Engine", "EngineConfig", "Prompt", "Request", "SamplingParams", "Workflow", "errors"} <= set(
        dir(hybrid_cache)
    )
    for name in hybrid_cache.__all__:
        assert getattr(hybrid_cache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = hybrid_cache.Motor  # type: ignore[attr-defined]
