import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_cache.bench.common.processes import spread
from hybrid_cache.errors import HybridCacheError


def doubled(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return 2 * number


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_with_the_numbers_of_their_items(jobs: int) -> None:
    assert sorted(spread(doubled, [5, 6, 7], jobs)) == [(0, 10), (1, 12), (2, 14)]


def test_an_error_in_a_process_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(spread(doubled, [1, -1], 2))


def killed(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_in_one_line() -> None:
    with pytest.raises(HybridCacheError, match="one of 2 processes was killed"):
        list(spread(killed, [1, 2, 3], 2))


WORKER = """
import os, signal, sys, time
from pathlib import Path
from hybrid_cache.bench.common.processes import spread

def stay(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(300)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
    list(spread(stay, [1, 2], 2))
"""


def until(condition, seconds: float = 60.0) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def is_running(pid: int) -> bool:
    """Not one that has ended and is still listed. It may go while it is looked at."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone meanwhile, or a system without /proc
        return not Path("/proc/self").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_no_process_outlives_the_one_that_started_it(how: str, tmp_path: Path) -> None:
    script, started = tmp_path / "work.py", tmp_path / "started"
    started.mkdir()
    script.write_text(WORKER)
    with subprocess.Popen([sys.executable, str(script), str(started)], stderr=subprocess.DEVNULL) as parent:
        try:
            assert until(lambda: len(list(started.iterdir())) == 2)
            parent.send_signal(getattr(signal, how))
            workers = [int(file.name) for file in started.iterdir()]
            assert until(lambda: not any(map(is_running, workers)), 20.0)
            assert parent.wait(20) != 0
        finally:
            parent.kill()
