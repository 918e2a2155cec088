"""A copy of the tree in a scratch folder, and a process that runs tests in it. The tree itself is never written to."""

import compileall
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.server import Answer

LEFT_OUT = ("__pycache__", "*.egg-info", "build", "dist", "scratch", ".*")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # reading plugins takes longer than most tests here
}


class Workshop:
    """Runs tests on a copy of the tree as it is, or with one mutant applied."""

    def __init__(self, scratch: Path) -> None:
        self.tree, self._log = scratch / "tree", scratch / "log"
        shutil.copytree(ROOT, self.tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        # A mutant may have the size and, to the second, the age of what it replaces: bytecode goes by the content.
        by_content = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self.tree, quiet=1, invalidation_mode=by_content)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.server", str(self._log)],
            cwd=self.tree,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._server:
            self._server.terminate()

    @property
    def log(self) -> str:
        """What pytest said last."""
        return self._log.read_text()

    def run(self, targets: Sequence[str], timeout_s: float) -> Answer:
        """Tests the copy as it is."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps({"targets": targets, "timeout_s": timeout_s}), file=self._server.stdin, flush=True)
        return Answer(**json.loads(self._server.stdout.readline()))

    def run_mutant(self, mutant: Mutant, timeout_s: float) -> Answer:
        """Tests the copy with one mutant, and puts it right again."""
        path = self.tree / mutant.file
        source = path.read_text()
        path.write_text(mutant.applied(source))
        try:
            return self.run(mutant.targets, timeout_s)
        finally:
            path.write_text(source)
