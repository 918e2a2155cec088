"""A real server process with the model in the package, for clients that know nothing of this project.

Nothing here imports it, so that clients may live in an environment of their own (`make conformance`):
HYBRID_CACHE_PYTHON then names the interpreter that serves.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

START_TIMEOUT_S = 60
SERVE = "from hybrid_cache.api.cli.main import main; main()"
MODEL = "embedded"
SYSTEM = "You look into the boxes, one after the other, and say what you find in each of them. " * 40
STEPS = 2  # of a loop with a tool
# What clients would otherwise look for, or send, on the internet.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    LANGSMITH_TRACING="false",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    LITELLM_TELEMETRY="False",
)


class Place(BaseModel, extra="forbid"):
    row: Literal["upper", "lower"]
    box: Literal[1, 2, 3]


class Find(BaseModel, extra="forbid"):
    """What was found, and where."""

    place: Place
    lamps: Literal[0, 1]


@contextmanager
def serving(log: Path, *options: str) -> Iterator[str]:
    """The address of a server process, which writes to `log`."""
    python = os.environ.get("HYBRID_CACHE_PYTHON", sys.executable)
    command = [python, "-c", SERVE, "serve", "--port", "0", "--budget", "64MiB", "--threads", "1", *options]
    with log.open("w") as out, subprocess.Popen(command, stderr=out, stdout=out) as process:
        try:
            yield _address(process, log)
        finally:
            process.kill()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits until the server is ready, and reads its address off the greeting."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if found := re.search(r"^curl (http://(\S+):(\d+))/v1/chat/completions", log.read_text(), re.MULTILINE):
            try:
                socket.create_connection((found[2], int(found[3])), 1).close()
                return found[1]
            except OSError:
                pass
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError("the server did not start: " + log.read_text())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No client looks up a name other than that of this machine."""
    look_up, names = socket.getaddrinfo, list[Any]()

    def checked(host: Any, *args: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1", "localhost"):
            names.append(host)
            raise socket.gaierror(f"{host} is not to be asked")
        return look_up(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", checked)
    yield
    assert names == []
