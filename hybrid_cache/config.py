"""Settings of one engine."""

from dataclasses import dataclass

from hybrid_cache.errors import ConfigError
from hybrid_cache.policies.registry import check_policy_name


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Checked when made, read by the engine and its scheduler."""

    budget_bytes: int = 2 << 30  # KV pages, states and prompt ends together
    max_running: int = 32
    max_waiting: int = 256
    policy: str = "ours"
    prefix_cache: bool = True  # off: nothing is reused between requests
    max_tiles: int = 16  # prefill tiles in a step with nobody decoding
    max_tiles_beside_decode: int = 4  # bounds the pause that a long prompt puts between a neighbour's tokens

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "max_running", "max_waiting", "max_tiles", "max_tiles_beside_decode"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        check_policy_name(self.policy)
