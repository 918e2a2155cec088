"""Files that a command writes: whether that will work is known before hours of measuring."""

import os
from importlib.util import find_spec
from pathlib import Path

from hybrid_cache.errors import ConfigError


def target(path: Path) -> Path:
    """Where a file really lies. Raises ConfigError if nothing can be written there: better before hours of replays."""
    path = path.resolve()
    if (path.exists() and not path.is_file()) or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all; `path` is a `target`. Raises ConfigError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file. Raises ConfigError."""
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_plot(path: Path) -> None:
    """Raises ConfigError if no plot can be made."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: a plot is a PNG file, wanted a name that ends in .png")
    if find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'hybrid-cache[bench]'")
