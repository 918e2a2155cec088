"""What `--kv-events-config` says: vLLM's JSON object with its names, and three of ours."""

import json
from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import isfinite
from typing import Any

from hybrid_cache.errors import ConfigError

OPTION = "--kv-events-config"
NEEDED = ("zmq", "msgspec")
SCHEMES = ("tcp://", "ipc://")
LEAST_BEAT_S, MOST_BEAT_S = 0.1, 3600.0
MOST_STEPS = 10_000_000


@dataclass(frozen=True, slots=True)
class KVEventsConfig:
    """Checked when made. Raises ConfigError with the key, its value and the bound."""

    enable_kv_cache_events: bool = False
    publisher: str = ""  # zmq or null; empty for zmq where events are enabled
    endpoint: str = "tcp://127.0.0.1:5557"  # where batches are published; `*` for all addresses
    replay_endpoint: str | None = None  # where those that were missed can be asked for
    buffer_steps: int = 10_000  # batches that are kept for that
    hwm: int = 1_000  # batches that wait for one slow subscriber; more are dropped for it, and counted
    max_queue_size: int = 100_000  # changes that wait for being published
    topic: str = ""
    heartbeat_s: float = 1.0  # an empty batch after so many seconds without another
    publish_salted: bool = False  # also what requests with a salt or of several tenants have cached
    publish_states: bool = False  # also where states lie, as groups of kind mamba; vllm-router then reads no more

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name))
        if self.publisher not in ("", "zmq", "null"):
            raise ConfigError(f"{OPTION}: publisher is {self.publisher[:100]!r}, must be zmq or null")
        for name in ("endpoint", "replay_endpoint"):
            _check_endpoint(name, getattr(self, name))
        if self.endpoint == self.replay_endpoint and not self.endpoint.endswith((":*", ":0")):
            raise ConfigError(f"{OPTION}: endpoint and replay_endpoint are both {self.endpoint!r}, must differ")
        for name in ("buffer_steps", "hwm", "max_queue_size"):
            if not 1 <= getattr(self, name) <= MOST_STEPS:
                raise ConfigError(f"{OPTION}: {name} is {getattr(self, name)}, must be in [1, {MOST_STEPS}]")
        if not (isfinite(self.heartbeat_s) and LEAST_BEAT_S <= self.heartbeat_s <= MOST_BEAT_S):
            bound = f"[{LEAST_BEAT_S}, {MOST_BEAT_S:.0f}]"
            raise ConfigError(f"{OPTION}: heartbeat_s is {self.heartbeat_s}, must be in {bound}")
        if self.publishes and (missing := [name for name in NEEDED if find_spec(name) is None]):
            what = " and ".join(missing)
            raise ConfigError(f"KV events need {what}, not installed here: pip install 'hybrid-cache[events]'")

    @property
    def publishes(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can subscribe."""
        local = ("ipc://", "tcp://127.", "tcp://localhost:", "tcp://[::1]:")
        return all(each.startswith(local) for each in (self.endpoint, self.replay_endpoint) if each)


def parse(text: str | None) -> KVEventsConfig:
    """Of the option's JSON object; None for an option that was not given. Raises ConfigError."""
    if text is None:
        return OFF
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{OPTION} is {text[:100]!r}, must be a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{OPTION} is {text[:100]!r}, must be a JSON object")
    known = [field.name for field in fields(KVEventsConfig)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{OPTION}: {name[:100]!r} is not known, must be one of {', '.join(known)}")
    return KVEventsConfig(**values)


_TYPES: dict[str, tuple[type, ...]] = {
    "enable_kv_cache_events": (bool,),
    "publish_salted": (bool,),
    "publish_states": (bool,),
    "publisher": (str,),
    "endpoint": (str,),
    "replay_endpoint": (str, type(None)),
    "topic": (str,),
    "heartbeat_s": (int, float),
}


def _check_type(name: str, value: Any) -> None:
    types = _TYPES.get(name, (int,))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("null" if each is type(None) else each.__name__ for each in types)
        raise ConfigError(f"{OPTION}: {name} is {str(value)[:100]!r}, must be {wanted}")


def _check_endpoint(name: str, endpoint: str | None) -> None:
    if endpoint is None:
        return
    if not endpoint.startswith(SCHEMES) or len(endpoint) <= len("tcp://"):
        raise ConfigError(f"{OPTION}: {name} is {endpoint[:100]!r}, must be like tcp://*:5557 or ipc:///tmp/events")
    port = endpoint.rpartition(":")[2]
    numbered = port.isascii() and port.isdigit() and int(port) <= 65535
    if endpoint.startswith("tcp://") and not (numbered or port == "*"):
        raise ConfigError(f"{OPTION}: {name} is {endpoint[:100]!r}, must end in a port of at most 65535")


OFF = KVEventsConfig()
