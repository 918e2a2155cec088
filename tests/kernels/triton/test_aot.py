"""Kernels compile without a GPU, under the oldest and the newest Triton, and keep to their limits."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from hybrid_cache.kernels.triton_kernels import aot, matmul
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton brings a compiler for Linux on x86-64"
)

COMMAND = (sys.executable, "-W", "error", "-m", "hybrid_cache.kernels.triton_kernels.aot")
OLD_TRITON = Path(sys.prefix) / "triton-3.6.0"
# An old Triton has more to learn about new cards than about old ones.
RUNS = {"newest, sm_80": (None, 80), "newest, sm_90": (None, 90), "oldest, sm_90": (OLD_TRITON, 90)}


def start(packages, *arguments):
    """The command with a Triton in front of the installed one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """All runs at the same time."""
    folder = tmp_path_factory.mktemp("aot")
    running = {}
    for name, (packages, arch) in RUNS.items():
        if packages is None or packages.is_dir():
            table = folder / f"{name}.json"
            running[name] = (start(packages, "--arch", str(arch), "--json", str(table)), table)
    yield running
    for process, _ in running.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_all_kernels_compile_within_their_limits(processes, name):
    packages, arch = RUNS[name]
    if name not in processes:
        pytest.skip(f"no Triton in {packages}; make install puts it there")
    process, table = processes[name]
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, "\n".join(line for line in said.splitlines() if "BROKEN" in line) or said
    found = json.loads(table.read_text())
    assert found["triton"] == (triton.__version__ if packages is None else packages.name.removeprefix("triton-"))
    modules = {path.stem for path in Path(aot.__file__).parent.glob("*.py")} - {"__init__", "aot"}
    assert {*found["kernels"]} == modules
    assert all(found["kernels"].values()), "a module without SPECS"
    assert {resources["arch"] for rows in found["kernels"].values() for resources in rows} == {arch}


SMALL_MODULE = """
import triton
import triton.language as tl
from hybrid_cache.kernels.triton_kernels import aot

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, i < n), i < n)

TYPES = {"x": "*fp32", "y": "*fp32", "n": "i32:16"}
SPECS = [aot.Spec(double, TYPES, {"BLOCK": 1024}, limits={90: aot.Limit(registers=4, tensor_cores=True)})]
if __name__ == "__main__":
    aot.specs_by_module = lambda only: {"small": SPECS}
    raise SystemExit(aot.main(["--arch", "90"]))
"""


def test_a_broken_limit_is_named_and_ends_with_1(tmp_path):
    (tmp_path / "small.py").write_text(SMALL_MODULE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "small.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"sm_90 small\.double .*BROKEN: \d+ registers, limit 4; no tensor cores", done.stdout)


def test_in_the_interpreter_it_says_so():
    if not triton.knobs.runtime.interpret:
        pytest.skip("not in the interpreter")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot.compile_one(matmul.SPECS[0], 90)


def test_a_spec_says_what_is_missing():
    spec = Spec(matmul._combine_kernel, {"choices": "*bf16", "shades": "*fp32"}, {"WIDTH": 8, "BLOCK": 8})
    with pytest.raises(
        ValueError, match=r"no such arguments \['shades'\], no type for \['NUM_CHOICES', 'out', 'shares'\]"
    ):
        aot.signature_of(spec)
    assert spec.name == "_combine_kernel"
    assert spec.limit(90) == Limit()
