"""What is free, read from folders that stand for machines."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_cache.device.free_memory import FreeMemory, free_on_machine, taken

GIB = 1 << 30
MACHINE, GROUP = "the machine", "the control group (of a container, say)"
UNLIMITED = "9223372036854771712\n"  # what the first version says where there is no limit


def machine(root: Path, files: dict[str, str]) -> FreeMemory:
    """What is free on a machine of 64 GiB, of which 40 are free, with these files in addition."""
    meminfo = f"MemTotal: {64 << 20} kB\nMemFree: {8 << 20} kB\nMemAvailable:   {40 << 20} kB\nHugePages_Free: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_on_machine(root)


def group(limit: str, used: int, inactive: int) -> dict[str, str]:
    stat = f"anon {used}\nfile {inactive}\ninactive_file {inactive}\nactive_file 77\n"
    return {"memory.max": f"{limit}\n", "memory.high": "max\n", "memory.current": f"{used}\n", "memory.stat": stat}


def first_version(limit: str, used: int, inactive: int) -> dict[str, str]:
    stat = f"inactive_file 5\ntotal_inactive_file {inactive}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


def test_without_limits_it_is_what_the_machine_can_give(tmp_path: Path) -> None:
    assert machine(tmp_path, {}) == FreeMemory(40 * GIB, MACHINE)
    unlimited = {"proc/self/cgroup": "0::/user\n", **below("user/", group("max", 3 * GIB, 0))}
    assert machine(tmp_path, unlimited) == FreeMemory(40 * GIB, MACHINE)


def test_a_container_leaves_its_limit_less_what_is_used_and_cannot_be_taken_back(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **below("", group(str(2 * GIB), GIB, GIB // 4))}
    assert machine(tmp_path, files) == FreeMemory(2 * GIB - GIB + GIB // 4, GROUP)


def test_a_group_that_is_throttled_counts_as_one_with_a_limit(tmp_path: Path) -> None:
    files = {**group("max", GIB, 0), "memory.high": str(3 * GIB)}
    assert machine(tmp_path, {"proc/self/cgroup": "0::/\n", **below("", files)}) == FreeMemory(2 * GIB, GROUP)


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pods/one/worker\n",
        **below("pods/one/worker/", group("max", GIB, 0)),
        **below("pods/one/", group(str(4 * GIB), 2 * GIB, 0)),
        **below("pods/", group(str(30 * GIB), 20 * GIB, 0)),
    }
    assert machine(tmp_path, files) == FreeMemory(2 * GIB, GROUP)


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **below("", group(str(GIB), 2 * GIB, 0))}
    assert machine(tmp_path, files) == FreeMemory(0, GROUP)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside", "/"])
def test_the_first_version_is_found_where_containers_see_it(tmp_path: Path, path: str) -> None:
    """The path is the host's, and what is mounted is the container's own group."""
    files = {
        "proc/self/cgroup": f"9:name=systemd:/\n4:memory:{path}\n1:cpu,cpuacct:/\n0::/\n",
        **below("memory/", first_version(str(2 * GIB), GIB, GIB // 8)),
        "sys/fs/cgroup/unified/cgroup.procs": "",
    }
    assert machine(tmp_path, files) == FreeMemory(GIB + GIB // 8, GROUP)


def test_the_first_version_without_a_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:memory:/\n", **below("memory/", first_version(UNLIMITED, GIB, 0))}
    assert machine(tmp_path, files) == FreeMemory(40 * GIB, MACHINE)


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "nonsense\n::\n0::/a\n",
        **below("a/", {**group("soon", GIB, 0), "memory.current": ""}),
        **below("", group(str(GIB), 0, 0)),
        "proc/self/status": "VmSize:\nVmData: much kB\n",
    }
    assert machine(tmp_path, files) == FreeMemory(GIB, GROUP)


def test_where_nothing_says_what_is_free_it_is_half_of_the_machine(tmp_path: Path) -> None:
    found = free_on_machine(tmp_path)
    assert found.bound == "half of the machine"
    assert found.num_bytes > 1 << 20
    assert taken(tmp_path) is None


def test_this_machine_says_what_is_free_and_taken() -> None:
    own = taken()
    assert own is not None
    assert own > 50 << 20
    assert free_on_machine().num_bytes > 1 << 20


LIMITED = """
import resource, sys
from hybrid_cache.device.free_memory import free_on_machine
kind, room = getattr(resource, sys.argv[1]), 700 << 20
name = "VmSize:" if sys.argv[1] == "RLIMIT_AS" else "VmData:"
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
resource.setrlimit(kind, (used + room, resource.RLIM_INFINITY))
free = free_on_machine()
assert free.bound == sys.argv[1], free
assert room - (16 << 20) < free.num_bytes <= room, free
kept = bytearray(300 << 20)
assert free_on_machine().num_bytes < 420 << 20
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_the_process_itself_count(limit: str) -> None:
    assert hasattr(resource, limit)
    subprocess.run([sys.executable, "-c", LIMITED, limit], check=True, timeout=60)


TRIMMED = """
import ctypes
from hybrid_cache.device.free_memory import give_back_freed, taken

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [libc.malloc(65536) for _ in range(2048)]
for piece in pieces:
    ctypes.memset(piece, 1, 65536)
for piece in pieces[:-1]:  # the last one keeps the heap from shrinking by itself
    libc.free(piece)
before = taken()
give_back_freed()
print((before - taken()) // 2**20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_was_freed_between_pieces_in_use_is_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", TRIMMED], check=True, capture_output=True, text=True, timeout=60)
    assert int(said.stdout) > 100
