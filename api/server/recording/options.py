"""What is recorded, and where to."""

from dataclasses import dataclass
from pathlib import Path

from hybrid_cache.errors import ConfigError
from hybrid_cache.sizes import parse_bytes

LIMIT_BYTES = 10 << 30
MEMORY_BYTES = 64 << 20
LEAST_MEMORY = 1 << 20
LEAST_KEY = 16  # bytes


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Checked when made, the key too."""

    file: Path | None = None
    key_file: Path | None = None
    limit_bytes: int = LIMIT_BYTES  # of the file
    memory_bytes: int = 0  # of what `bench policy --from-server` may ask for

    def __post_init__(self) -> None:
        if self.key_file is not None and not self.on:
            raise ConfigError("a record key is given, and nothing is recorded: see --record and --record-memory")
        if 0 < self.memory_bytes < LEAST_MEMORY:
            raise ConfigError(f"record_memory is {self.memory_bytes} bytes, must be 0 or at least {LEAST_MEMORY}")
        self.key()

    @property
    def on(self) -> bool:
        return self.file is not None or self.memory_bytes > 0

    def key(self) -> bytes | None:
        """Raises ConfigError for a file that cannot be read, or is too short for a key."""
        if self.key_file is None:
            return None
        try:
            key = self.key_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"record key {self.key_file}: cannot be read: {error.strerror or error}") from error
        if len(key) < LEAST_KEY:
            raise ConfigError(f"record key {self.key_file} has {len(key)} bytes, must have at least {LEAST_KEY}")
        return key


def memory_of_record(text: str | None, *, on: bool) -> int:
    """on: whether a file is written"""
    if text is None:
        return MEMORY_BYTES if on else 0
    return 0 if text.strip() == "0" else parse_bytes(text)
