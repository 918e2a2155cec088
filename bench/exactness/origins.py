"""What the entries of the cache were made from that a row is computed behind, so that such rows are counted apart.

Entries go by the names of prefixes. A prefix counts as received only if whoever computed it had received entries: what
one request received and another computed may be either, so there are more rows of this kind than are counted.
"""

from collections.abc import Iterator
from enum import Enum

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.lease import Lease
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.engine.sequence import Prefill
from hybrid_cache.kernels.grid import TILE


class Behind(Enum):
    """What comes before a row in its sequence."""

    RECEIVED = "rows behind entries from another model"
    INVOKED = "rows of an activated adapter, behind its base's"
    FOUND = "rows of an activated adapter, behind its base's from the cache"


class Origins:
    """Of what sequences of one engine go on from."""

    def __init__(self) -> None:
        self.received_tokens = 0  # of all sequences
        self._received = set[Name]()
        self._computed = set[Name]()  # by somebody who had received nothing
        self._starts: dict[Prefill, tuple[Lease, int]] = {}  # where received entries begin in a sequence

    def begins(self, prefill: Prefill) -> bool:
        """A sequence is in the coming step -> whether it was in none before."""
        lease = prefill.lease
        assert lease is not None
        if prefill in self._starts and self._starts[prefill][0] is lease:
            return False
        self._starts[prefill] = lease, self._start(lease)
        return True

    def chunk(self, chunk: Chunk) -> None:
        """These tokens are in the coming step."""
        prefill, lease = chunk.prefill, chunk.prefill.lease
        assert lease is not None
        if self.begins(prefill) and chunk.start > lease.length:  # all layers were taken, and nothing was computed
            self._comes(prefill, lease, lease.length, chunk.start, received=True)
        self._comes(prefill, lease, chunk.start, chunk.end, received=chunk.rows.transfer is not None)

    def _comes(self, prefill: Prefill, lease: Lease, first: int, end: int, *, received: bool) -> None:
        _, start = self._starts[prefill]
        if received:
            start = min(start, first)
            self.received_tokens += end - first
            self._starts[prefill] = lease, start
        for index in range(first // TILE, end // TILE if prefill.publish else 0):
            name = lease.keys.names[index + 1]
            (self._received if start < (index + 1) * TILE else self._computed).add(name)

    def end_round(self) -> None:
        """Forgets sequences, but not what they have left."""
        self._starts.clear()

    def behind(self, prefill: Prefill, position: int) -> Iterator[Behind]:
        """What comes before a token of a sequence that has begun."""
        lease, start = self._starts[prefill]
        if start <= position:
            yield Behind.RECEIVED
        mark = prefill.mark
        if mark is not None and 0 < mark.position <= position:
            yield Behind.INVOKED
            if lease.length:
                yield Behind.FOUND

    def _start(self, lease: Lease) -> int:
        """Of the first page that a sequence found and that was received; far away if there is none."""
        found = range(lease.length // TILE)
        names = lease.keys.names
        known = (i * TILE for i in found if names[i + 1] in self._received and names[i + 1] not in self._computed)
        return next(known, 1 << 62)
