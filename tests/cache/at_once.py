"""The books of a cache with a memory that carries out each command at once, for tests without an engine."""

from collections.abc import Callable
from time import monotonic

from torch import Tensor

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.commands import Item
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.config import verify_by_default
from hybrid_cache.device.batch import CacheTensors
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.spec import CacheSpec, PrefillCost


class HybridCache(Books):
    """Books with a memory that carries out each command at once."""

    def __init__(
        self,
        spec: CacheSpec,
        cost: PrefillCost,
        budget_bytes: int,
        policy: Policy | None = None,
        *,
        device: str = "cpu",
        clock: Callable[[], float] | None = None,
        verify: bool | None = None,
    ) -> None:
        """verify: compare what was published with its digest, again and again; None: if the environment asks for it

        Raises ConfigError for too small a budget.
        """
        verify = verify_by_default() if verify is None else verify
        self.memory = CacheMemory(spec, budget_bytes, device, verify=verify)
        fit = spec, cost, budget_bytes, policy or Learned()
        super().__init__(*fit, emit=self.memory.run, clock=clock or monotonic, verify=verify)

    @property
    def tensors(self) -> CacheTensors:
        """Views of all pages and slots by layer."""
        return self.memory.tensors

    def hidden(self, lease: Lease) -> Tensor:
        """The last hidden row [hidden_size] of the prompt end that a lease was acquired from."""
        assert lease.end is not None
        return self.memory.hidden((lease.slot,))[0]

    def check(self) -> set[Item]:
        """Proves that books and memory are in order -> all published items. Raises PublishedBytesChanged."""
        published = super().check()
        self.memory.check(published)
        return published
