"""The disk tier as the books and the scheduler see it. Integers and names only; nothing here waits."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from hybrid_cache.cache.commands import Emit
from hybrid_cache.cache.disk.catalogue import Catalogue
from hybrid_cache.cache.disk.entries import Found, Gone, Loaded, NotLoaded, NotSaved, Saved, Storage
from hybrid_cache.cache.disk.knowledge import Knowledge
from hybrid_cache.cache.disk.loading import Load, Loading
from hybrid_cache.cache.disk.saving import Saving, State
from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.messages import MessageStore
from hybrid_cache.cache.policies.base import Foresees
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import Checkpoint, Kept, Node, PromptEnd, StoredMessage
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost
from hybrid_cache.stats import DiskStats

KNOWLEDGE_SHARE = 16  # this part of a budget may be for what the policy has learned
REFRESH_S = 1.0  # between two looks at what other processes have written


@contextmanager
def no_collection() -> Iterator[None]:
    """While very many objects are made that stay, to look for garbage among them takes longer than to make them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def as_new(name: Name) -> float:
    return 1.0


class DiskTier:
    """See the module docstring, and that of the package."""

    def __init__(
        self,
        storage: Storage,
        budget_bytes: int,
        pool: Pool,
        cost: PrefillCost,
        emit: Emit,
        clock: Callable[[], float],
        messages: MessageStore,
        *,
        stateless: bool,
    ) -> None:
        self._storage = storage
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._stateless = stateless
        self._identities: dict[str, str] = {}
        self._refreshed_s = clock()
        page_bytes = pool.geometry.page_bytes * (pool.tree.page_tokens // TILE)  # books without a memory: larger pages
        geometry = replace(pool.geometry, page_bytes=page_bytes)
        self.catalogue = Catalogue(
            pool.tree.page_tokens, geometry, stateless=stateless, effect_bytes=messages.effect_bytes
        )
        facts = storage, self.catalogue, geometry, cost, self._identities, emit, clock, pool.tree.page_tokens
        standing = pool.policy.standing if isinstance(pool.policy, Foresees) else as_new
        self.knowledge = Knowledge(storage, pool.policy, clock, budget_bytes // KNOWLEDGE_SHARE)
        self.saving = Saving(*facts, standing, messages, stateless=stateless)
        self.loading = Loading(storage, self.catalogue, self.saving, pool, messages, clock)

    def serve(self, fingerprint: str, identity: str) -> None:
        """From now on entries of a model are found, and written. Reads the index: it may take a second."""
        if identity not in self._identities.values():
            with no_collection():
                self.catalogue.add(self._storage.entries(identity))
        if not self._identities:
            self.knowledge.recall(identity)
        self._identities[fingerprint] = identity

    @property
    def identities(self) -> list[str]:
        """Of the models that are served."""
        return [*dict.fromkeys(self._identities.values())]

    # From the books

    def published(self, kept: Kept) -> None:
        """A state is in the tree."""
        if isinstance(kept, State):
            self.saving.published(kept)

    def published_page(self, node: Node) -> None:
        """Without recurrent states, a page is enough; the last one of a prompt takes those before it with it."""
        if self._stateless:
            self.saving.published(node, instead=node.parent)

    def leaving(self, kept: Kept | Node, *, dropped: bool) -> None:
        """It is about to go from memory. dropped: somebody wants it gone from here, too"""
        if not isinstance(kept, Checkpoint | PromptEnd | StoredMessage | Node):
            return
        if not dropped:
            return self.saving.leaving(kept)
        self.saving.forget(kept)
        self.loading.forget(kept.name)
        entries = self.catalogue.of_prefix(kept.name)
        if entries:
            self.catalogue.remove(entries)
            self._storage.drop(entries)

    def drop(self, may: Callable[[str], bool]) -> None:
        """Drops all of the namespaces that are meant, of whatever model."""
        self.loading.forget_namespaces(may)
        self.catalogue.remove(self.catalogue.of_namespaces(may))
        self._storage.drop_namespaces(may)

    # From the scheduler

    def look(self, *, idle: bool) -> None:
        """To be called between two steps. idle: nobody waits for an answer"""
        for report in self._storage.reports():
            self._hear(report)
        self.saving.pump(idle=idle)
        self.knowledge.look(idle=idle)

    def _hear(self, report: object) -> None:
        match report:
            case Found():
                self.catalogue.add(report.entries)
            case Gone():
                self.catalogue.remove(report.entries)
            case Saved():
                self.saving.ended(report.job)
            case NotSaved():
                self.saving.ended(report.job, report.why)
            case Loaded():
                self.loading.loaded(report)
            case NotLoaded():
                self.loading.failed(report)
                self.catalogue.remove((report.entry,))
                self._storage.drop((report.entry,))

    def begin(self, match: Match, compute_s: Callable[[int, int], float]) -> Load | None:
        """As `Loading.begin`."""
        load = self.loading.begin(match, compute_s)
        if load is None:
            self._refresh()
        return load

    def begin_message(self, namespace: str, key: str, compute_s: Callable[[int, int], float]) -> Load | None:
        """As `Loading.begin_message`."""
        load = self.loading.begin_message(namespace, key, compute_s)
        if load is None:
            self._refresh()
        return load

    def _refresh(self) -> None:
        """Asks what others have written, now and then."""
        if self._clock() - self._refreshed_s > REFRESH_S:
            self._refreshed_s = self._clock()
            self._storage.refresh()

    @property
    def can_save(self) -> bool:
        """Whether a step would copy something if nobody waited."""
        return bool(len(self.saving)) and self.saving.has_room

    @property
    def has_work(self) -> bool:
        """Whether something waits, or is under way."""
        return bool(self.loading) or self.saving.is_busy

    @property
    def stats(self) -> DiskStats:
        saving, loading = self.saving, self.loading
        return DiskStats(
            budget_bytes=self._budget_bytes,
            used_bytes=self._storage.usage.num_bytes,
            entries=len(self.catalogue),
            waiting=len(saving),
            saved=dict(saving.saved),
            not_saved=dict(saving.not_saved),
            loads=dict(loading.outcomes),
            refused=dict(loading.refused),
            loaded_tokens=loading.num_tokens,
            loaded_bytes=loading.num_bytes,
            spent_s=self._storage.spent_s,
        )
