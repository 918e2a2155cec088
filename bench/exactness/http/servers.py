"""Server processes that end with the run that started them."""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from hybrid_cache.bench.common.http_client import ServerFailed, unreachable

START_S = 600.0
STOP_S = 20.0
TAIL_LINES = 20


# A server ends with the pipe that it reads from, so it never outlives a run that was killed.
PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
from hybrid_cache.api.cli.main import main
main()
"""


class Server:
    """A process that serves, and the file that it logs to."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    def url(self) -> str:
        """Waits until it listens. Raises ServerFailed when it ends before, or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"^curl (http://\S+)/v1/", self._log.read_text(errors="replace"), re.MULTILINE):
                return found[1]
            time.sleep(0.05)
        raise ServerFailed("the server did not start")

    def tail(self) -> str:
        """Its state, and the last lines of its log."""
        code = self.process.poll()
        state = "runs" if code is None else f"has ended with code {code}"
        return "\n".join(
            [f"it {state}; its last words:", *self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]]
        )


@contextmanager
def server(command: Sequence[str]) -> Iterator[Server]:
    """Starts a process that is ended when the block ends, however it ends.

    Raises ServerFailed where the block does, with the process's log added.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        started = Server(process, log)
        with process:
            try:
                yield started
            except ServerFailed as error:
                raise ServerFailed(f"{error}\n{' '.join(command[3:])}: {started.tail()}") from error
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


async def evictions_and_preemptions(http: httpx.AsyncClient) -> tuple[int, int]:
    """Evictions and preemptions of a server so far."""
    try:
        response = await http.get("/metrics")
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    sums = Counter[str]()
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            sums[sample.name] += int(sample.value)
    return sums["hybrid_cache_evictions_total"], sums["hybrid_cache_preemptions_total"]
