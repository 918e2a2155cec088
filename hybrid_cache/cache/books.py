"""The books of the cache: what requests find in it, hold of it and leave in it. Integers only.

Only `Books` changes the tree and the pool, on one thread. Who owns what of a running sequence:

    [0, lease.shared)            pages of tree nodes on the lease's path, pinned; never written again
    [lease.shared, written)      pages of the lease's own; `publish` gives full ones to the tree, or takes the tree's
                                 page instead when someone was faster
    [written, covered)           pages of the lease's own, reserved, not yet written
    lease.slot                   the working state, never shared: states are copied in and out of it

A lease that does not publish may hold anything, such as an approximation: it shares no page beyond the state that it
starts from, and nothing of it enters the tree. Published bytes never change; see `device.digests` for the proof.

A lease pins its pages: they are neither evicted nor moved. It does not pin states, since it has its own copy.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from hybrid_cache.cache.audit import check_books, stats_of
from hybrid_cache.cache.candidates import Candidates
from hybrid_cache.cache.claims import Claims, Spare
from hybrid_cache.cache.commands import CopyEntries, Emit, Item, KeepHidden, VerifySome, nowhere
from hybrid_cache.cache.disk.entries import Storage
from hybrid_cache.cache.disk.tier import DiskTier
from hybrid_cache.cache.fates import End
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.host import HostTier
from hybrid_cache.cache.inputs import InputStore
from hybrid_cache.cache.keys import Keys, keys_of
from hybrid_cache.cache.lease import Lease, Match, Reservation, Sent, find
from hybrid_cache.cache.messages import MessageStore
from hybrid_cache.cache.misses import Inquest
from hybrid_cache.cache.policies.base import Outline, Policy, Wish, hears_endings
from hybrid_cache.cache.policies.signals import NOWHERE, Ending, Finish, Origin
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, LayerInputs, Node, PrefixTree, PromptEnd, StoredMessage
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.stats import CacheStats
from hybrid_cache.tokens import Boundary, TokenArray


class Books:
    """See the module docstring. No room is never an error: methods return None or False."""

    def __init__(
        self,
        spec: CacheSpec,
        cost: PrefillCost,
        budget_bytes: int,
        policy: Policy,
        *,
        emit: Emit = nowhere,
        host_bytes: int = 0,
        page_tokens: int = TILE,
        clock: Callable[[], float] = time.monotonic,
        verify: bool = False,
    ) -> None:
        """emit: takes the commands for the memory of the cache, in order; `nowhere` for books without a memory, whose
        pages may be larger (a multiple of TILE)   host_bytes: of a second tier, 0 for none
        verify: report to the memory what is published, used and given up

        Raises ConfigError for too small a budget.
        """
        self.budget_bytes = budget_bytes
        self._cost = cost
        self._clock = clock
        self._stateless = spec.slot_bytes == 0  # attention only: a request may resume from any page
        self._page_tokens = page_tokens
        self.tree = PrefixTree(page_tokens)
        geometry = Geometry.of(spec, budget_bytes)
        self.pool = Pool(
            *(geometry, cost, budget_bytes, policy, self.tree, clock, emit), stateless=self._stateless, verify=verify
        )
        if host_bytes:
            tier = Geometry.of(spec, host_bytes), host_bytes, emit
            self.pool.host = HostTier(*tier, stateless=self._stateless)
        self._candidates = Candidates(self.pool, cost, stateless=self._stateless)
        self.messages = MessageStore(self.pool, cost, 4 * spec.effect_size)
        self.inputs = InputStore(self.pool, spec.input_bytes)
        self.inquest = Inquest(self.tree, self.pool.fates, clock, stateless=self._stateless)
        self.tell: Callable[[Ending], None] = hears_endings(policy)  # the policy, of a request that has ended
        self.leases: set[Lease] = set()
        self.scratch: int | None = None
        self.tokens: Counter[str] = Counter()  # of prompts: hit, kv_only, miss

    def fits(self, num_tokens: int) -> bool:
        """Whether one sequence of this length fits into an otherwise empty cache."""
        return self.pool.geometry.fits(-(-num_tokens // TILE), 1 if self.scratch is None else 2)

    def scratch_slot(self) -> int | None:
        """A state slot that no sequence owns, for rows that pad a batch; always the same one.

        Taken at the first call. None where the budget holds only one sequence.
        """
        if self.scratch is None and self.pool.geometry.fits(1, 2):
            taken = self.pool.take(num_slots=1, num_pages=0)
            self.scratch = taken[0][0] if taken else None
        return self.scratch

    def match(self, namespace: str, prompt: TokenArray | Keys) -> Match:
        """The longest usable part of a prompt. Changes nothing."""
        return find(self.tree, as_keys(namespace, prompt), self.pool.host, stateless=self._stateless)

    @property
    def context_bytes(self) -> tuple[float, int]:
        """What a context takes: bytes of a token, and of its state."""
        return self.pool.item_bytes[Kind.PAGE] / self._page_tokens, 0 if self._stateless else self.pool.item_bytes[
            Kind.SLOT
        ]

    @property
    def now_s(self) -> float:
        """By the cache's clock."""
        return self._clock()

    @property
    def has_host(self) -> bool:
        """Whether there is a second tier."""
        return self.pool.host is not None

    def add_disk(self, storage: Storage, budget_bytes: int) -> DiskTier:
        """A tier that outlives the process. budget_bytes: that the storage keeps to"""
        facts = storage, budget_bytes, self.pool, self._cost, self.pool.emit, self._clock, self.messages
        self.pool.disk = tier = DiskTier(*facts, stateless=self._stateless)
        return tier

    @property
    def fixed_bytes(self) -> int:
        """What running sequences hold."""
        return self.pool.allocator.fixed_bytes

    @property
    def free_bytes(self) -> int:
        return self.pool.allocator.free_bytes

    @property
    def claims(self) -> Claims:
        """Who counts on what nobody holds."""
        return self.pool.claims

    def acquire(
        self,
        match: Match,
        prompt: TokenArray | Keys,
        *,
        publish: bool = True,
        keeps_end: bool = False,
        spare: Spare | None = None,
    ) -> Lease | None:
        """Pins what was matched and takes a working state and pages for all of a prompt; all or nothing.

        The working state holds the matched state, if there is one. If part of the match was evicted since, the prompt
        is matched again, to the same extent. With `publish=False` nothing of the lease enters the tree, and all pages
        beyond the state that it starts from are its own: it may write there what the tree must never hold.
        keeps_end: with a slot for the state at its last grid position, whatever the policy says of that
        spare: whether a claim protects what it lies on; None: none does
        """
        keys = as_keys(match.namespace, prompt)
        match = self._renew(match)
        if not publish:
            match = find(self.tree, match.keys, stateless=self._stateless) if match.hosted else match
            match = match.up_to_its_state(self._page_tokens)
        root = self.tree.root(match.namespace)
        num_held = sum(not node.pins for node in match.path)
        self._pin(root, match.path)
        num_pages = -(-keys.num_tokens // self._page_tokens) - len(match.path)
        host = self.pool.host if match.hosted else None
        if host is not None:
            host.hold(keys, len(match.path), match.length // self._page_tokens)
        end = self._open_end(match, keys) if keeps_end and publish else None
        stays = keeps_end and publish and self._is_end(match, keys)
        taken = self._take_for(match, num_pages, num_held, spare, 2 if end else 1, stays=stays)
        if taken is not None:
            return self._open(match, keys, publish, *taken, end)
        if host is not None:
            host.let_go()
        source = match.end or match.checkpoint
        in_the_way = source is not None and spare is None and not keeps_end and self.pool.fits(num_pages, 1, num_held)
        self._unpin(root, match.path)
        if source is None or not in_the_way:
            return None
        self.pool.evict(source)
        return self.acquire(self.match(match.namespace, match.keys), keys, publish=publish)

    def sent(self, keys: Keys, start: int, layers: Sequence[int]) -> Sent | None:
        """What there is of the first tokens of a prompt in another model's namespace, for a transfer that begins after
        `start` of them and reads what these layers were given. Changes nothing; None for nothing.
        """
        path, first = self.tree.walk(keys.namespace, keys.pages), start // self._page_tokens
        most = min(len(path), (keys.num_tokens - 1) // self._page_tokens)
        most = self.inputs.reach(keys, layers, first, most)
        while most > first and not (self._stateless or path[most - 1].checkpoint):
            most -= 1
        return Sent(keys, path[:most], tuple(layers), first) if most > first else None

    def take_over(self, lease: Lease, sent: Sent, entries: Sequence[int]) -> tuple[LayerInputs, ...]:
        """Copies what some layers have of another model's tokens into a lease that starts where `sent` does -> what
        other layers were given, held until `inputs.let_go`.

        entries: those to copy, in the order of `CacheSpec.layers`
        """
        path, state = sent.path[max(sent.first, len(lease.nodes)) :], sent.path[-1].checkpoint
        pages = tuple(zip((node.page for node in path), lease.pages[sent.end - len(path) : sent.end], strict=True))
        items: list[Item] = [(Kind.PAGE, page) for page, _ in pages]
        slots = () if state is None else ((state.slot, lease.slot),)
        self.pool.verify([*items, *((Kind.SLOT, slot) for slot, _ in slots)])
        self._copy_entries(Kind.PAGE, pages, entries)
        self._copy_entries(Kind.SLOT, slots, entries)
        if state is not None:
            self.pool.guard(state)
            self.pool.stamp(state, sent.path)
            self.pool.unguard(state)
        return self.inputs.hold(sent.keys, sent.layers, sent.first, sent.end)

    def copy_taken(self, lease: Lease, slots: Iterable[int], entries: Sequence[int]) -> None:
        """Copies some layers' part of the working state into slots that the coming forward pass fills."""
        self._copy_entries(Kind.SLOT, [(lease.slot, slot) for slot in slots], entries)

    def copy_beside(
        self,
        source: Lease,
        target: Lease,
        start: int,
        end: int,
        slots: Sequence[tuple[int, int]],
        entries: Sequence[int],
    ) -> None:
        """Copies what some layers have of the tokens [start, end), whole pages, from one lease of them to another.

        slots: of states that were kept in them, each (from, to)
        """
        first, last = max(start // self._page_tokens, len(target.nodes)), end // self._page_tokens
        pages = [*zip(source.pages[first:last], target.pages[first:last], strict=True)]
        self._copy_entries(Kind.PAGE, pages, entries)
        self._copy_entries(Kind.SLOT, slots, entries)

    def _copy_entries(self, kind: Kind, copies: Sequence[tuple[int, int]], entries: Sequence[int]) -> None:
        """Of the entries, those of the kind."""
        some = tuple(each for each in entries if self.pool.geometry.entries[each] is kind)
        if some and copies:
            self.pool.check_unpublished(kind, (target for _, target in copies))
            self.pool.emit(CopyEntries(kind, tuple(copies), some))

    def reserve_inputs(self, lease: Lease, layer: int, spared: PrefillCost, start: int, end: int) -> list[LayerInputs]:
        """Room for what a layer is given for the whole pages among the tokens [start, end), which the coming forward
        pass fills. spared: cost of what need not be computed where they are there
        """
        if not lease.publish:
            return []
        pages = -(-start // self._page_tokens), min(end, lease.keys.num_tokens) // self._page_tokens
        runs = self.inputs.reserve(lease.keys, layer, spared, *pages)
        lease.inputs += runs
        return runs

    def propose(
        self,
        lease: Lease,
        boundaries: Sequence[Boundary] = (),
        *,
        only_marked: bool = False,
        generated: bool = False,
        again: bool = False,
        origin: Origin = NOWHERE,
    ) -> list[Wish]:
        """The checkpoints that the policy proposes for a prompt that was just acquired, by position, one at each; see
        `Outline`. Raises ConfigError for one at a place that the prompt does not have.
        """
        lease.origin = origin
        if not lease.publish:
            return []
        found = lease.keys, lease.length, lease.shared, self._page_tokens
        outline = Outline(*found, tuple(boundaries), only_marked, generated, again, origin)
        wishes = list(self.pool.policy.propose(outline))
        page_tokens, most = self._page_tokens, lease.keys.num_tokens
        if off := [wish.position for wish in wishes if wish.position % page_tokens or not 0 <= wish.position <= most]:
            name = self.pool.policy.name
            raise ConfigError(
                f"policy {name!r}: a state at {off[0]}, must be at a multiple of {page_tokens} up to {most}"
            )
        first = {wish.position: wish for wish in reversed(wishes)}
        return [first[position] for position in sorted(first)]

    def extend(self, lease: Lease, num_tokens: int) -> bool:
        """Takes pages until the lease covers `num_tokens`; False and unchanged when there is no room."""
        missing = -(-num_tokens // self._page_tokens) - len(lease.pages)
        if missing <= 0:
            return True
        taken = self.pool.take(num_pages=missing)
        if taken is None:
            return False
        lease.pages += taken[1]
        return True

    def reserve_checkpoint(
        self, lease: Lease, position: int, kind: CheckpointKind, *, ttl_s: float | None = None
    ) -> int | None:
        """A slot for the forward pass to fill with the state at `position`, a grid position not yet published.

        None when the lease does not publish, the position has one, or the policy would have to evict something better.
        The state, once it is there, is kept for at least `ttl_s` after each use unless nothing else is left to evict.
        """
        if not lease.publish or self._stateless or position <= lease.length:
            return None
        index = position // self._page_tokens - 1
        node = lease.nodes[index] if index < len(lease.nodes) else None
        if any(r.position == position for r in lease.reserved) or (node and (node.checkpoint or node.awaited)):
            return None
        taken = self._candidates.take(lease, position, kind)
        if taken is None:
            return None
        if node is not None:
            node.awaited = True
        slot, _ = taken
        lease.reserved.append(Reservation(position, slot, kind, ttl_s or 0.0, node))
        return slot

    def publish(self, lease: Lease, num_tokens: int) -> None:
        """Publishes the pages of [0, num_tokens), a grid position, and the checkpoints reserved inside it.

        Everything there must have been written completely, by the prefill path.
        """
        self._verify_some()
        if not lease.publish:
            return
        for index in range(len(lease.nodes), num_tokens // self._page_tokens):
            self._publish_page(lease, index)
        self.inputs.publish(run for run in lease.inputs if run.num_tokens <= num_tokens)
        lease.inputs = [run for run in lease.inputs if run.num_tokens > num_tokens]
        filled = [r for r in lease.reserved if r.position <= num_tokens]
        lease.reserved = [r for r in lease.reserved if r.position > num_tokens]
        for r in filled:
            if r.node is not None:
                r.node.awaited = False
            node = lease.nodes[r.position // self._page_tokens - 1]
            if node.checkpoint is not None:
                self.pool.give(Kind.SLOT, r.slot)
                continue
            node.checkpoint = Checkpoint(node, r.slot, r.kind, r.ttl_s)
            self.pool.publish(node.checkpoint, lease.nodes)
            self.pool.rescore_below(node)

    def publish_end(self, lease: Lease, row: int) -> bool:
        """Keeps the working state as the end of the lease's prompt, with its last hidden row.

        row: its index among the hidden rows of the latest forward pass
        To be called between the prompt's last tile and the first decode step. False when it is there already, the lease
        does not publish, or the policy declines.
        """
        return self._publish_end(lease, lease.keys, row)

    def publish_stem(self, lease: Lease, row: int) -> bool:
        """Keeps the working state as the end of what comes before the mark of the lease's prompt, for others that go
        on there or end there. To be called when just that has been computed; else as `publish_end`.

        False also where a checkpoint is at hand there, or about to be.
        """
        stem = lease.keys.stem
        node = lease.stem_tip
        if stem is None or (not stem.tail and (node.checkpoint or node.awaited)):
            return False
        return self._publish_end(lease, stem, row)

    def _publish_end(self, lease: Lease, keys: Keys, row: int) -> bool:
        """keys: the lease's, or their stem"""
        path = lease.nodes[: len(keys.pages)]
        node = path[-1] if path else lease.root
        if not lease.publish or len(path) < len(keys.pages) or keys.tail in node.ends:
            return False
        num_pages = 1 if keys.tail and self.pool.geometry.page_bytes else 0
        taken = self._candidates.take(lease, keys.num_tokens, CheckpointKind.PROMPT_END, num_pages)
        if taken is None:
            return False
        slot, pages = taken
        namespace = keys.namespace_of(len(path))
        page = pages[0] if pages else None
        end = PromptEnd(node, keys.end_name, namespace, keys.tail, keys.num_tokens, slot, page)
        self.pool.copy(Kind.SLOT, lease.slot, end.slot)
        if end.page is not None:
            self.pool.copy(Kind.PAGE, lease.pages[len(path)], end.page)
        self.pool.emit(KeepHidden(end.slot, row))
        node.ends[keys.tail] = end
        self.pool.publish(end, path)
        return True

    def fork(self, lease: Lease, num_tokens: int) -> Lease | None:
        """Another lease of the same sequence, whose state is the one after `num_tokens`.

        It covers as much as the first: the tree's pages are shared, the others and the state are copied.
        """
        own = lease.pages[len(lease.nodes) :]
        taken = self.pool.take(num_slots=1, num_pages=len(own))
        if taken is None:
            return None
        slots, pages = taken
        self._pin(lease.root, lease.nodes)
        self.pool.copy(Kind.SLOT, lease.slot, slots[0])
        num_written = max(-(-num_tokens // self._page_tokens) - len(lease.nodes), 0)
        for source, target in zip(own[:num_written], pages, strict=False):
            self.pool.copy(Kind.PAGE, source, target)
        fork = Lease(
            lease.keys,
            lease.publish,
            lease.root,
            list(lease.nodes),
            lease.pages[: len(lease.nodes)] + pages,
            slots[0],
            num_tokens,
            lease.end,
            origin=lease.origin,
        )
        self.leases.add(fork)
        return fork

    def release(
        self, lease: Lease, num_output_tokens: int | None = None, finish: Finish = Finish.UNKNOWN
    ) -> Ending | None:
        """Gives back all that a lease holds; what it has published stays. Idempotent.

        num_output_tokens, finish: of the answer, if the request is done -> what the policy was told of it, see `tell`
        """
        if lease.released:
            return None
        lease.released = True
        ending = None
        if num_output_tokens is not None and lease.keys.pages:
            ending = Ending(lease.keys.names[-1], num_output_tokens, finish, lease.origin)
            self.tell(ending)
        self._verify_some()
        self.leases.remove(lease)
        self.inputs.give_back(lease.inputs)
        lease.inputs = []
        for page in lease.pages[len(lease.nodes) :]:
            self.pool.give(Kind.PAGE, page)
        for slot in [lease.slot, *(r.slot for r in lease.reserved)]:
            self.pool.give(Kind.SLOT, slot)
        for r in lease.reserved:
            if r.node is not None:
                r.node.awaited = False
        self._unpin(lease.root, lease.nodes)
        return ending

    def drop(self, namespace: str | None = None) -> int:
        """Drops everything that is not in use, of one namespace or of all -> bytes freed."""
        before = self.pool.allocator.free_bytes
        for kept in [k for k in self.pool.slot_owner.values() if namespace in (None, k.namespace)]:
            if not (isinstance(kept, StoredMessage) and kept.holders):
                self.pool.evict(kept, end=End.DROPPED)
        self.inputs.drop(namespace)
        for node in [n for n in self.tree.nodes() if n.dead and namespace in (None, n.namespace)]:
            while node.dead and node.parent is not None:
                self.pool.evict_page(node, End.DROPPED)
                node = node.parent
        if self.pool.host is not None:
            self.pool.host.drop(namespace)
        if self.pool.disk is not None:
            self.pool.disk.drop(lambda each: namespace in (None, each))
        return self.pool.allocator.free_bytes - before

    def _renew(self, match: Match) -> Match:
        """The match itself, or a new one when something of it has been evicted since."""
        source = match.end or match.checkpoint
        whole = (not match.path or match.path[-1].attached) and (source is None or source.attached)
        return match if whole and not match.hosted else self.match(match.namespace, match.keys)

    def _open_end(self, match: Match, keys: Keys) -> int | None:
        """The last grid position of what others may go on from, if no state is there and none is about to be."""
        position = self._last_position(keys)
        if self._stateless or position <= match.length or not self.pool.policy.keeps_states:
            return None
        node = self._node_at(match, position)
        return None if node and (node.checkpoint or node.awaited) else position

    def _last_position(self, keys: Keys) -> int:
        """The last grid position of a prompt, or of its stem."""
        return (keys.stem or keys).num_tokens // self._page_tokens * self._page_tokens

    def _node_at(self, match: Match, position: int) -> Node | None:
        """The node of a match that ends at a grid position, if it is there."""
        return match.path[position // self._page_tokens - 1] if match.shared >= position > 0 else None

    def _is_end(self, match: Match, keys: Keys) -> bool:
        """Whether the state that was matched is the one which others may go on from."""
        last = self._last_position(keys)
        return match.end is None and isinstance(match.checkpoint, Checkpoint) and match.length == last

    def _take_for(
        self, match: Match, num_pages: int, num_held: int, spare: Spare | None, num_slots: int, *, stays: bool
    ) -> tuple[list[int], list[int]] | None:
        """A slot that holds the matched state, others, and pages; one with the rows of a matched prompt end.

        Without room for a copy of the state, the state itself is taken out of the tree, unless it stays.
        """
        source = match.end or match.checkpoint
        if source is None:
            return self.pool.take(num_slots=num_slots, num_pages=num_pages, num_held=num_held, spare=spare)
        place = match.length // self._page_tokens - len(match.path)  # of a prompt end's page among those of its own
        tail = source.page if isinstance(source, PromptEnd) else None
        copied = tail is not None and place >= 0  # else the tree has it, and more
        self.pool.verify(self.pool.items(source))
        self.pool.guard(source)
        taken = self.pool.take(num_slots=num_slots, num_pages=num_pages, num_held=num_held, spare=spare)
        if taken is not None:
            self.pool.copy(Kind.SLOT, source.slot, taken[0][0])
            if tail is not None and copied:
                self.pool.copy(Kind.PAGE, tail, taken[1][place])
            self.pool.stamp(source, match.path)
            self.pool.unguard(source)
            return taken
        if stays:
            self.pool.unguard(source)
            return None
        num_others = num_pages - copied
        rest = self.pool.take(num_slots=num_slots - 1, num_pages=num_others, num_held=num_held, spare=spare)
        if rest is None:
            self.pool.unguard(source)
            return None
        self.pool.detach(source)
        pages = rest[1]
        if tail is not None and copied:
            pages.insert(place, tail)
        elif tail is not None:
            self.pool.give(Kind.PAGE, tail)
        return [source.slot, *rest[0]], pages

    def _publish_page(self, lease: Lease, index: int) -> None:
        """Gives the tree the lease's page of tokens [index * TILE, ...), or takes the page that the tree has."""
        parent, key = lease.tip, lease.keys.pages[index]
        node = parent.children.get(key)
        if node is None:
            name, namespace = lease.keys.names[index + 1], lease.keys.namespace_of(index)
            node = self.tree.insert(parent, key, name, lease.pages[index], self._clock(), namespace)
            lease.written_tokens += self._page_tokens
            self.pool.publish_page(node)
        else:
            self.pool.give(Kind.PAGE, lease.pages[index])
            lease.pages[index] = node.page
            self.pool.verify(((Kind.PAGE, node.page),))
            self.pool.allocator.fix(Kind.PAGE, node.page)
            self.pool.queues.withdraw_dead(node)
        node.pins += 1
        lease.nodes.append(node)

    def _open(
        self, match: Match, keys: Keys, publish: bool, slots: list[int], pages: list[int], end: int | None
    ) -> Lease:
        """A lease on a match that has been pinned. end: where the second slot is to be filled"""
        self.pool.verify((Kind.PAGE, node.page) for node in match.path)
        for node in match.path:
            self.pool.allocator.fix(Kind.PAGE, node.page)
        root = self.tree.root(match.namespace)
        keys.learn([root.name, *(node.name for node in match.path)])
        lease = Lease(
            keys,
            publish,
            root,
            list(match.path),
            [node.page for node in match.path] + pages,
            slots[0],
            match.length,
            match.end,
            since_s=self._clock(),
        )
        if end is not None:
            there = self._node_at(match, end)
            lease.reserved.append(Reservation(end, slots[1], CheckpointKind.MESSAGE_END, 0.0, there))
            if there is not None:
                there.awaited = True
        self.leases.add(lease)
        if match.hosted:
            self._load(lease)
        self._count_match(match, keys.num_tokens)
        return lease

    def _load(self, lease: Lease) -> None:
        """Fills the pages and the state that a lease starts from, from the second tier, and publishes the pages."""
        assert self.pool.host is not None
        first, end = len(lease.nodes), lease.length // self._page_tokens
        self.pool.host.load(lease.keys, first, end, lease.pages[first:end], lease.slot)
        before = lease.written_tokens
        for index in range(first, end):
            self._publish_page(lease, index)
            lease.tip.wanted = True
        lease.written_tokens = before

    def _pin(self, root: Node, path: Sequence[Node]) -> None:
        root.pins += 1
        for node in path:
            node.pins += 1
            self.pool.queues.withdraw_dead(node)

    def _unpin(self, root: Node, path: Sequence[Node]) -> None:
        now = self._clock()
        root.pins -= 1
        for node in path:
            node.pins -= 1
            node.last_used = now
            if not node.pins:
                self.pool.allocator.unfix(Kind.PAGE, node.page)
        self.pool.settle(path[-1] if path else root)

    def _count_match(self, match: Match, num_tokens: int) -> None:
        kv_only = max(match.shared - match.length, 0)
        self.tokens.update(hit=match.length, kv_only=kv_only, miss=num_tokens - match.length - kv_only)

    def stats(self) -> CacheStats:
        return stats_of(self.pool, self.messages, self.inputs, self.tokens, self.inquest, self.budget_bytes)

    def check(self) -> set[Item]:
        """Proves that the books are in order -> all published items."""
        published = check_books(self.pool, self.messages, self.inputs, self.leases, self.scratch)
        stats = self.stats()
        parts = [stats.free_bytes, stats.kv_bytes, stats.checkpoint_bytes, stats.prompt_end_bytes, stats.working_bytes]
        parts += [stats.message_bytes, stats.input_bytes]
        assert min(parts) >= 0
        assert sum(parts) <= self.budget_bytes
        return published

    def _verify_some(self) -> None:
        if self.pool.verifies:
            self.pool.emit(VerifySome())


def as_keys(namespace: str, prompt: TokenArray | Keys) -> Keys:
    if not isinstance(prompt, Keys):
        return keys_of(namespace, prompt)
    assert prompt.namespace == namespace
    return prompt
