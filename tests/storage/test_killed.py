"""A short run of the soak of the disk tier: kills at random moments, damage, a full disk. See `tests.soak.disk`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_processes_that_are_killed_leave_nothing_that_is_wrong(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.soak.disk", "--kills", "4", "--bits", "300"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    assert int(counted["killed"]) >= 4
    assert int(counted["bits noticed"]) == 300
