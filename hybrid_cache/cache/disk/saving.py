"""What is copied to the disk, and when: behind the passes within a share of the time, or when it has to leave."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from hybrid_cache.cache.commands import Emit, Save
from hybrid_cache.cache.disk.catalogue import Catalogue
from hybrid_cache.cache.disk.entries import Entry, EntryKind, Facts, NewEntry, Storage
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.keys import Name, tokens_in
from hybrid_cache.cache.messages import MessageStore
from hybrid_cache.cache.tree import Checkpoint, Node, PromptEnd, StoredMessage
from hybrid_cache.namespaces import fingerprint_in, lane_in
from hybrid_cache.spec import PrefillCost

State = Checkpoint | PromptEnd | StoredMessage

BUSY_SHARE = 0.012  # of the time that copies and the writer's processor time may take while requests run
MOST_SAVED_S = 0.01  # of it that may be saved up
S_PER_BYTE = 3e-9  # of processor time, at least
MOST_USED = 64  # entries that are told of at once
MOST_QUEUED_BYTES = 64 << 20  # that wait to be written


class Allowance:
    """Processor time that may be spent while requests run: a share of the time that passes, or of the processor time
    that this process gets meanwhile, whichever is less: on a busy machine the one is several times the other.

    What is asked for costs what bytes have cost on average, long before it is done.
    """

    def __init__(
        self,
        spent_s: Callable[[], float],
        clock: Callable[[], float],
        processor_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._spent_s, self._clock, self._processor_s = spent_s, clock, processor_s
        self._last_s, self._last_processor_s = clock(), processor_s()
        self._left_s = MOST_SAVED_S
        self._num_bytes = 0  # that were asked for and are done

    def left(self, *, idle: bool) -> bool:
        """Whether there is some. idle: nobody waits for an answer, so that time costs nothing"""
        now, processor_s = self._clock(), self._processor_s()
        passed_s = max(min(now - self._last_s, processor_s - self._last_processor_s), 0.0)
        self._left_s = min(self._left_s + BUSY_SHARE * passed_s, MOST_SAVED_S)
        self._last_s, self._last_processor_s = now, processor_s
        return idle or self._left_s > 0

    def take(self, num_bytes: int, *, idle: bool) -> None:
        """So many bytes are asked for."""
        if not idle:
            self._left_s -= num_bytes * max(self._spent_s() / self._num_bytes if self._num_bytes else 0.0, S_PER_BYTE)

    def done(self, num_bytes: int) -> None:
        """They were written, or not."""
        self._num_bytes += num_bytes


class Saving:
    """States that wait to be copied, in the order in which they were published, and jobs that are being written."""

    def __init__(
        self,
        storage: Storage,
        catalogue: Catalogue,
        geometry: Geometry,
        cost: PrefillCost,
        identities: Mapping[str, str],
        emit: Emit,
        clock: Callable[[], float],
        page_tokens: int,
        standing: Callable[[Name], float],
        messages: MessageStore,
        *,
        stateless: bool,
    ) -> None:
        """identities: of models, by fingerprint
        standing: what is expected of a prefix, in proportion to what is of a new one
        """
        self._storage = storage
        self._catalogue = catalogue
        self._geometry = geometry
        self._cost = cost
        self._identities = identities
        self._emit = emit
        self._page_tokens = page_tokens
        self._standing = standing
        self._messages = messages
        self._stateless = stateless
        self._allowance = Allowance(lambda: storage.spent_s, clock)
        self._line: dict[State | Node, None] = {}
        self._num_jobs = 0
        self._jobs: dict[int, tuple[NewEntry, ...]] = {}
        self._queued_bytes = 0  # of these
        self._runs: dict[Name, Name] = {}  # pages that are being written -> the name of their run
        self._states: set[tuple[EntryKind, Name]] = set()  # that are being written
        self._used: dict[int, tuple[int, float, bool]] = {}  # entries that were of use, until the index is told
        self.saved: Counter[str] = Counter()  # entries, by kind
        self.not_saved: Counter[str] = Counter()  # states, by why

    def __len__(self) -> int:
        """States that wait."""
        return len(self._line)

    @property
    def is_busy(self) -> bool:
        """Whether something waits, or is being written."""
        return bool(self._line or self._jobs)

    @property
    def has_room(self) -> bool:
        return self._queued_bytes < MOST_QUEUED_BYTES

    def published(self, kept: State | Node, instead: Node | None = None) -> None:
        """A state is there that the disk may not have, or without recurrent states a page.

        instead: of a page that takes this one with it
        """
        if instead is not None:
            self._line.pop(instead, None)
        if self._is_ours(kept):
            self._line[kept] = None

    def leaving(self, kept: State | Node) -> None:
        """It goes from memory: now or never. What the disk has counts as new there."""
        self._line.pop(kept, None)
        if not self._is_ours(kept) or self._is_under_way(kept):
            return
        there = self._catalogue.named(_kind(kept), kept.name)
        if there is not None:
            self.used(there, kept, read=False)
        elif isinstance(kept, Node) and self._catalogue.run(kept.name) is not None:
            return
        elif not self.has_room:
            self.not_saved["queue"] += 1
        elif not self._allowance.left(idle=False):
            self.not_saved["time"] += 1
        else:
            self._save(kept, idle=False)

    def used(self, entry: Entry, kept: State | Node, *, read: bool) -> None:
        """An entry of the disk is of use. read: it has just been loaded"""
        run = None if isinstance(kept, Node) else self._catalogue.named(EntryKind.PAGES, kept.name)
        num_bytes = entry.facts.num_bytes + (run.facts.num_bytes if run else 0)
        before = self._used.get(entry.id)
        self._used[entry.id] = entry.id, self._value(kept, num_bytes), read or (before is not None and before[2])

    def _is_ours(self, kept: State | Node) -> bool:
        """Made by a model as it is, whose identity is known."""
        return not lane_in(kept.namespace) and fingerprint_in(kept.namespace) in self._identities

    def _is_under_way(self, kept: State | Node) -> bool:
        if isinstance(kept, Node):
            return kept.name in self._runs
        return (_kind(kept), kept.name) in self._states

    def forget(self, kept: State | Node) -> None:
        """Somebody wants it dropped."""
        self._line.pop(kept, None)

    def pump(self, *, idle: bool) -> None:
        """Has some copied. idle: nobody waits for an answer"""
        if self._used and (idle or len(self._used) >= MOST_USED):
            self._storage.use([*self._used.values()])
            self._used.clear()
        while self._line and self.has_room and self._allowance.left(idle=idle):
            self._save(next(iter(self._line)), idle=idle)

    def ended(self, job: int, why: str = "") -> None:
        """A job is done, or was given up for a reason."""
        entries = self._jobs.pop(job, ())
        self._allowance.done(sum(new.facts.num_bytes for new in entries))
        for new in entries:
            self._queued_bytes -= new.facts.num_bytes
            self._states.discard(new.facts.key)
            for name in new.facts.page_names:
                self._runs.pop(name, None)
            if not why:
                self.saved[new.facts.kind.value] += 1
        if why:
            self.not_saved[why] += 1

    def _save(self, kept: State | Node, *, idle: bool) -> None:
        self._line.pop(kept, None)
        if not kept.attached:
            return
        entries = self._job(kept)
        if not entries:
            return
        self._num_jobs += 1
        self._jobs[self._num_jobs] = entries
        self._allowance.take(sum(new.facts.num_bytes for new in entries), idle=idle)
        for new in entries:
            self._queued_bytes += new.facts.num_bytes
            self._states.add(new.facts.key)
            self._runs.update((name, new.facts.name) for name in new.facts.page_names)
        self._emit(Save(self._num_jobs, entries))

    def _job(self, kept: State | Node) -> tuple[NewEntry, ...]:
        """The files that a state needs and that are neither there nor being written."""
        identity = self._identities[fingerprint_in(kept.namespace)]
        if isinstance(kept, StoredMessage):
            return self._message(kept, identity)
        run, above = self._run(kept if isinstance(kept, Node) else kept.node, identity)
        state = None if isinstance(kept, Node) else self._state(kept, identity, above if run is None else None)
        if isinstance(kept, Node) or state is None:
            return () if run is None or not self._stateless else (self._valued(run, kept, run.facts.num_bytes),)
        num_bytes = state.facts.num_bytes + (run.facts.num_bytes if run else 0)
        return (*((run,) if run else ()), self._valued(state, kept, num_bytes))

    def _message(self, kept: StoredMessage, identity: str) -> tuple[NewEntry, ...]:
        if self._catalogue.named(EntryKind.MESSAGE, kept.name) is not None:
            return ()
        items = (Kind.SLOT, kept.slot), *((Kind.PAGE, page) for page in kept.pages)
        extra, geometry = self._messages.pieces(kept.extra), self._geometry
        num_bytes = geometry.slot_bytes + len(kept.pages) * geometry.page_bytes + sum(size for *_, size in extra)
        place = kept.start, kept.num_tokens, b"", num_bytes, self._value(kept, num_bytes), kept.position
        facts = Facts(identity, EntryKind.MESSAGE, kept.name, kept.namespace, kept.label, *place)
        return (NewEntry(facts, items, None, extra=extra),)

    def _valued(self, new: NewEntry, kept: State | Node, num_bytes: int) -> NewEntry:
        return replace(new, facts=new.facts._replace(value=self._value(kept, num_bytes)))

    def _run(self, node: Node, identity: str) -> tuple[NewEntry | None, int | Name | None]:
        """The pages up to a node that are missing, and what has the page before them, or the last one."""
        missing, last = list[Node](), node
        while self._geometry.page_bytes and node.parent is not None and self._holder(node.name) is None:
            missing.insert(0, node)
            node = node.parent
        above = None if node.parent is None else self._holder(node.name)
        if not missing:
            return None, above
        names = b"".join(each.name for each in missing)
        place = node.num_tokens // self._page_tokens, last.num_tokens
        num_bytes = len(missing) * self._geometry.page_bytes
        facts = Facts(identity, EntryKind.PAGES, last.name, last.namespace, "", *place, names, num_bytes)
        plain = all(each.namespace == last.namespace and each.key == tokens_in(each.key) for each in missing)
        tokens = b"".join(each.key for each in missing) if plain else b""
        return NewEntry(facts, tuple((Kind.PAGE, each.page) for each in missing), above, tokens), above

    def _holder(self, page: Name) -> int | Name | None:
        """The run with a page."""
        there = self._catalogue.run(page)
        return self._runs.get(page) if there is None else there.id

    def _state(self, kept: Checkpoint | PromptEnd, identity: str, above: int | Name | None) -> NewEntry | None:
        kind = _kind(kept)
        if (kind, kept.name) in self._states or self._catalogue.named(kind, kept.name) is not None:
            return None
        tail = kept.page if isinstance(kept, PromptEnd) else None
        items = ((Kind.SLOT, kept.slot), *(((Kind.PAGE, tail),) if tail is not None else ()))
        num_bytes = self._geometry.slot_bytes + self._geometry.page_bytes * (len(items) - 1)
        num_pages = kept.node.num_tokens // self._page_tokens
        facts = Facts(
            identity, kind, kept.name, kept.namespace, kept.label, num_pages, kept.num_tokens, num_bytes=num_bytes
        )
        return NewEntry(facts, items, above, tokens_in(kept.tail) if isinstance(kept, PromptEnd) else b"")

    def _value(self, kept: State | Node, num_bytes: int) -> float:
        """FLOPs that it saves for each byte that it takes, by what is expected of it."""
        flops = self._cost.flops(self._before(kept), kept.num_tokens)
        return self._standing(kept.name) * flops / max(num_bytes, 1)

    def _before(self, kept: State | Node) -> int:
        """Tokens of its prompt that need not be computed without it, with what the disk has."""
        if isinstance(kept, StoredMessage):
            return kept.start
        node = kept.parent if isinstance(kept, Node) else kept.node if isinstance(kept, PromptEnd) else kept.node.parent
        while node is not None and self._catalogue.named(EntryKind.STATE, node.name) is None:
            if self._stateless and self._catalogue.run(node.name) is not None:
                break
            node = node.parent
        return node.num_tokens if node else 0


def _kind(kept: State | Node) -> EntryKind:
    if isinstance(kept, Node):
        return EntryKind.PAGES
    if isinstance(kept, StoredMessage):
        return EntryKind.MESSAGE
    return EntryKind.END if isinstance(kept, PromptEnd) else EntryKind.STATE
