"""The first line of a record: whose it is, and what a replay must know of it."""

from dataclasses import dataclass
from datetime import UTC, datetime

from hybrid_cache import __version__
from hybrid_cache.api.server.recording.lines import FORMAT, VERSION, Line, Secret, layers_of
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import ModelShape

SAME = ("format", "version", "fingerprint", "page_tokens", "layers")  # in all headers of one file


@dataclass(frozen=True, slots=True)
class Origin:
    """What is recorded."""

    name: str  # by which clients know the model
    fingerprint: str  # of its weights and dtype
    shape: ModelShape
    config: EngineConfig
    spare_state: bool = False  # one stands aside for rows that pad a batch, as on a GPU


def header(origin: Origin, secret: Secret) -> Line:
    shape, config = origin.shape, origin.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "server": __version__,
        "model": origin.name,
        "fingerprint": origin.fingerprint,
        "page_tokens": TILE,
        "chunk_tokens": config.max_tiles * TILE,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "stream": shape.stream and str(shape.stream).removeprefix("torch."),
        "layers": layers_of(shape),
        "budget_bytes": config.budget_bytes,
        "host_bytes": config.host_bytes,
        "disk_bytes": config.disk_bytes if config.disk else 0,
        "policy": config.policy,
        "order": config.order,
        "prefix_cache": config.prefix_cache,
        "spare_state": origin.spare_state,
        "salt_id": secret.salt_id,
    }


def check_same(place: str, there: Line, ours: Line) -> None:
    """Raises ConfigError unless what a server records may follow what another one has."""
    for name in SAME:
        if there.get(name) != ours[name]:
            found, wanted = (_brief(line.get(name)) for line in (there, ours))
            what = f"{name} {found}, and this server's is {wanted}"
            raise ConfigError(f"record {place} is of another server: its {what}: record to another file")


def _brief(value: object) -> str:
    return f"of {len(value)} parts" if isinstance(value, list) else repr(value)[:80]
