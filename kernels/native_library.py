"""Compiles the C sources in `native/` with the system's compiler, once, and loads them.

The library lies in `$XDG_CACHE_HOME/hybrid-cache/native/<hash>.so`; the hash covers sources, compiler, flags and CPU.
It appears by an atomic rename, so processes that build it at the same time do not disturb each other.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# Without errno and trap side effects the compiler may use vector instructions; it may not reorder sums.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
OPENMP = ("-fopenmp",)
TIMEOUT_SECONDS = 240


class BuildError(RuntimeError):
    """No compiler, or it does not compile our sources."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library; the first call on a machine takes a few seconds. Raises `BuildError`."""
    compiler, folder = find_compiler(), cache_folder()
    try:
        return ctypes.CDLL(str(build(compiler, (*FLAGS, *OPENMP), folder)))
    except (BuildError, OSError) as error:
        if takes_openmp(compiler):
            raise BuildError(str(error)) from error
    try:
        return ctypes.CDLL(str(build(compiler, FLAGS, folder)))
    except OSError as error:
        raise BuildError(str(error)) from error


def takes_openmp(compiler: str) -> bool:
    """Whether a compiler makes libraries with OpenMP that can be loaded. Some come without its headers or library."""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "threads.c", Path(scratch) / "threads.so"
        source.write_text("#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n")
        try:
            _run([compiler, "-fPIC", "-shared", *OPENMP, str(source), "-o", str(output)])
            ctypes.CDLL(str(output))
        except (BuildError, OSError):
            return False
        return True


@functools.cache
def reason_missing() -> str | None:
    """None if the library can be loaded, else why not."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def find_compiler() -> str:
    """Path of `$CC` or the system's C compiler. Raises BuildError if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C compiler found (cc, gcc or clang)")


def cache_folder() -> Path:
    """Where libraries are kept; made if needed. Raises BuildError if it cannot be."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(root) if root else Path.home() / ".cache") / "hybrid-cache" / "native"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"no folder for the library: {error}") from error
    return folder


def build(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The library for these flags in a folder, compiled unless it is there. Raises BuildError if that fails."""
    target = folder / f"{fingerprint(compiler, flags)}.so"
    if target.exists():
        return target
    if not os.access(folder, os.W_OK):
        raise BuildError(f"cannot write {folder}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / target.name
        sources = sorted(SOURCES.glob("*.c"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            commands = [[compiler, *flags, "-c", str(c), "-o", str(o)] for c, o in zip(sources, objects, strict=True)]
            list(pool.map(_run, commands))
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(output)])
        output.replace(target)
    return target


def fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(_run([compiler, "--version"]).encode())
    digest.update(" ".join(flags).encode())
    digest.update(_cpu().encode())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """-march=native means another instruction set on another CPU, which may share the cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join([platform.machine(), platform.processor(), *facts])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout
