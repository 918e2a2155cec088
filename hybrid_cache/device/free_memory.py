"""How much memory this process may still take: the least of what the machine, its control groups and its own limits
leave. Files are read below `root`, so that a folder can stand for a machine.

And what was freed, given back: glibc keeps pieces of memory that it may need again, which add up where large models
come and go.
"""

import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path("/")
UNKNOWN_SHARE = 0.5  # of a machine's memory, where nothing says how much of it is free
LEAST_MACHINE_BYTES = 4 << 30  # what a machine is taken to have that does not even say that


@dataclass(frozen=True, slots=True)
class FreeMemory:
    num_bytes: int
    bound: str  # what leaves no more


def free_memory(device: torch.device, root: Path = ROOT) -> FreeMemory:
    """Of a device: on a CPU that of the process."""
    return free_on_gpu(device) if device.type == "cuda" else free_on_machine(root)


def free_on_gpu(device: torch.device) -> FreeMemory:
    torch.cuda.empty_cache()
    return FreeMemory(torch.cuda.mem_get_info(device)[0], "the GPU")


def free_on_machine(root: Path = ROOT) -> FreeMemory:
    """What is only kept in case it is read again, such as files, counts as free."""
    found = [*_machine(root), *_control_groups(root), *_own_limits(root)]
    return min(found, key=lambda each: each.num_bytes)


def give_back_freed() -> None:
    """Collects what nothing refers to any more, and has glibc return free pages to the system (malloc_trim(3)).

    Where there is no glibc, nothing is returned.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def taken(root: Path = ROOT) -> int | None:
    """Bytes of real memory that the process has; None where nothing says so."""
    pages = _fields(root / "proc/self/statm")
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def _machine(root: Path) -> Iterator[FreeMemory]:
    available = _sizes(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        yield FreeMemory(available, "the machine")
        return
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        size = LEAST_MACHINE_BYTES
    yield FreeMemory(int(UNKNOWN_SHARE * size), "half of the machine")


def _control_groups(root: Path) -> Iterator[FreeMemory]:
    """Of each group from the process's own upwards; inside a container only the container's can be seen."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield from _groups(mounted / "memory", path, _FIRST_VERSION)
        elif not controllers:
            unified = mounted / "unified"
            yield from _groups(unified if unified.is_dir() else mounted, path, _SECOND_VERSION)


@dataclass(frozen=True, slots=True)
class _Files:
    """The names of a control group's files, and of what can be taken back of what it uses."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str


_FIRST_VERSION = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_SECOND_VERSION = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _groups(mounted: Path, path: str, files: _Files) -> Iterator[FreeMemory]:
    steps = [step for step in path.split("/") if step not in ("", "..")]
    for count in range(len(steps), -1, -1):
        group = mounted.joinpath(*steps[:count])
        limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
        used = _number(group / files.used)
        if limits and used is not None:
            reclaimable = _sizes(group / "memory.stat").get(files.reclaimable, 0)
            yield FreeMemory(max(min(limits) - used + reclaimable, 0), "the control group (of a container, say)")


def _own_limits(root: Path) -> Iterator[FreeMemory]:
    sizes = _sizes(root / "proc/self/status")
    for name, kind, key in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield FreeMemory(max(limit - sizes.get(key, 0), 0), name)


def _sizes(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable: 12 kB` or `inactive_file 4096` -> bytes by name. Other lines are left out."""
    sizes = {}
    for line in _lines(path):
        name, *rest = line.replace(":", " ").split() or [""]
        if rest and rest[0].isdecimal():
            sizes[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return sizes


def _number(path: Path) -> int | None:
    fields = _fields(path)
    return int(fields[0]) if fields and fields[0].isdecimal() else None


def _fields(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
