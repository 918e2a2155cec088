"""The file and the memory of a record, and what happens when they cannot be written."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hybrid_cache.api.server.recording.events import Called
from hybrid_cache.api.server.recording.header import Origin, header
from hybrid_cache.api.server.recording.lines import PageWriter, Secret, encoded
from hybrid_cache.api.server.recording.options import RecordOptions, memory_of_record
from hybrid_cache.api.server.recording.record_file import RecordFile
from hybrid_cache.api.server.recording.recorder import Recorder
from hybrid_cache.api.server.recording.ring import Ring
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.models.tools.presets import preset

KEY = b"0123456789abcdef"
ORIGIN = Origin("m", "f" * 32, preset("embedded"), EngineConfig())
HEADER = header(ORIGIN, Secret(KEY))
LINE = encoded({"lost": 1})
NO_LIMIT = 1 << 30


def opened(path: Path, limit: int = NO_LIMIT) -> RecordFile:
    return RecordFile(path, limit, HEADER)


def test_a_file_grows_by_starts_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for _ in range(2):
        file = opened(path)
        assert file.add(LINE)
        file.close()
    assert path.read_bytes() == 2 * (encoded(HEADER) + LINE)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"my diary\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"format": "x"}', b"[" * 9999 + b"\n"]
)
def test_what_is_no_record_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="something else than a record"):
        opened(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value"), [("version", 2), ("fingerprint", "0" * 32), ("layers", []), ("page_tokens", 16)]
)
def test_the_record_of_another_server_is_refused(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(encoded({**HEADER, name: value}))
    with pytest.raises(ConfigError, match=f"its {name}") as raised:
        opened(path)
    assert "\n" not in str(raised.value)


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    first = opened(tmp_path / "r")
    with pytest.raises(ConfigError, match="another server records to it"):
        opened(tmp_path / "r")
    first.close()
    opened(tmp_path / "r").close()


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        opened(tmp_path / "none" / "r")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no ordinary file"):
        opened(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(Path("/proc/record"))  # a folder in which nobody may write


def test_a_limit_ends_the_file_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = opened(tmp_path / "r", len(encoded(HEADER)) + 3 * len(LINE) + 30)
    with caplog.at_level(logging.WARNING):
        results = [file.add(LINE) for _ in range(9)]
    assert results[0]
    assert not results[-1]
    assert sum("limit" in r.getMessage() for r in caplog.records) == 1
    lines = (tmp_path / "r").read_text().splitlines()
    assert json.loads(lines[-1]) == {"stopped": "limit"}
    assert (tmp_path / "r").stat().st_size <= len(encoded(HEADER)) + 3 * len(LINE) + 30
    file.close()
    with pytest.raises(ConfigError, match="raise --record-limit"):
        opened(tmp_path / "r", 100)


def test_a_full_disk_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, write = opened(tmp_path / "r"), os.write
    room = [len(LINE) + 5]

    def some(fd: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", some)
    with caplog.at_level(logging.WARNING):
        assert file.add(LINE)
        assert not file.add(LINE)
        assert not file.add(LINE)
    monkeypatch.undo()
    assert file.stopped == "error"
    assert (tmp_path / "r").read_bytes() == encoded(HEADER) + LINE
    assert sum("No space left" in r.getMessage() for r in caplog.records) == 1
    file.close()


def test_a_line_that_broke_off_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(encoded(HEADER) + LINE + LINE[:4])
    opened(tmp_path / "r").close()
    assert (tmp_path / "r").read_bytes() == encoded(HEADER) + LINE + encoded(HEADER)


KILLED = """
import sys
from tests.api.server.test_record import opened, LINE
from pathlib import Path
file = opened(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    file.add(LINE * 500)
"""


def test_killed_in_the_middle_the_next_server_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    opened(path).close()
    lines = path.read_bytes().splitlines()
    assert len(lines) > 500
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_pages_are_said_once_and_again_in_a_new_segment() -> None:
    writer = PageWriter(Secret(KEY))
    names = [bytes([i]) * 16 for i in range(5)]
    first, more, same = writer.fields(names[:3]), writer.fields(names), writer.fields(names[:2])
    assert first["after"] == ""
    assert len(str(first["pages"])) == 32  # three names
    assert more["after"] == writer.secret.name(b"page", names[2])
    assert len(str(more["pages"])) > 0
    assert (same["after"], same["pages"]) == (writer.secret.name(b"page", names[1]), "")


def test_the_memory_forgets_whole_segments() -> None:
    ring = Ring(8 * 1000)
    for i in range(200):
        if ring.segment_full:
            ring.new_segment()
        ring.add("a" if i % 2 else "b", b"%d\n" % i)
    lines, forgotten = ring.lines(lambda namespace: True)
    assert ring.num_bytes <= 8 * 1000
    assert [int(line) for line in lines] == list(range(forgotten, 200))
    assert all(int(line) % 2 for line in ring.lines(lambda namespace: namespace == "a")[0])


def test_what_there_is_no_time_for_is_lost_and_counted(tmp_path: Path) -> None:
    recorder = Recorder(ORIGIN, RecordOptions(tmp_path / "r", memory_bytes=1 << 20))
    for _ in range(5):
        recorder._put(Called(1, "", "tool", None, 0.0, weight=1 << 17))  # nobody writes yet
    assert recorder.counts.lost == 3
    recorder.start()
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [line.get("lost") for line in lines if "lost" in line] == [3]
    assert sum("called" in line for line in lines) == 2
    assert "tool" not in {str(value) for line in lines[1:] for value in line.values()}


def test_keys_make_equal_names_and_their_absence_different_ones(tmp_path: Path) -> None:
    assert Secret(KEY).of_text(b"user", "bob") == Secret(KEY).of_text(b"user", "bob")
    assert Secret(KEY).of_text(b"user", "bob") != Secret(KEY).of_text(b"session", "bob")
    assert len({Secret().of_text(b"user", "bob") for _ in range(5)}) == 5
    (tmp_path / "key").write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="at least 16"):
        RecordOptions(tmp_path / "r", tmp_path / "key")
    with pytest.raises(ConfigError, match="cannot be read"):
        RecordOptions(tmp_path / "r", tmp_path / "none")
    with pytest.raises(ConfigError, match="nothing is recorded"):
        RecordOptions(None, tmp_path / "key")


def test_memory_is_there_with_a_file_unless_it_is_switched_off() -> None:
    assert memory_of_record(None, on=True) == 64 << 20
    assert memory_of_record(None, on=False) == 0
    assert memory_of_record("0", on=True) == 0
    assert memory_of_record("2MiB", on=False) == 2 << 20
    with pytest.raises(ConfigError, match="must be 0 or at least"):
        RecordOptions(None, None, memory_bytes=5)


def test_the_first_line_says_what_lies_below_the_memory(tmp_path: Path) -> None:
    assert HEADER["disk_bytes"] == HEADER["host_bytes"] == 0
    config = EngineConfig(host_bytes=1 << 30, disk=tmp_path, disk_bytes=2 << 30)
    line = header(Origin("m", "f" * 32, preset("embedded"), config), Secret(KEY))
    assert (line["host_bytes"], line["disk_bytes"]) == (1 << 30, 2 << 30)
