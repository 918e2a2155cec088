"""What the policy has learned, for the next process."""

import logging
import time
from collections.abc import Callable

from hybrid_cache.cache.disk.entries import Storage
from hybrid_cache.cache.policies.base import Policy, Remembers

IDLE_S, BUSY_S = 30.0, 600.0  # between two times that it is written, while nobody waits, and while somebody does
LONGEST_S = 30 * 86_400.0  # that a clock is believed to have gone on between two processes
TIME_BYTES = 8

logger = logging.getLogger("hybrid_cache")


class Knowledge:
    """Kept in the index under the names of policy and model. Written now and then, and at the end."""

    def __init__(
        self,
        storage: Storage,
        policy: Policy,
        clock: Callable[[], float],
        most_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """most_bytes: what is larger is not kept   now: for the time between two processes"""
        self._storage = storage
        self._policy = policy
        self._clock, self._now = clock, now
        self._most_bytes = most_bytes
        self._name = ""
        self._written_s = clock()

    def recall(self, identity: str) -> None:
        """Has the policy take over what an earlier process with a model had learned. Doubt is a miss."""
        self._name = f"{self._policy.name} {identity}"
        data = self._storage.recall(self._name) if isinstance(self._policy, Remembers) else None
        if data is None or not isinstance(self._policy, Remembers):
            return
        elapsed_s = self._now() - int.from_bytes(data[:TIME_BYTES], "little")
        try:
            self._policy.recall(data[TIME_BYTES:], min(max(elapsed_s, 0.0), LONGEST_S))
        except ValueError as error:
            logger.warning("what the policy had learned is not used: %s", error)

    def look(self, *, idle: bool) -> None:
        """To be called between two steps."""
        if self._clock() - self._written_s > (IDLE_S if idle else BUSY_S):
            self.write()

    def write(self) -> None:
        self._written_s = self._clock()
        if not (self._name and isinstance(self._policy, Remembers)):
            return
        data = int(max(self._now(), 0.0)).to_bytes(TIME_BYTES, "little") + self._policy.remembered()
        if len(data) <= self._most_bytes:
            self._storage.remember(self._name, data)
