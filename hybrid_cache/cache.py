"""The cache: KV pages and recurrent states of all requests, in one byte budget.

Only `HybridCache` changes the tree and the arena, on one thread. Who owns what of a running sequence:

    [0, lease.shared)            pages of tree nodes on the lease's path, pinned; never written again
    [lease.shared, written)      pages of the lease alone; `commit` gives full ones to the tree, or takes the tree's page
                                 instead when someone was faster
    [written, covered)           pages of the lease alone, reserved, not yet written
    lease.slot                   the working state, always the lease's alone: states are copied in and out of it

What the tree holds is evicted piece by piece: states (checkpoints and prompt ends) by the policy's score, and pages that no state
needs before any of them. A lease pins its pages. It does not pin states, since it has its own copy.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from hybrid_cache.arena import Allocator, Arena, Geometry, Kind
from hybrid_cache.batch import CacheTensors
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.policy import FlopsPerByte, Policy
from hybrid_cache.request import TokenArray
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.tree import KEY_BYTES, Checkpoint, CheckpointKind, Kept, Node, PrefixTree, PromptEnd, token_bytes


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt."""

    namespace: str
    path: tuple[Node, ...]  # nodes of [0, shared)
    length: int  # tokens the request may skip: a grid position below the prompt's end, or all of it with `end`
    shared: int  # tokens whose pages are there; more than `length` marks a branch point
    checkpoint: Checkpoint | None
    end: PromptEnd | None  # the whole prompt was seen: nothing needs computing


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot that the coming forward pass fills with the state at a grid position."""

    position: int
    slot: int
    kind: CheckpointKind
    keep_until: float


@dataclass(slots=True, eq=False)
class Lease:
    """What one running sequence holds."""

    namespace: str
    data: bytes  # the prompt's tokens as int32 bytes
    publish: bool
    root: Node
    nodes: list[Node]  # pinned path; its pages come first in `pages`
    pages: list[int]  # page of each TILE tokens
    slot: int  # working state
    length: int  # tokens that the state held when it was acquired
    end: PromptEnd | None
    reserved: list[Reservation] = field(default_factory=list)
    written_tokens: int = 0  # tokens whose pages this lease has added to the tree
    released: bool = False

    @property
    def shared(self) -> int:
        """Tokens whose pages belong to the tree."""
        return len(self.nodes) * TILE

    @property
    def tip(self) -> Node:
        """The last node of the path, or the root."""
        return self.nodes[-1] if self.nodes else self.root


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot. Bytes are what items take from the budget."""

    budget_bytes: int
    free_bytes: int
    kv_bytes: int  # pages of the tree
    checkpoint_bytes: int
    prompt_end_bytes: int
    working_bytes: int  # pages and states of running sequences, and slots about to be filled
    nodes: int
    checkpoints: int
    prompt_ends: int
    hit_tokens: int  # tokens skipped
    kv_only_tokens: int  # tokens whose pages were there but whose state was not, computed again
    miss_tokens: int
    admissions: dict[str, int]  # by kind
    declines: dict[str, int]  # by kind
    evictions: dict[str, int]  # by kind, and "page"
    compactions: int

    @property
    def num_evictions(self) -> int:
        return sum(self.evictions.values())


class HybridCache:
    """See the module docstring. No room is never an error: methods return None or False."""

    def __init__(
        self,
        spec: CacheSpec,
        cost: PrefillCost,
        budget_bytes: int,
        policy: Policy | None = None,
        *,
        device: str = "cpu",
        with_tensors: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`with_tensors=False` keeps the books only, for simulations. Raises ConfigError for too small a budget."""
        self._budget_bytes = budget_bytes
        self._cost = cost
        self._policy = policy or FlopsPerByte()
        self._clock = clock
        self._geometry = Geometry.of(spec, budget_bytes)
        self._allocator = Allocator(self._geometry)
        self._arena = Arena(spec, self._geometry, device) if with_tensors else None
        self._tree = PrefixTree()
        # For compaction: who holds each small item that may be moved.
        self._page_owner: dict[int, Node | PromptEnd] = {}
        self._slot_owner: dict[int, Kept] = {}
        self._leases: set[Lease] = set()
        self._kept: set[Kept] = set()
        self._queue: list[tuple[float, int, int, Kept]] = []  # (score, tie-break, version, state)
        self._dead: list[tuple[float, int, Node]] = []  # (last used, tie-break, node)
        self._ticket = 0
        self._admissions: Counter[str] = Counter()
        self._declines: Counter[str] = Counter()
        self._evictions: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._compactions = 0

    @property
    def tensors(self) -> CacheTensors:
        """Views of all pages and slots by layer. Only for a cache with tensors."""
        assert self._arena is not None
        return self._arena.tensors

    def fits(self, num_tokens: int) -> bool:
        """Whether one sequence of this length fits into an otherwise empty cache."""
        need = self._geometry.units(Kind.SLOT) + self._geometry.units(Kind.PAGE) * -(-num_tokens // TILE)
        return need <= self._geometry.num_units // self._geometry.span * self._geometry.span

    # What requests do

    def match(self, namespace: str, tokens: TokenArray) -> Match:
        """The longest usable part of a prompt. Changes nothing."""
        path = self._tree.walk(namespace, tokens)
        full = len(tokens) // TILE
        tip = path[-1] if path else self._tree.roots.get(namespace)
        end = tip.ends.get(token_bytes(tokens[full * TILE :])) if tip is not None and len(path) == full else None
        if end is not None:
            return Match(namespace, path, len(tokens), len(path) * TILE, None, end)
        usable = (n.checkpoint for n in reversed(path) if n.checkpoint and n.num_tokens < len(tokens))
        checkpoint = next(usable, None)
        length = checkpoint.num_tokens if checkpoint else 0
        return Match(namespace, path, length, len(path) * TILE, checkpoint, None)

    def acquire(self, match: Match, tokens: TokenArray, *, publish: bool = True) -> Lease | None:
        """Pins what was matched and takes a working state and pages for all of `tokens`; all or nothing.

        The working state holds the matched state, if there is one. With `publish=False` nothing of it enters the tree.
        """
        source = match.end or match.checkpoint
        root = self._tree.root(match.namespace)
        self._pin(root, match.path)
        if source is not None:
            source.locks += 1
        taken = self._take_all(num_slots=1, num_pages=-(-len(tokens) // TILE) - len(match.path))
        if source is not None:
            source.locks -= 1
        if taken is None:
            self._unpin(root, match.path)
            return None
        slots, own = taken
        pages = [n.page for n in match.path] + own
        lease = Lease(
            match.namespace,
            token_bytes(tokens),
            publish,
            root,
            list(match.path),
            pages,
            slots[0],
            match.length,
            match.end,
        )
        self._leases.add(lease)
        self._count_match(match, len(tokens))
        if source is not None:
            self._copy(Kind.SLOT, source.slot, lease.slot)
            self._touch(source)
        if match.end is not None and match.end.page is not None:
            self._copy(Kind.PAGE, match.end.page, pages[-1])
        return lease

    def extend(self, lease: Lease, num_tokens: int) -> bool:
        """Takes pages until the lease covers `num_tokens`; False and unchanged when there is no room."""
        missing = -(-num_tokens // TILE) - len(lease.pages)
        taken = self._take_all(num_slots=0, num_pages=max(missing, 0))
        if taken is None:
            return False
        lease.pages += taken[1]
        return True

    def reserve_checkpoint(
        self, lease: Lease, position: int, kind: CheckpointKind, *, ttl_s: float | None = None
    ) -> int | None:
        """A slot for the forward pass to fill with the state at `position`, a grid position not yet committed.

        None when the lease does not publish, the place is taken, or the policy would have to evict something better.
        """
        if not lease.publish or position == 0 or any(r.position == position for r in lease.reserved):
            return None
        index = position // TILE - 1
        if index < len(lease.nodes) and lease.nodes[index].checkpoint is not None:
            return None
        above = [r.position for r in lease.reserved if r.position < position]
        above += [n.num_tokens for n in lease.nodes if n.checkpoint and n.num_tokens < position]
        num_bytes = self._geometry.stride_bytes(Kind.SLOT)
        saved = self._cost.flops(max(above, default=0), position)
        slot = self._take(Kind.SLOT, ceiling=self._policy.score(self._policy.clock, kind, saved, num_bytes))
        if slot is None:
            self._declines[kind.value] += 1
            return None
        keep_until = self._clock() + ttl_s if ttl_s is not None else 0.0
        lease.reserved.append(Reservation(position, slot, kind, keep_until))
        return slot

    def commit(self, lease: Lease, num_tokens: int) -> None:
        """Publishes the pages of [0, num_tokens), a grid position, and the checkpoints reserved inside it.

        Everything there must have been written completely, by the prefill path.
        """
        if not lease.publish:
            return
        for index in range(len(lease.nodes), num_tokens // TILE):
            self._publish_page(lease, index)
        filled = [r for r in lease.reserved if r.position <= num_tokens]
        lease.reserved = [r for r in lease.reserved if r.position > num_tokens]
        for r in filled:
            node = lease.nodes[r.position // TILE - 1]
            if node.checkpoint is not None:
                self._allocator.give(Kind.SLOT, r.slot)
                continue
            node.checkpoint = Checkpoint(node, r.slot, r.kind, r.keep_until)
            self._keep(node.checkpoint)

    def commit_end(self, lease: Lease, tokens: TokenArray, hidden: Tensor | None) -> bool:
        """Keeps the working state as the end of the prompt `tokens`, with its last hidden row [hidden_size].

        To be called between the prompt's last tile and the first decode step. False when it is there already, the lease
        does not publish, or the policy declines.
        """
        tail = token_bytes(tokens[lease.shared :])
        if not lease.publish or len(tail) >= KEY_BYTES or tail in lease.tip.ends:
            return False
        kind, num_pages = CheckpointKind.PROMPT_END, 1 if tail else 0
        saved = self._cost.flops(lease.tip.resume_point(), len(tokens))
        num_bytes = self._geometry.stride_bytes(Kind.SLOT) + num_pages * self._geometry.stride_bytes(Kind.PAGE)
        ceiling = self._policy.score(self._policy.clock, kind, saved, num_bytes)
        taken = self._take_all(num_slots=1, num_pages=num_pages, ceiling=ceiling)
        if taken is None:
            self._declines[kind.value] += 1
            return False
        slots, pages = taken
        end = PromptEnd(lease.tip, tail, slots[0], pages[0] if pages else None)
        self._copy(Kind.SLOT, lease.slot, end.slot)
        if end.page is not None:
            self._copy(Kind.PAGE, lease.pages[len(lease.nodes)], end.page)
            self._page_owner[end.page] = end
        if self._arena is not None and hidden is not None:
            self._arena.hidden[end.slot] = hidden
        lease.tip.ends[tail] = end
        self._keep(end)
        return True

    def hidden(self, lease: Lease) -> Tensor:
        """The last hidden row [hidden_size] of the prompt end that a lease was acquired from."""
        assert self._arena is not None
        assert lease.end is not None
        return self._arena.hidden[lease.slot].clone()

    def fork(self, lease: Lease, num_tokens: int) -> Lease | None:
        """Another lease of the same sequence after `num_tokens`: shares the tree's pages, copies the rest and the state."""
        own = lease.pages[len(lease.nodes) : -(-num_tokens // TILE)]
        self._pin(lease.root, lease.nodes)
        taken = self._take_all(num_slots=1, num_pages=len(own))
        if taken is None:
            self._unpin(lease.root, lease.nodes)
            return None
        slots, pages = taken
        self._copy(Kind.SLOT, lease.slot, slots[0])
        for source, target in zip(own, pages, strict=True):
            self._copy(Kind.PAGE, source, target)
        fork = Lease(
            lease.namespace,
            lease.data,
            lease.publish,
            lease.root,
            list(lease.nodes),
            [n.page for n in lease.nodes] + pages,
            slots[0],
            num_tokens,
            lease.end,
        )
        self._leases.add(fork)
        return fork

    def release(self, lease: Lease) -> None:
        """Gives back all that a lease holds; what it has published stays. Idempotent."""
        if lease.released:
            return
        lease.released = True
        self._leases.remove(lease)
        for page in lease.pages[len(lease.nodes) :]:
            self._allocator.give(Kind.PAGE, page)
        for slot in [lease.slot, *(r.slot for r in lease.reserved)]:
            self._allocator.give(Kind.SLOT, slot)
        self._unpin(lease.root, lease.nodes)

    def drop(self, namespace: str | None = None) -> int:
        """Drops everything that nobody is using, of one namespace or of all -> bytes freed."""
        before = self._allocator.free_units
        for kept in [k for k in self._kept if namespace in (None, k.node.namespace)]:
            self._evict(kept)
        while self._evict_dead_page():
            pass
        return (self._allocator.free_units - before) * self._geometry.unit_bytes

    # Making room

    def _take_all(
        self, num_slots: int, num_pages: int, ceiling: float = float("inf")
    ) -> tuple[list[int], list[int]] | None:
        """So many slots and pages, or nothing at all; evicts what scores below `ceiling`."""
        slots: list[int] = []
        pages: list[int] = []
        for kind, count, taken in ((Kind.SLOT, num_slots, slots), (Kind.PAGE, num_pages, pages)):
            for _ in range(count):
                item = self._take(kind, ceiling)
                if item is None:
                    for slot in slots:
                        self._allocator.give(Kind.SLOT, slot)
                    for page in pages:
                        self._allocator.give(Kind.PAGE, page)
                    return None
                taken.append(item)
        return slots, pages

    def _take(self, kind: Kind, ceiling: float) -> int | None:
        while True:
            item = self._allocator.take(kind)
            if item is not None:
                return item
            if kind is self._geometry.large and self._compact():
                continue
            if not (self._evict_dead_page() or self._evict_lowest(ceiling)):
                return None

    def _evict_dead_page(self) -> bool:
        """Evicts the least recently used page that no state needs -> whether there was one."""
        while self._dead:
            last_used, _, node = heapq.heappop(self._dead)
            attached = node.parent is not None and node.parent.children.get(node.key) is node
            if not (attached and node.dead and node.last_used == last_used):
                continue
            parent = node.parent
            assert parent is not None
            self._tree.remove(node)
            self._allocator.give(Kind.PAGE, node.page)
            del self._page_owner[node.page]
            self._evictions["page"] += 1
            self._note_if_dead(parent)
            return True
        return False

    def _evict_lowest(self, ceiling: float) -> bool:
        """Evicts the state with the lowest score below `ceiling` -> whether there was one.

        A queued score may be out of date: it rises when the checkpoint above goes. So the score is worked out again when
        its turn comes. States in their guaranteed life go only when nothing else is left and the room must be had.
        """
        guaranteed: list[tuple[float, int, int, Kept]] = []
        victim: tuple[float, Kept] | None = None
        now = self._clock()
        while self._queue:
            queued, ticket, version, kept = heapq.heappop(self._queue)
            if not kept.attached or kept.version != version:
                continue
            score = self._score(kept)
            if score > queued:
                heapq.heappush(self._queue, (score, ticket, version, kept))
                continue
            if score >= ceiling:
                heapq.heappush(self._queue, (score, ticket, version, kept))
                break
            if kept.locks or kept.keep_until > now:
                guaranteed.append((score, ticket, version, kept))
                continue
            victim = (score, kept)
            break
        for entry in guaranteed:
            heapq.heappush(self._queue, entry)
        if victim is None and ceiling == float("inf"):
            victim = next(((score, kept) for score, _, _, kept in guaranteed if not kept.locks), None)
        if victim is None:
            return False
        self._policy.evicted(victim[0])
        self._evict(victim[1])
        return True

    def _evict(self, kept: Kept) -> None:
        self._allocator.give(Kind.SLOT, kept.slot)
        del self._slot_owner[kept.slot]
        if isinstance(kept, PromptEnd):
            del kept.node.ends[kept.tail]
            if kept.page is not None:
                self._allocator.give(Kind.PAGE, kept.page)
                del self._page_owner[kept.page]
        else:
            kept.node.checkpoint = None
        self._kept.remove(kept)
        self._evictions[kept.kind.value] += 1
        self._note_if_dead(kept.node)

    def _compact(self) -> bool:
        """Moves small items together so that one slab becomes empty -> whether that was possible."""
        kind = Kind.PAGE if self._geometry.large is Kind.SLOT else Kind.SLOT
        for slab, items in self._allocator.scattered():
            if all(self._movable(kind, item) for item in items):
                for item in items:
                    self._relocate(kind, item, self._allocator.take_outside(slab))
                self._compactions += 1
                return True
        return False

    def _movable(self, kind: Kind, item: int) -> bool:
        if kind is Kind.SLOT:
            return item in self._slot_owner and not self._slot_owner[item].locks
        owner = self._page_owner.get(item)
        return owner is not None and not (owner.pins if isinstance(owner, Node) else owner.locks)

    def _relocate(self, kind: Kind, source: int, target: int) -> None:
        self._copy(kind, source, target)
        self._allocator.give(kind, source)
        if kind is Kind.SLOT:
            kept = self._slot_owner.pop(source)
            kept.slot = target
            self._slot_owner[target] = kept
        else:
            owner = self._page_owner.pop(source)
            owner.page = target
            self._page_owner[target] = owner

    # Bookkeeping

    def _publish_page(self, lease: Lease, index: int) -> None:
        """Gives the tree the lease's page of tokens [index * TILE, ...), or takes the page that the tree has."""
        parent, key = lease.tip, lease.data[index * KEY_BYTES : (index + 1) * KEY_BYTES]
        assert len(key) == KEY_BYTES
        node = parent.children.get(key)
        if node is None:
            node = self._tree.insert(parent, key, lease.pages[index], self._clock())
            self._page_owner[node.page] = node
            lease.written_tokens += TILE
        else:
            self._allocator.give(Kind.PAGE, lease.pages[index])
            lease.pages[index] = node.page
        node.pins += 1
        lease.nodes.append(node)

    def _pin(self, root: Node, path: tuple[Node, ...] | list[Node]) -> None:
        root.pins += 1
        for node in path:
            node.pins += 1

    def _unpin(self, root: Node, path: tuple[Node, ...] | list[Node]) -> None:
        now = self._clock()
        root.pins -= 1
        for node in path:
            node.pins -= 1
            node.last_used = now
        self._note_if_dead(path[-1] if path else root)

    def _note_if_dead(self, node: Node) -> None:
        """Queues a page that no state needs any more; removes a root that has nothing."""
        if not node.dead:
            return
        if node.parent is None:
            self._tree.remove(node)
            return
        self._ticket += 1
        heapq.heappush(self._dead, (node.last_used, self._ticket, node))

    def _keep(self, kept: Kept) -> None:
        """Files a new state."""
        self._slot_owner[kept.slot] = kept
        self._kept.add(kept)
        self._admissions[kept.kind.value] += 1
        self._touch(kept)

    def _touch(self, kept: Kept) -> None:
        """Scores a state as just used."""
        self._policy.used()
        kept.base = self._policy.clock
        kept.version += 1
        self._ticket += 1
        heapq.heappush(self._queue, (self._score(kept), self._ticket, kept.version, kept))
        if len(self._queue) > 64 + 4 * len(self._kept):
            self._queue = [e for e in self._queue if e[3].attached and e[3].version == e[2]]
            heapq.heapify(self._queue)

    def _score(self, kept: Kept) -> float:
        pages = kept.pages_freed()
        num_bytes = self._geometry.stride_bytes(Kind.SLOT) + pages * self._geometry.stride_bytes(Kind.PAGE)
        saved = self._cost.flops(kept.resume_without(), kept.num_tokens)
        return self._policy.score(kept.base, kept.kind, saved, num_bytes)

    def _copy(self, kind: Kind, source: int, target: int) -> None:
        if self._arena is not None:
            self._arena.copy(kind, source, target)

    def _count_match(self, match: Match, num_tokens: int) -> None:
        kv_only = max(match.shared - match.length, 0)
        self._tokens.update(hit=match.length, kv_only=kv_only, miss=num_tokens - match.length - kv_only)

    def stats(self) -> CacheStats:
        slot_bytes, page_bytes = (self._geometry.stride_bytes(kind) for kind in (Kind.SLOT, Kind.PAGE))
        ends = sum(isinstance(k, PromptEnd) for k in self._kept)
        end_pages = len(self._page_owner) - self._tree.num_nodes
        kv_bytes = self._tree.num_nodes * page_bytes
        checkpoint_bytes = (len(self._kept) - ends) * slot_bytes
        end_bytes = ends * slot_bytes + end_pages * page_bytes
        free_bytes = self._allocator.free_units * self._geometry.unit_bytes
        used_bytes = (self._geometry.num_units - self._allocator.free_units) * self._geometry.unit_bytes
        return CacheStats(
            budget_bytes=self._budget_bytes,
            free_bytes=free_bytes,
            kv_bytes=kv_bytes,
            checkpoint_bytes=checkpoint_bytes,
            prompt_end_bytes=end_bytes,
            working_bytes=used_bytes - kv_bytes - checkpoint_bytes - end_bytes,
            nodes=self._tree.num_nodes,
            checkpoints=len(self._kept) - ends,
            prompt_ends=ends,
            hit_tokens=self._tokens["hit"],
            kv_only_tokens=self._tokens["kv_only"],
            miss_tokens=self._tokens["miss"],
            admissions=dict(self._admissions),
            declines=dict(self._declines),
            evictions=dict(self._evictions),
            compactions=self._compactions,
        )

    def nodes(self) -> Iterator[Node]:
        """All nodes, roots first in each namespace."""
        stack = list(self._tree.roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Proves that every item has one owner, pins are those of the leases, and all queues lead to what they should."""
        pages: list[int] = []
        slots: list[int] = []
        pins: Counter[Node] = Counter()
        kept: set[Kept] = set()
        for lease in self._leases:
            pages += lease.pages[len(lease.nodes) :]
            slots += [lease.slot, *(r.slot for r in lease.reserved)]
            pins.update([lease.root, *lease.nodes])
            assert [n.page for n in lease.nodes] == lease.pages[: len(lease.nodes)]
        queued = {(k, version) for _, _, version, k in self._queue}
        waiting = {node for _, _, node in self._dead}
        for node in self.nodes():
            assert node.pins == pins[node]
            assert all(child.parent is node and child.key == key for key, child in node.children.items())
            if node.parent is not None:
                pages.append(node.page)
                assert self._page_owner[node.page] is node
                assert node.num_tokens == node.parent.num_tokens + TILE
                assert not node.dead or node in waiting
            else:
                assert not node.dead
            kept.update([node.checkpoint] if node.checkpoint else [], node.ends.values())
        for k in kept:
            assert k.attached
            assert (k, k.version) in queued
            assert self._slot_owner[k.slot] is k
            slots.append(k.slot)
            if isinstance(k, PromptEnd) and k.page is not None:
                pages.append(k.page)
                assert self._page_owner[k.page] is k
        assert kept == self._kept
        assert len(self._slot_owner) == len(kept)
        assert len(set(pages)) == len(pages)
        assert len(set(slots)) == len(slots)
        self._allocator.check({Kind.PAGE: set(pages), Kind.SLOT: set(slots)})
        assert self._geometry.num_units * self._geometry.unit_bytes <= self._budget_bytes


def interior_positions(start: int, end: int) -> list[int]:
    """Grid positions inside [start, end) at which a long stretch deserves a checkpoint nobody asked for.

    They lie at tiles 8, 16, 32, 64 ... so that a branch at any place finds a state at least half as deep, for a number of
    states that grows with the logarithm of the length.
    """
    position, positions = 8 * TILE, []
    while position < end:
        if position > start:
            positions.append(position)
        position *= 2
    return positions
