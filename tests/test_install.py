"""What `make` installs for whom, and what type checkers see of an editable install."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Notes how it was called. As `python -m venv .venv` it makes a folder with itself in it; as pip it says what it is told
INTERPRETER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/hybrid-cache ;;
    "-m pip config list") echo "$PIP_SETTINGS" ;;
    "-m pip show torch") echo "Requires: $TORCH_NEEDS" ;;
esac
"""
LINUX = """#!/bin/sh
test "$1" = -s && echo Linux || echo Linux x86_64
"""
USER = """
import hybrid_cache
from hybrid_cache.api.workflow import open_workflow
from hybrid_cache.models.loading import embedded_path

reveal_type(open_workflow())
path: str = embedded_path()
config: int = hybrid_cache.EngineConfig()
"""


class Checkout:
    """A folder with the files that decide what is installed, where nothing has been installed by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls, self._python = folder, folder / "calls", folder / "interpreter"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        for path, text in ((self._python, INTERPRETER), (folder / "uname", LINUX)):
            path.write_text(text)
            path.chmod(0o755)

    def make(self, *arguments: str, settings: str = ":env:.find-links='/wheels'", torch_needs: str = "") -> list[str]:
        """-> what was installed by pip, a line a call.

        settings: pip's; torch_needs: what the torch that was installed requires
        """
        self._calls.write_text("")
        environment = {**os.environ, "CALLS": str(self._calls), "MAKEFLAGS": "", "PIP_SETTINGS": settings}
        environment |= {"TORCH_NEEDS": torch_needs, "PATH": f"{self.folder}:{os.environ['PATH']}"}
        command = ["make", f"PYTHON={self._python}", f"DRIVER={self.folder}/driver", *arguments]
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True, timeout=60)
        marker = "-m pip install --quiet --disable-pip-version-check "
        return [line.partition(marker)[2] for line in self._calls.read_text().splitlines() if marker in line]

    def called(self, text: str) -> bool:
        return text in self._calls.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_server_gets_what_it_needs_and_no_more(checkout: Checkout) -> None:
    assert checkout.make("serve") == ["-c constraints.txt torch", "-c constraints.txt -e ."]
    assert checkout.called("hybrid-cache serve --host 127.0.0.1 --port 8000")


def test_tests_add_the_rest_to_it(checkout: Checkout) -> None:
    checkout.make("serve")
    added = checkout.make("test")
    assert added[0] == "-c constraints.txt -e .[bench,dev] triton==3.9.0"
    assert not any("torch" in each for each in added)
    assert checkout.called("-m pytest")


@pytest.mark.parametrize(("first", "second"), [("serve", "serve"), ("test", "test"), ("test", "serve")])
def test_a_second_time_nothing_is_installed(checkout: Checkout, first: str, second: str) -> None:
    assert checkout.make(first)
    assert checkout.make(second) == []


def test_what_is_needed_is_installed_again_when_it_changes(checkout: Checkout) -> None:
    checkout.make("test")
    os.utime(checkout.folder / "constraints.txt")
    assert "-c constraints.txt -e .[bench,dev] triton==3.9.0" in checkout.make("test")


def test_torch_for_cuda_brings_a_triton_of_its_own(checkout: Checkout) -> None:
    """Which one, it says itself: a constraint of ours would make it impossible to install."""
    installed = checkout.make("install", torch_needs="filelock, triton")
    assert "-c constraints.txt -e .[bench,dev]" in installed
    assert not [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton")]


def test_torch_may_come_from_elsewhere(checkout: Checkout) -> None:
    first, second = checkout.make("serve", "TORCH_INDEX=https://wheels.example/cpu")
    assert first == "-c constraints.txt --extra-index-url https://wheels.example/cpu torch"
    assert "wheels.example" not in second


def test_without_a_gpu_torch_is_a_build_for_cpus(checkout: Checkout) -> None:
    first = checkout.make("serve", settings="global.timeout='60'")[0]
    assert first == "-c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch"


def test_with_a_driver_torch_is_what_pip_finds(checkout: Checkout) -> None:
    (checkout.folder / "driver").mkdir()
    assert checkout.make("serve", settings="")[0] == "-c constraints.txt torch"


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment where this tree alone is installed, in editable form."""
    folder = tmp_path_factory.mktemp("editable")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}  # setuptools, to build with
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "-e", ROOT], env=environment, cwd=folder, check=True, timeout=120
    )
    return python


def test_an_editable_install_has_types(editable: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--python-executable", editable, "--cache-dir", tmp_path / "cache"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [*command, "user.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert 'Revealed type is "hybrid_cache.workflow.Workflow"' in done.stdout, done.stdout + done.stderr
    assert 'user.py:7: error: Incompatible types in assignment (expression has type "Path"' in done.stdout
    assert 'user.py:8: error: Incompatible types in assignment (expression has type "EngineConfig"' in done.stdout
    assert "Found 2 errors" in done.stdout


def test_an_editable_install_has_one_import_root(editable: Path, tmp_path: Path) -> None:
    code = """
from importlib.util import find_spec
found = [name for name in ("api", "bench", "kernels", "models", "tests") if find_spec(name)]
print(found, find_spec("hybrid_cache.api.workflow").origin)
"""
    done = subprocess.run([editable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"[] {ROOT}/src/hybrid_cache/api/workflow.py\n", done.stderr
