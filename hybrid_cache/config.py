"""Settings of one engine."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_cache.cache.policies.registry import canonical_name
from hybrid_cache.errors import ConfigError
from hybrid_cache.scheduling.registry import order_name

LEAST_DISK_BYTES = 1 << 20
VERIFY_VARIABLE = "HYBRID_CACHE_VERIFY"


def verify_by_default() -> bool:
    """Whether the environment asks for the checking mode: HYBRID_CACHE_VERIFY is set, and not to 0."""
    return os.environ.get(VERIFY_VARIABLE, "0") not in ("", "0")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Read by the engine and its scheduler. Raises ConfigError, when made, for a setting that cannot work."""

    budget_bytes: int = 2 << 30  # KV pages, states and prompt ends together
    max_running: int = 32
    max_waiting: int = 256
    policy: str = "learned"
    host_bytes: int = 0  # a second tier in the memory of the host, beside a GPU; 0: none
    disk: Path | None = None  # a folder: a tier that outlives the process; None: none
    disk_bytes: int = 20 << 30  # of all files in it
    order: str = "learned"  # whose turn it is, and what is kept for tasks that wait for a tool; see `scheduling`
    prefix_cache: bool = True  # off: nothing is reused between requests
    double_writing: bool = True  # prompts are written for models, too, that are expected to read them with a loss
    max_tiles: int = 16  # prefill tiles in a step with nobody decoding
    max_tiles_beside_decode: int = 4  # bounds the pause that a long prompt causes between the tokens of other requests
    max_step_ms: float | None = None  # a step's prefill is bounded by measured rates so that it takes no longer
    # Published pages and states are compared with their digests at each use and at random, for tests; slow. An engine
    # that finds one changed ends. HYBRID_CACHE_VERIFY=1 makes it the default.
    verify: bool = field(default_factory=verify_by_default)

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "max_running", "max_waiting", "max_tiles", "max_tiles_beside_decode"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.host_bytes < 0:
            raise ConfigError(f"host_bytes is {self.host_bytes}, must not be negative")
        if self.disk_bytes < LEAST_DISK_BYTES:
            raise ConfigError(f"disk_bytes is {self.disk_bytes}, must be at least {LEAST_DISK_BYTES}")
        if self.max_step_ms is not None and not self.max_step_ms > 0:
            raise ConfigError(f"max_step_ms is {self.max_step_ms}, must be more than 0")
        canonical_name(self.policy)  # raises ConfigError if there is none
        order_name(self.order)  # likewise
