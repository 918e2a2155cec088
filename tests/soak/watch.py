"""A process that watches a server from outside, so that a busy client does not slow what it measures.

`/health` is asked every 50 ms on a new connection, as a liveness probe does. The probe waits for its answer: a stall
of one second counts as the twenty probes that it has kept from being sent.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.soak.server import ROOT, Server, get, metrics, num_files, resident_mib

PROBE_S = 0.05
SAMPLE_S = 0.5
PATIENCE_S = 1.0  # after which a probe counts though its answer may still come


@dataclass(frozen=True, slots=True)
class Probe:
    """One question for the health of the server."""

    begun: float  # time.monotonic(), the same in all processes
    seconds: float
    status: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The server as the system and `/metrics` show it."""

    taken: float
    resident_mib: float
    num_files: int
    metrics: dict[str, float]  # empty if it did not answer


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds until the server said how it is."""

    p50: float
    p99: float
    longest: float
    unanswered: int

    @staticmethod
    def of(probes: list[Probe]) -> "Latencies":
        seconds = sorted(s for probe in probes for s in _with_those_it_delayed(probe.seconds)) or [0.0]
        unanswered = sum(not probe.status for probe in probes)
        return Latencies(median(seconds), seconds[int(len(seconds) * 0.99)], seconds[-1], unanswered)

    def __str__(self) -> str:
        return f"p50 {self.p50:.3f} p99 {self.p99:.3f} max {self.longest:.3f} s, {self.unanswered} unanswered"


def _with_those_it_delayed(seconds: float) -> Iterator[float]:
    while seconds > 0:
        yield seconds
        seconds -= PROBE_S


class Watch:
    """What a watcher has written so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _lines(self) -> Iterator[tuple[str, list[float]]]:
        for line in self._path.read_text().split("\n")[:-1]:
            kind, values = json.loads(line)
            yield kind, values

    def probes(self, begin: float = 0.0, end: float = float("inf")) -> list[Probe]:
        """Those whose answer was awaited between two moments."""
        found, asked = [], 0.0
        for kind, values in self._lines():
            if kind == "ask":
                asked = values[0]
            elif kind == "probe":
                found.append(Probe(asked, values[0], int(values[1])))
                asked = 0.0
        if asked and (waited := time.monotonic() - asked) > PATIENCE_S:
            found.append(Probe(asked, waited, 0))  # has no answer so far
        return [p for p in found if p.begun < end and p.begun + p.seconds > begin]

    def health(self, begin: float = 0.0, end: float = float("inf")) -> Latencies:
        return Latencies.of(self.probes(begin, end))

    def samples(self, begin: float = 0.0, end: float = float("inf")) -> list[Sample]:
        found = [Sample(*values) for kind, values in self._lines() if kind == "sample"]  # type: ignore[arg-type]
        return [s for s in found if begin <= s.taken <= end]


def growth_after_warm_up(samples: list[Sample]) -> float:
    """By what factor resident memory grew from the third sixth of the time to the last, medians: 1 is flat."""
    sixth = max(len(samples) // 6, 1)
    early = [s.resident_mib for s in samples[2 * sixth : 3 * sixth] or samples[:1]]
    late = [s.resident_mib for s in samples[-sixth:]]
    return median(late) / median(early) if early and median(early) else 0.0


@contextmanager
def watching(server: Server) -> Iterator[Watch]:
    with tempfile.NamedTemporaryFile(suffix=".watch") as file:
        command = [sys.executable, "-m", "tests.soak.watch", str(server.port), str(server.pid), server.key]
        with subprocess.Popen(command, stdout=file, cwd=ROOT) as process:
            watch = Watch(Path(file.name))
            try:
                while not watch.probes() and process.poll() is None:
                    time.sleep(0.02)
                yield watch
            finally:
                process.terminate()


def _probe_for_ever(port: int) -> None:
    due = time.monotonic()
    while True:
        begun = time.monotonic()
        _write("ask", begun)
        status, _ = get(port, "/health")
        _write("probe", time.monotonic() - begun, status)
        due = max(due + PROBE_S, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))


def _sample_for_ever(port: int, pid: int, key: str) -> None:
    while True:
        _write("sample", time.monotonic(), resident_mib(pid), num_files(pid), metrics(port, key=key, timeout_s=5))
        time.sleep(SAMPLE_S)


def _write(kind: str, *values: object) -> None:
    print(json.dumps([kind, values]) + "\n", end="", flush=True)


if __name__ == "__main__":
    threading.Thread(
        target=_sample_for_ever, args=(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), daemon=True
    ).start()
    _probe_for_ever(int(sys.argv[1]))
