"""One cache of several: the books that a server keeps, with a disk tier and with what it would tell a router."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_cache.bench.fleet.paper_disk import IDENTITY, PaperStorage
from hybrid_cache.bench.policy.replay import Simulation
from hybrid_cache.bench.traces.trace import TraceRequest
from hybrid_cache.cache.disk.tier import REFRESH_S, DiskTier
from hybrid_cache.cache.journal import Journal
from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.resumable import Change, Resumable


@dataclass(slots=True)
class Replica(Simulation):
    """See the module docstring. Between two requests it is idle: then it writes what waits for the disk."""

    storage: PaperStorage | None = None
    disk_bytes: int = 0
    flops_per_s: float = 1.0  # of its machine
    tells: bool = False  # what requests may start from, as it comes and goes
    keys: Keys | None = None  # of the request that comes next, where they are known
    tier: DiskTier | None = field(init=False, default=None)
    _heard_s: float = field(init=False, default=-math.inf)
    _journal: Journal = field(init=False, default_factory=lambda: Journal(lambda: None))
    _resumable: Resumable = field(init=False, default_factory=lambda: Resumable(states=False))

    def __post_init__(self) -> None:
        if self.storage is not None:
            self.emit = self.storage.run
        Simulation.__post_init__(self)
        if self.storage is not None:
            self.tier = self.cache.add_disk(self.storage, self.disk_bytes)
            self.tier.serve("", IDENTITY)
        if self.tells:
            self.cache.pool.watch(self._journal)

    def changes(self) -> Iterator[Change]:
        """What its events would say since the last time."""
        return self._resumable.read(self._journal.take(len(self._journal)))

    def write(self) -> None:
        """Writes what waits for the disk."""
        while self.tier is not None and self.tier.saving.is_busy:
            self.tier.look(idle=True)

    def _acquire(self, keys: Keys) -> Lease | None:
        """With what the disk has, if that comes sooner than it is computed."""
        if self.tier is not None:
            self._hear()
            if self.tier.begin(self.cache.match("", keys), self._seconds) is not None:
                self.tier.look(idle=False)
        return Simulation._acquire(self, keys)

    def _hear(self) -> None:
        """Of what others have written, as a server does within a second."""
        assert self.storage is not None
        assert self.tier is not None
        if self.now - self._heard_s >= REFRESH_S:
            self._heard_s = self.now
            self.storage.refresh()
        self.tier.look(idle=False)

    def _seconds(self, start: int, end: int) -> float:
        return self.cost.flops(start, end) / self.flops_per_s

    def _prompt_keys(self, request: TraceRequest) -> Keys:
        keys, self.keys = self.keys, None
        return keys or Simulation._prompt_keys(self, request)
