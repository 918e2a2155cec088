"""A server process for a soak, `hybrid-cache serve` as people start it, and what it counts of itself."""

import http.client
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()", "serve", "--port", "0")
DEFAULTS = ("--budget", "64MiB", "--threads", "1", "--drain-timeout", "2")
KEYS = ("alice-of-the-soak", "bob-of-the-soak")
START_S = 120
_GREETING = re.compile(r"^curl http://127\.0\.0\.1:(\d+)/", re.MULTILINE)
_SAMPLE = re.compile(r"^hybrid_cache_(\w+)(?:\{kind=\"(\w+)\"\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Server:
    """A running process; `log` is its error stream."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    keys: tuple[str, ...] = ()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def key(self) -> str:
        """Of the first tenant; empty if none is needed."""
        return self.keys[0] if self.keys else ""


@contextmanager
def serve(options: Sequence[str] = (), *, keys: Sequence[str] = KEYS, max_files: int = 0) -> Iterator[Server]:
    """max_files: `ulimit -n`   Raises RuntimeError if it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*PROGRAM, *DEFAULTS, *options]
        if keys:
            key_file = Path(folder, "keys")
            key_file.write_text("".join(f"{key}\n" for key in keys))
            command += ["--api-key-file", str(key_file)]
        if max_files:
            command = ["sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh", *command]
        log = Path(folder, "log")
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT) as process:
            try:
                yield Server(process, _port(process, log), log, tuple(keys))
            finally:
                process.kill()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Waits until the server has greeted and is ready."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if (found := _GREETING.search(log.read_text())) and get(int(found[1]), "/ready")[0] == 200:
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError("the server did not start: " + log.read_text())


def get(port: int, path: str, *, key: str = "", timeout_s: float = 60.0) -> tuple[int, bytes]:
    """-> status and body; status 0 without an answer. A connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def metrics(port: int, *, key: str = "", timeout_s: float = 60.0) -> Mapping[str, float]:
    """What the server counts: `requests_running`, `cache_bytes.working` by kind; empty without an answer."""
    text = get(port, "/metrics", key=key, timeout_s=timeout_s)[1].decode()
    return {f"{name}.{kind}" if kind else name: float(value) for name, kind, value in _SAMPLE.findall(text)}


def resident_mib(pid: int) -> float:
    """Memory that a process has, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def num_files(pid: int) -> int:
    """Files and sockets that a process has open."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def cpu_seconds(pid: int) -> float:
    """Of a process, with the system's part."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
