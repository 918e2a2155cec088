"""The cache: KV pages and recurrent states of all requests, in one byte budget.

Only `HybridCache` changes the tree and the arena, on one thread. Who owns what of a running sequence:

    [0, lease.shared)            pages of tree nodes on the lease's path, pinned; never written again
    [lease.shared, written)      pages of the lease alone; `commit` gives full ones to the tree, or takes the tree's
                                 page instead when someone was faster
    [written, covered)           pages of the lease alone, reserved, not yet written
    lease.slot                   the working state, always the lease's alone: states are copied in and out of it

A lease that does not publish may hold anything, an approximation for one: it shares no page beyond the state that it
starts from, and nothing of it enters the tree. Published bytes never change; see `digests` for the proof.

What the tree holds is evicted piece by piece: first the pages that no state needs, then states (checkpoints and prompt
ends) by the policy's score. A lease pins its pages: they are neither evicted nor moved. It does not pin states, since
it has its own copy.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from hybrid_cache.arena import Allocator, Arena, Geometry, Kind, Ledger
from hybrid_cache.batch import CacheTensors
from hybrid_cache.digests import Digests, NoWitness, Witness, verify_by_default
from hybrid_cache.errors import OwnershipError
from hybrid_cache.eviction import EvictionQueues
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.lease import Lease, Match, Reservation
from hybrid_cache.policies.base import Outline, Policy, Wish, Worth
from hybrid_cache.policies.learned import Learned
from hybrid_cache.request import Boundary, TokenArray
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.stats import CacheStats
from hybrid_cache.tree import (
    Checkpoint,
    CheckpointKind,
    Kept,
    Keys,
    Node,
    PrefixTree,
    PromptEnd,
    StoredMessage,
    end_name,
    keys_of,
)


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
        page_tokens: int = TILE,
        clock: Callable[[], float] = time.monotonic,
        verify: bool | None = None,
    ) -> None:
        """`with_tensors=False` keeps the books only, for simulations, and allows larger pages (a multiple of TILE).

        verify: compare what was published with its digest, again and again; None: if the environment asks for it

        Raises ConfigError for too small a budget.
        """
        self._budget_bytes = budget_bytes
        self._cost = cost
        self._policy = policy or Learned()
        self._clock = clock
        self._effect_size = spec.effect_size
        self._stateless = spec.slot_bytes == 0  # attention alone: every page is a place to resume from
        self._page_tokens = page_tokens
        self._geometry = Geometry.of(spec, budget_bytes)
        self._item_bytes = {
            Kind.PAGE: self._geometry.stride_bytes(Kind.PAGE) * (page_tokens // TILE),
            Kind.SLOT: self._geometry.stride_bytes(Kind.SLOT),
        }
        self._allocator: Allocator | Ledger = Allocator(self._geometry)
        if page_tokens != TILE:
            assert not with_tensors
            self._allocator = Ledger(budget_bytes, self._item_bytes)
        self._arena = Arena(spec, self._geometry, device) if with_tensors else None
        verify = verify_by_default() if verify is None else verify
        self._witness: Witness = Digests(self._arena.digest) if verify and self._arena is not None else NoWitness()
        self._tree = PrefixTree(page_tokens)
        # For compaction: who holds each small item that may be moved.
        self._page_owner: dict[int, Node | PromptEnd | StoredMessage] = {}
        self._slot_owner: dict[int, Kept] = {}
        self._leases: set[Lease] = set()
        self._messages: dict[str, StoredMessage] = {}
        self._loans: set[tuple[Kind, int]] = set()  # what somebody uses for a while
        self._unwritten: set[StoredMessage] = set()
        self._scratch_slot: int | None = None
        self._policy.open(self._worth, clock)
        self._queues = EvictionQueues(self._policy, clock)
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
        return self._geometry.fits(-(-num_tokens // TILE), 1 if self._scratch_slot is None else 2)

    def scratch_slot(self) -> int | None:
        """A state slot that is nobody's, for rows that only fill a batch up; always the same one.

        Taken at the first call. None where the budget holds one sequence only.
        """
        if self._scratch_slot is None and self._geometry.fits(1, 2):
            taken = self._take_all(num_slots=1, num_pages=0)
            self._scratch_slot = taken[0][0] if taken else None
        return self._scratch_slot

    # What requests do

    def match(self, namespace: str, prompt: TokenArray | Keys) -> Match:
        """The longest usable part of a prompt. Changes nothing."""
        keys, step = as_keys(prompt), self._page_tokens
        path = self._tree.walk(namespace, keys.pages)
        tip = path[-1] if path else self._tree.roots.get(namespace)
        end = tip.ends.get(keys.tail) if tip is not None and len(path) == len(keys.pages) else None
        if end is not None:
            return Match(namespace, keys, path, keys.num_tokens, len(path) * step, None, end)
        if self._stateless:
            length = min(len(path), max(keys.num_tokens - 1, 0) // step) * step
            return Match(namespace, keys, path, length, len(path) * step, None, None)
        usable = (n.checkpoint for n in reversed(path) if n.checkpoint and n.num_tokens < keys.num_tokens)
        checkpoint = next(usable, None)
        length = checkpoint.num_tokens if checkpoint else 0
        return Match(namespace, keys, path, length, len(path) * step, checkpoint, None)

    def acquire(self, match: Match, prompt: TokenArray | Keys, *, publish: bool = True) -> Lease | None:
        """Pins what was matched and takes a working state and pages for all of a prompt; all or nothing.

        The working state holds the matched state, if there is one. What was evicted since is looked for again, as far
        as the match did. With `publish=False` nothing of the lease enters the tree, and all pages beyond the state that
        it starts from are its own: it may write there what the tree must never hold.
        """
        keys = as_keys(prompt)
        match = self._renew(match)
        if not publish:
            match = match.up_to_its_state(self._page_tokens)
        root = self._tree.root(match.namespace)
        num_held = sum(not node.pins for node in match.path)
        self._pin(root, match.path)
        num_pages = -(-keys.num_tokens // self._page_tokens) - len(match.path)
        taken = self._take_for(match, num_pages, num_held)
        if taken is not None:
            return self._open(match, keys, publish, *taken)
        source = match.end or match.checkpoint
        in_the_way = source is not None and self._fits(num_pages, 1, num_held)
        self._unpin(root, match.path)
        if source is None or not in_the_way:
            return None
        self._evict(source)
        return self.acquire(self.match(match.namespace, match.keys), keys, publish=publish)

    def plan(
        self,
        lease: Lease,
        boundaries: Sequence[Boundary] = (),
        *,
        only_marked: bool = False,
        generated: bool = False,
        again: bool = False,
    ) -> list[Wish]:
        """Where the policy would like checkpoints of a prompt that was just acquired; see `Outline`."""
        if not lease.publish:
            return []
        outline = Outline(
            lease.namespace,
            lease.keys,
            lease.length,
            lease.shared,
            self._page_tokens,
            tuple(boundaries),
            only_marked,
            generated,
            again,
        )
        return list(self._policy.plan(outline))

    def extend(self, lease: Lease, num_tokens: int) -> bool:
        """Takes pages until the lease covers `num_tokens`; False and unchanged when there is no room."""
        missing = -(-num_tokens // self._page_tokens) - len(lease.pages)
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
        The state, once it is there, is kept for at least `ttl_s` after each use unless nothing else is left to evict.
        """
        if not lease.publish or self._stateless or position <= lease.length:
            return None
        index = position // self._page_tokens - 1
        node = lease.nodes[index] if index < len(lease.nodes) else None
        if any(r.position == position for r in lease.reserved) or (node and (node.checkpoint or node.awaited)):
            return None
        score = self._candidate_score(lease, position, kind)
        taken = None if score is None else self._take_all(num_slots=1, num_pages=0, ceiling=score)
        if taken is None:
            self._decline(lease, position, kind, score)
            return None
        if node is not None:
            node.awaited = True
        lease.reserved.append(Reservation(position, taken[0][0], kind, ttl_s or 0.0, node))
        return taken[0][0]

    def commit(self, lease: Lease, num_tokens: int) -> None:
        """Publishes the pages of [0, num_tokens), a grid position, and the checkpoints reserved inside it.

        Everything there must have been written completely, by the prefill path.
        """
        self._witness.look_around()
        if not lease.publish:
            return
        for index in range(len(lease.nodes), num_tokens // self._page_tokens):
            self._publish_page(lease, index)
        filled = [r for r in lease.reserved if r.position <= num_tokens]
        lease.reserved = [r for r in lease.reserved if r.position > num_tokens]
        for r in filled:
            if r.node is not None:
                r.node.awaited = False
            node = lease.nodes[r.position // self._page_tokens - 1]
            if node.checkpoint is not None:
                self._allocator.give(Kind.SLOT, r.slot)
                continue
            node.checkpoint = Checkpoint(node, r.slot, r.kind, r.ttl_s)
            self._keep(node.checkpoint, lease)
            self._rescore_below(node)

    def commit_end(self, lease: Lease, hidden: Tensor | None) -> bool:
        """Keeps the working state as the end of the lease's prompt, with its last hidden row [hidden_size].

        To be called between the prompt's last tile and the first decode step. False when it is there already, the lease
        does not publish, or the policy declines.
        """
        tail, num_tokens = lease.keys.tail, lease.keys.num_tokens
        if not lease.publish or len(lease.nodes) < len(lease.keys.pages) or tail in lease.tip.ends:
            return False
        kind, num_pages = CheckpointKind.PROMPT_END, 1 if tail and self._geometry.page_bytes else 0
        score = self._candidate_score(lease, num_tokens, kind)
        taken = None if score is None else self._take_all(num_slots=1, num_pages=num_pages, ceiling=score)
        if taken is None:
            self._decline(lease, num_tokens, kind, score)
            return False
        slots, pages = taken
        end = PromptEnd(lease.tip, tail, num_tokens, slots[0], pages[0] if pages else None)
        self._copy(Kind.SLOT, lease.slot, end.slot)
        if end.page is not None:
            self._copy(Kind.PAGE, lease.pages[len(lease.nodes)], end.page)
            self._page_owner[end.page] = end
        if self._arena is not None and hidden is not None:
            self._arena.hidden[end.slot] = hidden
        lease.tip.ends[tail] = end
        self._keep(end, lease)
        return True

    def hidden(self, lease: Lease) -> Tensor:
        """The last hidden row [hidden_size] of the prompt end that a lease was acquired from."""
        assert self._arena is not None
        assert lease.end is not None
        return self._arena.hidden[lease.slot].clone()

    def fork(self, lease: Lease, num_tokens: int) -> Lease | None:
        """Another lease of the same sequence, whose state is the one after `num_tokens`.

        It covers as much as the first: the tree's pages are shared, the others and the state are copied.
        """
        own = lease.pages[len(lease.nodes) :]
        taken = self._take_all(num_slots=1, num_pages=len(own))
        if taken is None:
            return None
        slots, pages = taken
        self._pin(lease.root, lease.nodes)
        self._copy(Kind.SLOT, lease.slot, slots[0])
        num_written = max(-(-num_tokens // self._page_tokens) - len(lease.nodes), 0)
        for source, target in zip(own[:num_written], pages, strict=False):
            self._copy(Kind.PAGE, source, target)
        fork = Lease(
            lease.namespace,
            lease.keys,
            lease.publish,
            lease.root,
            list(lease.nodes),
            lease.pages[: len(lease.nodes)] + pages,
            slots[0],
            num_tokens,
            lease.end,
        )
        self._leases.add(fork)
        return fork

    def release(self, lease: Lease, num_output_tokens: int | None = None) -> None:
        """Gives back all that a lease holds; what it has published stays. Idempotent.

        `num_output_tokens` tells the policy how long the answer was, if the request is done.
        """
        if lease.released:
            return
        lease.released = True
        if num_output_tokens is not None and lease.keys.pages:
            self._policy.finished(lease.namespace, lease.keys.names[-1], num_output_tokens)
        self._witness.look_around()
        self._leases.remove(lease)
        for page in lease.pages[len(lease.nodes) :]:
            self._allocator.give(Kind.PAGE, page)
        for slot in [lease.slot, *(r.slot for r in lease.reserved)]:
            self._allocator.give(Kind.SLOT, slot)
        for r in lease.reserved:
            if r.node is not None:
                r.node.awaited = False
        self._unpin(lease.root, lease.nodes)

    def drop(self, namespace: str | None = None) -> int:
        """Drops everything that nobody is using, of one namespace or of all -> bytes freed."""
        before = self._allocator.free_bytes
        for kept in [k for k in self._slot_owner.values() if namespace in (None, k.node.namespace)]:
            if not (isinstance(kept, StoredMessage) and kept.holders):
                self._evict(kept)
        for node in [n for n in self.nodes() if n.dead and namespace in (None, n.namespace)]:
            while node.dead and node.parent is not None:
                self._evict_page(node)
                node = node.parent
        return self._allocator.free_bytes - before

    # What a choreography keeps

    def message(self, key: str) -> StoredMessage | None:
        """What is stored under a key."""
        return self._messages.get(key)

    def lend_extra(self, namespace: str, key: str, start: int, end: int) -> list[int] | None:
        """Items for what the tokens [start, end) do to the states, while they are being computed; see `numbers`.

        They end in `reserve_message` or `return_extra`. None where the policy would give no room to such a message.
        """
        num_extra, kind = self._num_extra, self._extra_kind
        score = self._message_score(namespace, key, start, end)
        slots, pages = (num_extra, 0) if kind is Kind.SLOT else (0, num_extra)
        taken = None if score is None else self._take_all(num_slots=slots, num_pages=pages, ceiling=score)
        if taken is None:
            self._declines["message"] += 1
            return None
        items = taken[0] + taken[1]
        self._loans.update((kind, item) for item in items)
        return items

    def return_extra(self, items: Sequence[int]) -> None:
        for item in items:
            self._return(self._extra_kind, item)

    def reserve_message(
        self, namespace: str, key: str, start: int, end: int, position: int, extra: Sequence[int]
    ) -> StoredMessage | None:
        """Room for rows and states of the tokens [start, end) of a sequence, to be written.

        extra: lent items with what they do to the states, which become the message's
        None when the key is taken, or the policy would have to evict something better; `extra` is lent as before.
        """
        if key in self._messages:
            return None
        num_pages, score = self._message_pages(start, end), self._message_score(namespace, key, start, end)
        taken = None if score is None else self._take_all(num_slots=1, num_pages=num_pages, ceiling=score)
        if taken is None:
            self._declines["message"] += 1
            return None
        slots, pages = taken
        self._loans.difference_update((self._extra_kind, item) for item in extra)
        root = Node(namespace, None, b"", 0, -1, 0.0)
        stored = StoredMessage(root, key, start, end, position, slots[0], pages, list(extra))
        self._unwritten.add(stored)
        return stored

    def _message_pages(self, start: int, end: int) -> int:
        return -(-(end - start) // self._page_tokens) if self._geometry.page_bytes else 0

    def _message_score(self, namespace: str, key: str, start: int, end: int) -> float | None:
        """The score that a message with these tokens would have."""
        items = self._bytes(1, self._message_pages(start, end)) + self._num_extra * self._item_bytes[self._extra_kind]
        worth = Worth(self._cost.flops(start, end), items)
        return self._policy.candidate(CheckpointKind.EXPLICIT, namespace, hash(key), worth)

    def publish_message(self, stored: StoredMessage) -> None:
        """From now on it can be found: everything of it has been written."""
        self._unwritten.remove(stored)
        self._messages[stored.key] = stored
        self._slot_owner[stored.slot] = stored
        for kind, item in self._items(stored)[1:]:
            if kind is Kind.PAGE:
                self._page_owner[item] = stored
        self._witness.published(self._items(stored), f"message {stored.key}")
        self._admissions["message"] += 1
        self._stamp(stored, [])
        stored.attached = True
        self._unguard(stored)

    def hold(self, stored: StoredMessage) -> None:
        """Keeps a message where it is until `let_go`."""
        self._witness.used(self._items(stored))
        if not stored.holders:
            self._guard(stored)
        stored.holders += 1

    def let_go(self, stored: StoredMessage, *, used: bool) -> None:
        """Ends one `hold`; `used` tells the policy that it was good for something."""
        stored.holders -= 1
        if used:
            self._witness.used(self._items(stored))
            self._stamp(stored, [])
        if not stored.holders:
            self._unguard(stored)

    def lend_slot(self) -> int | None:
        """A slot for a while; None when there is no room."""
        taken = self._take_all(num_slots=1, num_pages=0)
        if taken is None:
            return None
        self._loans.add((Kind.SLOT, taken[0][0]))
        return taken[0][0]

    def return_slot(self, slot: int) -> None:
        self._return(Kind.SLOT, slot)

    def _return(self, kind: Kind, item: int) -> None:
        self._loans.remove((kind, item))
        self._allocator.give(kind, item)

    def copy_slot(self, source: int, target: int) -> None:
        self._copy(Kind.SLOT, source, target)

    @property
    def numbers(self) -> Tensor:
        """Of all items that `lend_extra` gives, [items, numbers in each] float32. Only for a cache with tensors."""
        assert self._arena is not None
        return self._arena.numbers(self._extra_kind)

    @property
    def _extra_kind(self) -> Kind:
        return Kind.PAGE if self._geometry.page_bytes else Kind.SLOT

    @property
    def _num_extra(self) -> int:
        return -(-4 * self._effect_size // self._item_bytes[self._extra_kind])

    def check_unpublished(self, kind: Kind, items: Iterable[int]) -> None:
        """To be called with items that are about to be written to. Raises OwnershipError for one that was published."""
        published: Mapping[int, object] = self._page_owner if kind is Kind.PAGE else self._slot_owner
        for item in items:
            if item in published:
                raise OwnershipError(f"{kind.value} {item} would be written to after it was published")

    # Making room

    def _renew(self, match: Match) -> Match:
        """The match itself, or a new one when something of it has been evicted since."""
        source = match.end or match.checkpoint
        whole = (not match.path or match.path[-1].attached) and (source is None or source.attached)
        return match if whole else self.match(match.namespace, match.keys)

    def _take_for(self, match: Match, num_pages: int, num_held: int) -> tuple[list[int], list[int]] | None:
        """A slot that holds the matched state, and pages; the last one with the rows of a matched prompt end.

        Without room for a copy of the state, the state itself is taken out of the tree.
        """
        source = match.end or match.checkpoint
        if source is None:
            return self._take_all(num_slots=1, num_pages=num_pages, num_held=num_held)
        tail = match.end.page if match.end else None
        self._witness.used(self._items(source))
        self._guard(source)
        taken = self._take_all(num_slots=1, num_pages=num_pages, num_held=num_held)
        if taken is not None:
            self._copy(Kind.SLOT, source.slot, taken[0][0])
            if tail is not None:
                self._copy(Kind.PAGE, tail, taken[1][-1])
            self._stamp(source, match.path)
            self._unguard(source)
            return taken
        rest = self._take_all(num_slots=0, num_pages=num_pages - (tail is not None), num_held=num_held)
        if rest is None:
            self._unguard(source)
            return None
        self._detach(source)
        return [source.slot], rest[1] + ([tail] if tail is not None else [])

    def _guard(self, kept: Kept) -> None:
        """Neither evicted nor moved until `_unguard`."""
        self._queues.withdraw(kept)
        for kind, item in self._items(kept):
            self._allocator.fix(kind, item)

    def _unguard(self, kept: Kept) -> None:
        for kind, item in self._items(kept):
            self._allocator.unfix(kind, item)
        self._queues.add(kept)

    def _fits(self, num_pages: int, num_slots: int, num_held: int) -> bool:
        """Whether there would be room if all went that may go. Held: pages that must stay, but may still be moved."""
        return self._allocator.fits(num_pages + num_held, num_slots)

    def _take_all(
        self, *, num_slots: int, num_pages: int, num_held: int = 0, ceiling: float | None = None
    ) -> tuple[list[int], list[int]] | None:
        """So many slots and pages, now fixed, or None. Evicts what scores up to `ceiling`, or anything when it is None.

        Nothing is evicted when even an empty tree would not leave enough room.
        """
        if not self._fits(num_pages, num_slots, num_held):
            return None
        wanted = [Kind.SLOT] * num_slots + [Kind.PAGE] * num_pages
        wanted.sort(key=lambda kind: kind is not self._allocator.large)
        taken: dict[Kind, list[int]] = {Kind.SLOT: [], Kind.PAGE: []}
        for kind in wanted:
            item = self._take(kind, ceiling)
            if item is None:
                assert ceiling is not None
                self._give_all(taken)
                return None
            self._allocator.fix(kind, item)
            taken[kind].append(item)
        return taken[Kind.SLOT], taken[Kind.PAGE]

    def _give_all(self, taken: dict[Kind, list[int]]) -> None:
        for kind, items in taken.items():
            for item in items:
                self._allocator.give(kind, item)

    def _take(self, kind: Kind, ceiling: float | None) -> int | None:
        while (item := self._allocator.take(kind)) is None:
            if not ((kind is self._allocator.large and self._compact()) or self._evict_next(ceiling)):
                return None
        return item

    def _evict_next(self, ceiling: float | None) -> bool:
        """Evicts what is worth least -> whether there was anything, and it scored no more than `ceiling`."""
        if (node := self._queues.next_dead()) is not None:
            self._evict_page(node)
            return True
        if (lowest := self._queues.next_scored()) is not None:
            score, kept = lowest
            if ceiling is not None and score > ceiling:  # of two that are worth the same, the newer stays
                return False
            self._evict(kept, score)
            return True
        guaranteed = self._queues.next_guaranteed() if ceiling is None else None
        if guaranteed is not None:
            self._evict(guaranteed)
        return guaranteed is not None

    def _evict_page(self, node: Node) -> None:
        """Takes out a node that no state needs."""
        assert node.parent is not None
        self._queues.withdraw_dead(node)
        self._tree.remove(node)
        self._witness.gone([(Kind.PAGE, node.page)])
        self._allocator.give(Kind.PAGE, node.page)
        del self._page_owner[node.page]
        self._evictions["page"] += 1
        self._report_rise(node.parent, 1)
        self._settle(node.parent)

    def _evict(self, kept: Kept, score: float = -math.inf) -> None:
        self._detach(kept, score)
        for kind, item in self._items(kept):
            self._allocator.give(kind, item)

    def _detach(self, kept: Kept, score: float = -math.inf) -> None:
        """Takes a state out of the tree; its slot and page are the caller's."""
        self._queues.withdraw(kept)
        self._witness.gone(self._items(kept))
        del self._slot_owner[kept.slot]
        if isinstance(kept, StoredMessage):
            self._forget_message(kept, score)
            return
        if isinstance(kept, PromptEnd):
            del kept.node.ends[kept.tail]
            if kept.page is not None:
                del self._page_owner[kept.page]
        else:
            kept.node.checkpoint = None
        self._evictions[kept.kind.value] += 1
        self._policy.lost(kept.node.namespace, kept.name, score, nearest_checkpoint(kept.node))
        if self._policy.wants_rises:
            self._rescore_below(kept.node)
        self._settle(kept.node)

    def _forget_message(self, stored: StoredMessage, score: float) -> None:
        del self._messages[stored.key]
        stored.attached = False
        for kind, item in self._items(stored)[1:]:
            if kind is Kind.PAGE:
                del self._page_owner[item]
        self._evictions["message"] += 1
        self._policy.lost(stored.node.namespace, stored.name, score, None)

    def _items(self, kept: Kept) -> list[tuple[Kind, int]]:
        if isinstance(kept, StoredMessage):
            extra = [(self._extra_kind, item) for item in kept.extra]
            return [(Kind.SLOT, kept.slot), *((Kind.PAGE, page) for page in kept.pages), *extra]
        tail = kept.page if isinstance(kept, PromptEnd) else None
        return [(Kind.SLOT, kept.slot)] + ([(Kind.PAGE, tail)] if tail is not None else [])

    def _compact(self) -> bool:
        """Moves small items together so that one slab becomes empty -> whether that was possible."""
        moves = self._allocator.compact()
        if not moves:
            return False
        kind = Kind.PAGE if self._allocator.large is Kind.SLOT else Kind.SLOT
        self.check_unpublished(kind, (target for _, target in moves))
        if self._arena is not None:
            self._arena.move(kind, moves)
        for source, target in moves:
            self._rename(kind, source, target)
        self._witness.moved(kind, moves)
        self._compactions += 1
        return True

    def _rename(self, kind: Kind, source: int, target: int) -> None:
        """Tells the owner of a small item where it is now."""
        if kind is Kind.SLOT:
            kept = self._slot_owner[target] = self._slot_owner.pop(source)
            kept.slot = target
        else:
            owner = self._page_owner[target] = self._page_owner.pop(source)
            if isinstance(owner, StoredMessage):
                pages = owner.pages if source in owner.pages else owner.extra
                pages[pages.index(source)] = target
            else:
                owner.page = target

    # Bookkeeping

    def _publish_page(self, lease: Lease, index: int) -> None:
        """Gives the tree the lease's page of tokens [index * TILE, ...), or takes the page that the tree has."""
        parent, key = lease.tip, lease.keys.pages[index]
        node = parent.children.get(key)
        if node is None:
            node = self._tree.insert(parent, key, lease.keys.names[index], lease.pages[index], self._clock())
            self._page_owner[node.page] = node
            self._witness.published([(Kind.PAGE, node.page)], f"tokens up to {node.num_tokens} of {lease.namespace}")
            lease.written_tokens += self._page_tokens
            self._report_rise(parent, 2)
        else:
            self._allocator.give(Kind.PAGE, lease.pages[index])
            lease.pages[index] = node.page
            self._witness.used([(Kind.PAGE, node.page)])
            self._allocator.fix(Kind.PAGE, node.page)
            self._queues.withdraw_dead(node)
        node.pins += 1
        lease.nodes.append(node)

    def _open(self, match: Match, keys: Keys, publish: bool, slots: list[int], pages: list[int]) -> Lease:
        """A lease on a match that has been pinned."""
        self._witness.used((Kind.PAGE, node.page) for node in match.path)
        for node in match.path:
            self._allocator.fix(Kind.PAGE, node.page)
        lease = Lease(
            match.namespace,
            keys,
            publish,
            self._tree.root(match.namespace),
            list(match.path),
            [node.page for node in match.path] + pages,
            slots[0],
            match.length,
            match.end,
        )
        self._leases.add(lease)
        self._count_match(match, keys.num_tokens)
        return lease

    def _pin(self, root: Node, path: Sequence[Node]) -> None:
        root.pins += 1
        for node in path:
            node.pins += 1
            self._queues.withdraw_dead(node)

    def _unpin(self, root: Node, path: Sequence[Node]) -> None:
        now = self._clock()
        root.pins -= 1
        for node in path:
            node.pins -= 1
            node.last_used = now
            if not node.pins:
                self._allocator.unfix(Kind.PAGE, node.page)
        self._settle(path[-1] if path else root)

    def _settle(self, node: Node) -> None:
        """To be called when something that needed a node has gone."""
        if node.dead:
            if node.parent is None:
                self._tree.remove(node)
            else:
                self._queues.add_dead(node)
            return
        while len(node.children) == 1 and not (node.checkpoint or node.ends):
            node = next(iter(node.children.values()))
        if not node.children and len(node.ends) + (node.checkpoint is not None) == 1:
            self._rescore(node.checkpoint or next(iter(node.ends.values())))  # more pages would go with it than before

    def _report_rise(self, node: Node, num_children: int) -> None:
        """To be called when a node has got or lost a child."""
        if self._policy.wants_rises and node.checkpoint is not None and len(node.children) == num_children:
            self._rescore(node.checkpoint)

    def _rescore_below(self, node: Node) -> None:
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
        """Queues a state again whose score may have fallen. One that has risen is noticed when its turn comes."""
        if kept in self._queues:
            self._queues.add(kept)

    def _keep(self, kept: Kept, lease: Lease) -> None:
        """Files a new state."""
        self._slot_owner[kept.slot] = kept
        self._witness.published(
            self._items(kept), f"{kept.kind.value} of {kept.num_tokens} tokens of {lease.namespace}"
        )
        self._admissions[kept.kind.value] += 1
        self._stamp(kept, lease.nodes)
        self._unguard(kept)

    def _decline(self, lease: Lease, position: int, kind: CheckpointKind, score: float | None) -> None:
        """To the policy it is as if the candidate had come and gone: else what is here would never grow old."""
        self._declines[kind.value] += 1
        index = position // self._page_tokens - 1
        above = (
            nearest_checkpoint(lease.nodes[min(index, len(lease.nodes) - 1)]) if lease.nodes and index >= 0 else None
        )
        name = self._name(lease, position, kind)
        self._policy.lost(lease.namespace, name, -math.inf if score is None else score, above)

    def _name(self, lease: Lease, position: int, kind: CheckpointKind) -> int:
        """Names the prefix of a lease's prompt that a state at `position` would stand for."""
        keys, index = lease.keys, position // self._page_tokens - 1
        name = keys.names[index] if index >= 0 else 0
        return end_name(name, keys.tail) if kind is CheckpointKind.PROMPT_END else name

    def _stamp(self, kept: Kept, path: Iterable[Node]) -> None:
        """Notes that a state was made or used now."""
        self._policy.used(kept, path)
        if isinstance(kept, Checkpoint) and kept.ttl_s:
            kept.keep_until = self._clock() + kept.ttl_s

    def _worth(self, kept: Kept) -> Worth:
        start = kept.resume_without()
        if self._stateless and not isinstance(kept, StoredMessage):
            start = (kept.num_tokens - 1) // self._page_tokens * self._page_tokens
        return Worth(self._cost.flops(start, kept.num_tokens), self._bytes(1, kept.pages_freed()))

    def _candidate_score(self, lease: Lease, position: int, kind: CheckpointKind) -> float | None:
        """The score that a state of a lease at `position` would have."""
        above = max((r.position for r in lease.reserved if r.position < position), default=0)
        nodes = (n for n in reversed(lease.nodes) if n.checkpoint and n.num_tokens < position)
        if (node := next(nodes, None)) is not None:
            above = max(above, node.num_tokens)
        if self._stateless:
            above = (position - 1) // self._page_tokens * self._page_tokens
        num_pages = -(-(position - max(above, min(lease.shared, position))) // self._page_tokens)
        worth = Worth(self._cost.flops(above, position), self._bytes(1, num_pages))
        return self._policy.candidate(kind, lease.namespace, self._name(lease, position, kind), worth)

    def _bytes(self, num_slots: int, num_pages: int) -> int:
        return num_slots * self._item_bytes[Kind.SLOT] + num_pages * self._item_bytes[Kind.PAGE]

    def _copy(self, kind: Kind, source: int, target: int) -> None:
        self.check_unpublished(kind, (target,))
        if self._arena is not None:
            self._arena.copy(kind, source, target)

    def _count_match(self, match: Match, num_tokens: int) -> None:
        kv_only = max(match.shared - match.length, 0)
        self._tokens.update(hit=match.length, kv_only=kv_only, miss=num_tokens - match.length - kv_only)

    def stats(self) -> CacheStats:
        slot_bytes, page_bytes = self._bytes(1, 0), self._bytes(0, 1)
        ends = sum(isinstance(k, PromptEnd) for k in self._slot_owner.values())
        checkpoints = len(self._slot_owner) - ends - len(self._messages)
        message_bytes = sum(self._bytes_of(stored) for stored in self._messages.values())
        message_pages = sum(kind is Kind.PAGE for m in self._messages.values() for kind, _ in self._items(m))
        end_pages = len(self._page_owner) - self._tree.num_nodes - message_pages
        kv_bytes = self._tree.num_nodes * page_bytes
        checkpoint_bytes = checkpoints * slot_bytes
        end_bytes = ends * slot_bytes + end_pages * page_bytes
        free_bytes, used_bytes = self._allocator.free_bytes, self._allocator.used_bytes
        return CacheStats(
            budget_bytes=self._budget_bytes,
            free_bytes=free_bytes,
            kv_bytes=kv_bytes,
            checkpoint_bytes=checkpoint_bytes,
            prompt_end_bytes=end_bytes,
            message_bytes=message_bytes,
            working_bytes=used_bytes - kv_bytes - checkpoint_bytes - end_bytes - message_bytes,
            nodes=self._tree.num_nodes,
            checkpoints=checkpoints,
            prompt_ends=ends,
            messages=len(self._messages),
            hit_tokens=self._tokens["hit"],
            kv_only_tokens=self._tokens["kv_only"],
            miss_tokens=self._tokens["miss"],
            admissions=dict(self._admissions),
            declines=dict(self._declines),
            evictions=dict(self._evictions),
            compactions=self._compactions,
        )

    def _bytes_of(self, stored: StoredMessage) -> int:
        return sum(self._item_bytes[kind] for kind, _ in self._items(stored))

    def nodes(self) -> Iterator[Node]:
        """All nodes, roots first in each namespace."""
        stack = list(self._tree.roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Proves that every item has one owner, pins are those of the leases, and all queues hold what they should."""
        nodes, pages, slots = list(self.nodes()), list[int](), list[int]()
        pins, awaited = Counter[Node](), set[Node]()
        for lease in self._leases:
            pages += lease.pages[len(lease.nodes) :]
            slots += [lease.slot, *(r.slot for r in lease.reserved)]
            pins.update([lease.root, *lease.nodes])
            awaited.update(r.node for r in lease.reserved if r.node)
            assert [n.page for n in lease.nodes] == lease.pages[: len(lease.nodes)]
            assert all(n.parent is p for p, n in zip([lease.root, *lease.nodes], lease.nodes, strict=False))
        if self._scratch_slot is not None:
            slots.append(self._scratch_slot)
        for kind, item in self._loans:
            (slots if kind is Kind.SLOT else pages).append(item)
        for stored in self._unwritten:
            for kind, item in self._items(stored):
                (slots if kind is Kind.SLOT else pages).append(item)
        fixed = {Kind.PAGE: set(pages), Kind.SLOT: set(slots)}
        for node in nodes:
            self._check_node(node)
            assert node.pins == pins.pop(node, 0)
            assert node.awaited == (node in awaited)
        assert not pins, "a lease's path has left the tree"
        in_tree = [node for node in nodes if node.parent is not None]
        fixed[Kind.PAGE].update(node.page for node in in_tree if node.pins)
        pages += [node.page for node in in_tree]
        kept: set[Kept] = {k for node in nodes for k in (node.checkpoint, *node.ends.values()) if k is not None}
        kept |= set(self._messages.values())
        held = {m for m in self._messages.values() if m.holders}
        for kind, item in (each for m in held for each in self._items(m)):
            fixed[kind].add(item)
        for k in kept:
            assert k.attached
            assert self._slot_owner[k.slot] is k
            for kind, item in self._items(k):
                (slots if kind is Kind.SLOT else pages).append(item)
                assert kind is Kind.SLOT or self._page_owner[item] is k
        assert len(self._slot_owner) == len(kept)
        num_pages = sum(kind is Kind.PAGE for k in kept for kind, _ in self._items(k))
        assert len(self._page_owner) == len(in_tree) + num_pages
        assert len(set(pages)) == len(pages)
        assert len(set(slots)) == len(slots)
        published = {(Kind.PAGE, node.page) for node in in_tree} | {each for k in kept for each in self._items(k)}
        self._witness.check(published)
        self._queues.check({node for node in in_tree if node.dead}, kept - held)
        self._allocator.check({Kind.PAGE: set(pages), Kind.SLOT: set(slots)}, fixed)
        stats = self.stats()
        parts = [stats.free_bytes, stats.kv_bytes, stats.checkpoint_bytes, stats.prompt_end_bytes, stats.working_bytes]
        parts.append(stats.message_bytes)
        assert min(parts) >= 0
        assert sum(parts) <= self._budget_bytes

    def _check_node(self, node: Node) -> None:
        assert node.attached
        assert all(child.parent is node and child.key == key for key, child in node.children.items())
        if node.parent is None:
            assert not node.dead
            return
        assert self._page_owner[node.page] is node
        assert node.num_tokens == node.parent.num_tokens + self._page_tokens
        assert node.pins <= node.parent.pins


def nearest_checkpoint(node: Node) -> Checkpoint | None:
    """The state to go on from for who comes to this node."""
    above: Node | None = node
    while above is not None and above.checkpoint is None:
        above = above.parent
    return above.checkpoint if above else None


def as_keys(prompt: TokenArray | Keys) -> Keys:
    return prompt if isinstance(prompt, Keys) else keys_of(prompt)
