"""Runs pytest in a forked child for each line of its input, so that torch is imported once for all mutants.

To be started in the tree that is to be tested: python -m tests.mutants.server LOG. A request is {"targets": [...],
"timeout_s": 300}; an answer is what `Answer` holds. LOG has what pytest said last.
"""

import json
import os
import runpy
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch
import transformers

PRELOADED = (hypothesis, numpy, torch, transformers.BambaForCausalLM)
FIRST_EXAMPLE = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.shrink]  # that fails is enough
OPTIONS = (
    "-x",
    "-v",
    "-p",
    "no:cacheprovider",
    "-p",
    "hypothesispytest",
    "-p",
    "pytest_timeout",
    "--hypothesis-seed=0",
)
QUICK = ("-m", "not slow")  # what `make test` runs is what has to notice


@dataclass(slots=True)
class Answer:
    """code: pytest's exit status, or why there is none: "hangs", "crashes", "wrong tree"."""

    code: int | str
    test: str  # the one that failed, or was the last to begin
    seconds: float


class FirstFailure:
    """Notes the first test, or file, that failed."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.test = self.test or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def run_tests(targets: list[str], timeout_s: float, log: str) -> Answer:
    begin = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        in_child(targets, log, writer)
    os.close(writer)
    try:
        in_time, _, _ = select.select([reader], [], [], timeout_s)
        said = os.read(reader, 1 << 16) if in_time else b""
    finally:
        os.close(reader)
        _end_group(child)
    seconds = time.monotonic() - begin
    if said:
        return Answer(*json.loads(said), seconds)
    return Answer("crashes" if in_time else "hangs", _last_begun(log), seconds)


def in_child(targets: list[str], log: str, writer: int) -> None:
    """Never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    noted = FirstFailure()
    try:
        code: int | str = int(pytest.main([*OPTIONS, *QUICK, *targets], plugins=[noted]))
        if not _is_ours("hybrid_cache"):
            code = "wrong tree"
        os.write(writer, json.dumps([code, noted.test]).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _is_ours(package: str) -> bool:
    """Whether what was imported under this name lies in the tree that is tested."""
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is None or Path(file).resolve().is_relative_to(Path.cwd().resolve())


def _end_group(child: int) -> None:
    """Ends a child and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _last_begun(log: str) -> str:
    tests = [line.split(" ")[0] for line in Path(log).read_text().splitlines() if "::" in line]
    return tests[-1] if tests else ""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # takes along the tests that run
    runpy.run_path("tests/conftest.py")  # what has to be in the environment before Triton is imported
    hypothesis.settings.register_profile("mutants", phases=FIRST_EXAMPLE, database=None)
    hypothesis.settings.load_profile("mutants")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(asdict(run_tests(request["targets"], request["timeout_s"], sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
