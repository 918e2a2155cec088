"""Pages and slots in one byte budget: who holds them, and what is evicted when room is needed.

What the tree holds is evicted piece by piece: first the pages that no state needs, then states (checkpoints, prompt
ends and messages) by the policy's score. Fixed items are neither evicted nor moved.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from hybrid_cache.cache.allocator import Allocator, Ledger
from hybrid_cache.cache.claims import Claims, Spare
from hybrid_cache.cache.commands import Copy, Emit, Item, Move, Seal, Unseal, Verify
from hybrid_cache.cache.eviction import EvictionQueues
from hybrid_cache.cache.fates import End, Fates
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.host import HostTier
from hybrid_cache.cache.journal import Journal, Nobody, Place, Watcher
from hybrid_cache.cache.policies.base import Policy, Worth
from hybrid_cache.cache.tree import (
    Checkpoint,
    Kept,
    LayerInputs,
    Node,
    Outside,
    PrefixTree,
    PromptEnd,
    StoredMessage,
)
from hybrid_cache.errors import OwnershipError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost
from hybrid_cache.stats import DiskStats

MOST_ASKED = 32  # claimed pages and states that are asked about each time that room is needed; then there is none


class Lower(Protocol):
    """A tier that outlives this one, as far as it is told what happens here."""

    @property
    def stats(self) -> DiskStats: ...
    def drop(self, may: Callable[[str], bool]) -> None: ...
    def published(self, kept: Kept) -> None: ...
    def published_page(self, node: Node) -> None: ...
    def leaving(self, kept: Kept | Node, *, dropped: bool) -> None: ...


class Pool:
    """See the module docstring. No room is never an error: `take` returns None."""

    def __init__(
        self,
        geometry: Geometry,
        cost: PrefillCost,
        budget_bytes: int,
        policy: Policy,
        tree: PrefixTree,
        clock: Callable[[], float],
        emit: Emit,
        *,
        stateless: bool,
        verify: bool,
    ) -> None:
        """stateless: a model of attention layers only   verify: report what is published, used and given up"""
        self.geometry = geometry
        self.tree = tree
        self.policy = policy
        self.clock = clock
        self.emit = emit
        self.verifies = verify
        self._cost = cost
        self._budget_bytes = max(budget_bytes, 1)
        self._stateless = stateless
        self._page_tokens = tree.page_tokens
        self.item_bytes = {
            Kind.PAGE: geometry.stride_bytes(Kind.PAGE) * (tree.page_tokens // TILE),
            Kind.SLOT: geometry.stride_bytes(Kind.SLOT),
        }
        self.allocator: Allocator | Ledger = Allocator(geometry)
        if tree.page_tokens != TILE:
            self.allocator = Ledger(budget_bytes, self.item_bytes)
        # For compaction: who holds each small item that may be moved.
        self.page_owner: dict[int, Node | PromptEnd | Outside] = {}
        self.slot_owner: dict[int, Kept] = {}
        self.extra_slots: set[int] = set()  # of what is published outside the tree, beside its state; these never move
        policy.open(self.worth, clock)
        self.queues = EvictionQueues(policy, clock)
        self.admissions: Counter[str] = Counter()
        self.declines: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        self.num_compactions = 0
        self._num_asked = 0
        self.claims = Claims(stateless=stateless)
        self.host: HostTier | None = None
        self.disk: Lower | None = None
        self.fates = Fates(clock)
        self.watcher: Watcher = Nobody()

    def watch(self, journal: Journal) -> None:
        """From now on, a journal has what requests may start from."""
        journal.begin(self._places)
        self.watcher = journal

    def _places(self) -> Iterable[Place]:
        yield from (kept for kept in self.slot_owner.values() if isinstance(kept, Checkpoint | PromptEnd))
        if self._stateless:
            yield from (node for node in self.tree.nodes() if node.parent is not None)

    @property
    def extra_kind(self) -> Kind:
        """The kind of the items that hold what the tokens of a message do to the states."""
        return Kind.PAGE if self.geometry.page_bytes else Kind.SLOT

    def bytes_of(self, num_slots: int, num_pages: int) -> int:
        return num_slots * self.item_bytes[Kind.SLOT] + num_pages * self.item_bytes[Kind.PAGE]

    def items(self, kept: Kept) -> tuple[Item, ...]:
        """All items that a state owns; its slot comes first, if it has one."""
        if isinstance(kept, LayerInputs):
            return tuple((self.extra_kind, item) for item in kept.items)
        if isinstance(kept, StoredMessage):
            pages = ((Kind.PAGE, page) for page in kept.pages)
            return ((Kind.SLOT, kept.slot), *pages, *((self.extra_kind, item) for item in kept.extra))
        tail = kept.page if isinstance(kept, PromptEnd) else None
        return ((Kind.SLOT, kept.slot), *([(Kind.PAGE, tail)] if tail is not None else []))

    def _others(self, kept: Kept, kind: Kind) -> list[int]:
        """Its items of a kind, without the slot that holds its state."""
        items = self.items(kept)
        return [item for each, item in (items if isinstance(kept, LayerInputs) else items[1:]) if each is kind]

    # Room

    def fits(self, num_pages: int, num_slots: int, num_held: int = 0) -> bool:
        """Whether there is room once all that may go is evicted. num_held: pages that must stay, but may be moved."""
        return self.allocator.fits(num_pages + num_held, num_slots)

    def take(
        self,
        *,
        num_slots: int = 0,
        num_pages: int = 0,
        num_held: int = 0,
        ceiling: float | None = None,
        spare: Spare | None = None,
    ) -> tuple[list[int], list[int]] | None:
        """num_slots slots and num_pages pages, now fixed, or None. Evicts what scores up to `ceiling`; None: anything.

        spare: whether a claim protects what it lies on; None: none does
        Nothing is evicted when even an empty tree would not leave enough room.
        """
        if not self.fits(num_pages, num_slots, num_held):
            return None
        self._num_asked = 0
        wanted = [Kind.SLOT] * num_slots + [Kind.PAGE] * num_pages
        wanted.sort(key=lambda kind: kind is not self.allocator.large)
        taken: dict[Kind, list[int]] = {Kind.SLOT: [], Kind.PAGE: []}
        for kind in wanted:
            item = self._take(kind, ceiling, spare)
            if item is None:
                assert ceiling is not None or spare is not None
                self._give_all(taken)
                return None
            self.allocator.fix(kind, item)
            taken[kind].append(item)
        return taken[Kind.SLOT], taken[Kind.PAGE]

    def give(self, kind: Kind, item: int) -> None:
        """Takes an item back."""
        self.allocator.give(kind, item)

    def _give_all(self, taken: dict[Kind, list[int]]) -> None:
        for kind, items in taken.items():
            for item in items:
                self.give(kind, item)

    def _take(self, kind: Kind, ceiling: float | None, spare: Spare | None) -> int | None:
        while (item := self.allocator.take(kind)) is None:
            if not ((kind is self.allocator.large and self._compact()) or self._evict_next(ceiling, spare)):
                return None
        return item

    def copy(self, kind: Kind, source: int, target: int) -> None:
        """Copies an item's bytes. Raises OwnershipError if the target was published."""
        self.check_unpublished(kind, (target,))
        self.emit(Copy(kind, source, target))

    def check_unpublished(self, kind: Kind, items: Iterable[int]) -> None:
        """To be called with items that are about to be written to. Raises OwnershipError for one that was published."""
        published: Mapping[int, object] = self.page_owner if kind is Kind.PAGE else self.slot_owner
        for item in items:
            if item in published or (kind is Kind.SLOT and item in self.extra_slots):
                raise OwnershipError(f"{kind.value} {item} would be written to after it was published")

    def _compact(self) -> bool:
        """Moves small items together so that one slab becomes empty -> whether that was possible."""
        moves = self.allocator.compact()
        if not moves:
            return False
        kind = Kind.PAGE if self.allocator.large is Kind.SLOT else Kind.SLOT
        self.check_unpublished(kind, (target for _, target in moves))
        self.emit(Move(kind, tuple(moves)))
        for source, target in moves:
            self._rename(kind, source, target)
        self.num_compactions += 1
        return True

    def _rename(self, kind: Kind, source: int, target: int) -> None:
        """Notes with the owner of a small item that the item has moved."""
        if kind is Kind.SLOT:
            kept = self.slot_owner[target] = self.slot_owner.pop(source)
            assert not isinstance(kept, LayerInputs)
            kept.slot = target
        else:
            owner = self.page_owner[target] = self.page_owner.pop(source)
            if isinstance(owner, StoredMessage):
                pages = owner.pages if source in owner.pages else owner.extra
                pages[pages.index(source)] = target
            elif isinstance(owner, LayerInputs):
                owner.items[owner.items.index(source)] = target
            else:
                owner.page = target

    # What is published

    def publish_page(self, node: Node) -> None:
        """A new node of the tree owns its page."""
        self.page_owner[node.page] = node
        self._seal(((Kind.PAGE, node.page),), f"tokens up to {node.num_tokens} of {node.namespace}")
        if self.disk is not None:
            self.disk.published_page(node)
        assert node.parent is not None
        self._report_rise(node.parent, 2)
        if self._stateless:
            self.watcher.came(node)

    def publish(self, kept: Kept, path: Iterable[Node]) -> None:
        """Files a new state. path: the nodes of the request that made it"""
        if not isinstance(kept, LayerInputs):
            self.slot_owner[kept.slot] = kept
        if not isinstance(kept, Checkpoint):
            self.page_owner.update((item, kept) for item in self._others(kept, Kind.PAGE))
        self.extra_slots.update(self._others(kept, Kind.SLOT))
        self._seal(self.items(kept), kept.title)
        if isinstance(kept, Checkpoint | PromptEnd):
            self.watcher.came(kept)
        self.admissions[kept.label] += 1
        self.stamp(kept, path)
        self.unguard(kept)
        if self.disk is not None:
            self.disk.published(kept)

    def verify(self, items: Iterable[Item]) -> None:
        """To be called with published items that are about to be read."""
        if self.verifies:
            self.emit(Verify(tuple(items)))

    def _seal(self, items: tuple[Item, ...], what: str) -> None:
        if self.verifies:
            self.emit(Seal(items, what))

    def _unseal(self, items: tuple[Item, ...]) -> None:
        if self.verifies:
            self.emit(Unseal(items))

    def guard(self, kept: Kept) -> None:
        """Neither evicted nor moved until `unguard`."""
        self.queues.withdraw(kept)
        for kind, item in self.items(kept):
            self.allocator.fix(kind, item)

    def unguard(self, kept: Kept) -> None:
        for kind, item in self.items(kept):
            self.allocator.unfix(kind, item)
        self.queues.add(kept)

    def stamp(self, kept: Kept, path: Iterable[Node]) -> None:
        """Notes that a state was made or used now."""
        self.policy.used(kept, path)
        kept.last_used, kept.uses = self.clock(), kept.uses + 1
        if isinstance(kept, Checkpoint) and kept.ttl_s:
            kept.keep_until = self.clock() + kept.ttl_s

    # Eviction

    def _evict_next(self, ceiling: float | None, spare: Spare | None = None) -> bool:
        """Evicts what is worth least -> whether there was anything, and it scored no more than `ceiling`."""
        while (node := self.queues.next_dead()) is not None:
            if not self._spares(node, spare):
                self.evict_page(node)
                return True
            if not self._pass_over(node):
                return False
        while (lowest := self.queues.next_scored()) is not None:
            score, kept = lowest
            if ceiling is not None and score > ceiling:  # of two that are worth the same, the newer stays
                return False
            if not self._spares(kept, spare):
                self.evict(kept, score)
                return True
            if not self._pass_over(kept):
                return False
        if self._expose_spared(ceiling, spare):
            return self._evict_next(ceiling, spare)
        guaranteed = self.queues.next_guaranteed() if ceiling is None else None
        if guaranteed is None or self._spares(guaranteed, spare):
            return False
        self.evict(guaranteed)
        return True

    def _spares(self, item: Kept | Node, spare: Spare | None) -> bool:
        return spare is not None and any(spare(claim) for claim in self.claims.on(item))

    def _pass_over(self, item: Kept | Node) -> bool:
        """Takes what is spared out of the way -> whether more may be asked about for the room that is wanted now."""
        self.queues.spare(item)
        self._num_asked += 1
        return self._num_asked < MOST_ASKED

    def _expose_spared(self, ceiling: float | None, spare: Spare | None) -> bool:
        """Puts something that was passed over back -> whether there was anything that may go now."""
        if ceiling is not None and spare is None:
            return False
        while (item := self.queues.spared(due=spare is not None)) is not None:
            if not self._spares(item, spare):
                self.queues.expose(item)
                return True
            if not self._pass_over(item):
                return False
        return False

    def evict_page(self, node: Node, end: End = End.EVICTED) -> None:
        """Takes out a node that no state needs. end: what is said of it later"""
        assert node.parent is not None
        if self.disk is not None:
            self.disk.leaving(node, dropped=end is End.DROPPED)
        self.queues.withdraw_dead(node)
        self.tree.remove(node)
        self._unseal(((Kind.PAGE, node.page),))
        if self.host is not None and end is End.EVICTED:
            self.host.keep_page(node)
        self.give(Kind.PAGE, node.page)
        del self.page_owner[node.page]
        if end is End.EVICTED:
            self.evictions["page"] += 1
        self.fates.lost_page(node.name, end)
        self.claims.lost(node)
        if self._stateless:
            self.watcher.went(node)
        self._report_rise(node.parent, 1)
        self.settle(node.parent)

    def evict(self, kept: Kept, score: float = -math.inf, end: End = End.EVICTED) -> None:
        self.detach(kept, score, end)
        for kind, item in self.items(kept):
            self.give(kind, item)

    def detach(self, kept: Kept, score: float = -math.inf, end: End = End.EVICTED) -> None:
        """Takes a state out of the tree, or a message out of the store; its items are the caller's."""
        if self.disk is not None:
            self.disk.leaving(kept, dropped=end is End.DROPPED)
        self.queues.withdraw(kept)
        self._unseal(self.items(kept))
        if self.host is not None and end is End.EVICTED and isinstance(kept, Checkpoint):
            self.host.keep_state(kept, claimed=bool(self.claims.on(kept)))
        if not isinstance(kept, LayerInputs):
            del self.slot_owner[kept.slot]
        for page in self._others(kept, Kind.PAGE):
            del self.page_owner[page]
        self.extra_slots.difference_update(self._others(kept, Kind.SLOT))
        kept.take_out()
        if end is End.EVICTED:
            self.evictions[kept.label] += 1
        above = None if isinstance(kept, Outside) else nearest_checkpoint(kept.node)
        self.policy.lost(kept.name, score, above)
        if isinstance(kept, Outside):
            return
        self.claims.lost(kept)
        self.watcher.went(kept)
        self.fates.lost(kept.name, kept.kind, score, end)
        if self.policy.wants_rises:
            self.rescore_below(kept.node)
        self.settle(kept.node)

    def settle(self, node: Node) -> None:
        """To be called when something that needed a node was removed."""
        if node.dead:
            if node.parent is None:
                self.tree.remove(node)
            else:
                self.queues.add_dead(node)
            return
        while len(node.children) == 1 and not (node.checkpoint or node.ends):
            node = next(iter(node.children.values()))
        if not node.children and len(node.ends) + (node.checkpoint is not None) == 1:
            self._rescore(node.checkpoint or next(iter(node.ends.values())))  # more pages would go with it than before

    def _report_rise(self, node: Node, num_children: int) -> None:
        """To be called when a node has got or lost a child."""
        if self.policy.wants_rises and node.checkpoint is not None and len(node.children) == num_children:
            self._rescore(node.checkpoint)

    def rescore_below(self, node: Node) -> None:
        """To be called when a node has got or lost its checkpoint: the next states below save less or more."""
        nodes = [node]
        while nodes:
            below = nodes.pop()
            for state in (below.checkpoint, *below.ends.values()):
                if state is not None:
                    self._rescore(state)
            if below is node or below.checkpoint is None:
                nodes += below.children.values()

    def _rescore(self, kept: Kept) -> None:
        """Queues a state again whose score may have fallen. One that has risen is noticed when it is the lowest."""
        if kept in self.queues:
            self.queues.add(kept)

    def worth(self, kept: Kept) -> Worth:
        """What evicting a state would cost in FLOPs, and free in bytes."""
        start = kept.resume_without()
        if isinstance(kept, LayerInputs):
            num_bytes = len(kept.items) * self.item_bytes[self.extra_kind]
            return Worth(kept.spared.flops(start, kept.num_tokens), num_bytes)
        if self._stateless and not isinstance(kept, StoredMessage):
            start = (kept.num_tokens - 1) // self._page_tokens * self._page_tokens
        flops = self._cost.flops(start, kept.num_tokens)
        return Worth(flops, self.bytes_of(1, kept.pages_freed()), self.share(start, kept.num_tokens))

    def share(self, start: int, end: int) -> float:
        """Of the budget, what the pages of the tokens [start, end) take."""
        return self.bytes_of(0, -(-(end - start) // self._page_tokens)) / self._budget_bytes


def nearest_checkpoint(node: Node) -> Checkpoint | None:
    """Deepest checkpoint at or above `node`, where its requests resume."""
    above: Node | None = node
    while above is not None and above.checkpoint is None:
        above = above.parent
    return above.checkpoint if above else None
