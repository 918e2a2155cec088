"""What waiting prompts are to get from the disk, and how it enters the tree."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hybrid_cache.cache.commands import Forget, Restore
from hybrid_cache.cache.disk.catalogue import Catalogue, Place
from hybrid_cache.cache.disk.entries import Entry, EntryKind, Loaded, NotLoaded, Storage
from hybrid_cache.cache.disk.saving import Saving
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.keys import Keys, Name, message_name
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.messages import MessageStore
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Node, PromptEnd

FIRST_BYTES_PER_S, FIRST_LATENCY_S = 2e8, 0.01  # before any load was measured
NEWEST = 0.3  # weight of the newest load in a moving average
LEAST_PATIENCE_S = 0.05
PATIENCE_S = 10.0  # where it is not known how long it takes to compute
MOST_LOADED_BYTES = 64 << 20  # that are read and not in the tree yet


@dataclass(slots=True, eq=False)
class Load:
    """A place on its way to memory, for one prompt or several that begin alike; or a message, for all with it."""

    ticket: int
    place: Place
    keys: Keys | str  # of the prompt; of a message, its key
    until_s: float  # when it is given up
    over: bool = False
    num_loaded: int = 0  # tokens that came back


class Loading:
    """See the module docstring. Changes tree and pool for the books, as a finished pass does."""

    def __init__(
        self,
        storage: Storage,
        catalogue: Catalogue,
        saving: Saving,
        pool: Pool,
        messages: MessageStore,
        clock: Callable[[], float],
    ) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._pool = pool
        self._clock = clock
        self._messages = messages
        self._saving = saving
        self._page_tokens = pool.tree.page_tokens
        self._num_loads = 0
        self._loads: dict[int, Load] = {}  # under way, by ticket
        self._by_entry: dict[int, Load] = {}  # the same, by the id of the last entry
        self._bytes_per_s, self._latency_s = FIRST_BYTES_PER_S, FIRST_LATENCY_S
        self.num_tokens = 0  # that came back
        self.num_bytes = 0
        self.outcomes: Counter[str] = Counter()  # of prompts that could have been resumed from the disk
        self.refused: Counter[str] = Counter()  # entries that could not be used, by why

    def __bool__(self) -> bool:
        """Whether something is under way."""
        return bool(self._loads)

    def seconds(self, num_bytes: int) -> float:
        """That a load takes, with what is being read now."""
        before = sum(load.place.num_bytes for load in self._loads.values())
        return self._latency_s + (before + num_bytes) / self._bytes_per_s

    def begin(self, match: Match, compute_s: Callable[[int, int], float]) -> Load | None:
        """Has a prompt's beginning loaded, if it is there and that is faster than computing it.

        compute_s: seconds to compute tokens [start, end); 0 where that is not known yet
        """
        place = self._catalogue.find(match.keys, len(match.path), match.length)
        if place is None:
            return None
        return self._begin(place, match.keys, lambda: compute_s(match.length, place.num_tokens))

    def begin_message(self, namespace: str, key: str, compute_s: Callable[[int, int], float]) -> Load | None:
        """Has a message of a choreography loaded, as `begin`. key: that it is stored under"""
        entry = self._catalogue.named(EntryKind.MESSAGE, message_name(namespace, key))
        if entry is None:
            return None
        start, end = entry.facts.first, entry.facts.num_tokens
        place = Place((entry,), 0, -(-(end - start) // self._page_tokens), end - start)
        return self._begin(place, key, lambda: compute_s(start, end))

    def _begin(self, place: Place, keys: Keys | str, compute_s: Callable[[], float]) -> Load | None:
        if (load := self._by_entry.get(place.last.id)) is not None:
            return load
        saved_s = compute_s()
        if why := self._why_not(place, saved_s):
            self.outcomes[why] += 1
            return None
        self._num_loads += 1
        until_s = self._clock() + (max(saved_s, LEAST_PATIENCE_S) if saved_s else PATIENCE_S)
        load = Load(self._num_loads, place, keys, until_s)
        self._loads[load.ticket] = self._by_entry[place.last.id] = load
        self._storage.load(load.ticket, place.entries)
        return load

    def _why_not(self, place: Place, saved_s: float) -> str:
        if saved_s and self.seconds(place.num_bytes) >= saved_s:
            return "slower"
        loading = sum(load.place.num_bytes for load in self._loads.values())
        if loading and loading + place.num_bytes > MOST_LOADED_BYTES:
            return "busy"
        return "" if self._pool.fits(place.end - place.first, 1) else "room"

    def is_under_way(self, load: Load) -> bool:
        """Gives it up once it takes longer than computing."""
        if not load.over and self._clock() > load.until_s:
            self.outcomes["late"] += 1
            self._end(load)
            self._storage.forget(load.ticket)
        return not load.over

    def forget(self, name: Name) -> None:
        """Gives up what ends with a prefix."""
        self._forget_all(lambda load: load.place.last.facts.name == name)

    def forget_namespaces(self, may: Callable[[str], bool]) -> None:
        """Gives up what is of the namespaces that are meant."""
        self._forget_all(lambda load: any(may(entry.facts.namespace) for entry in load.place.entries))

    def _forget_all(self, meant: Callable[[Load], bool]) -> None:
        for load in [load for load in self._loads.values() if meant(load)]:
            self._end(load)
            self._storage.forget(load.ticket)

    def _end(self, load: Load) -> None:
        load.over = True
        self._loads.pop(load.ticket, None)
        self._by_entry.pop(load.place.last.id, None)

    # What the storage reports

    def failed(self, report: NotLoaded) -> None:
        """An entry is not what it was, or cannot be read."""
        self.refused[report.why] += 1
        load = self._loads.get(report.ticket)
        if load is not None:
            self.outcomes["refused"] += 1
            self._end(load)

    def loaded(self, report: Loaded) -> None:
        """All of it was read and is right."""
        self._measure(report.num_bytes, report.seconds)
        load = self._loads.get(report.ticket)
        if load is None:
            self._storage.forget(report.ticket)
            return
        self._end(load)
        entered = self._enter_message(load, load.keys) if isinstance(load.keys, str) else self._enter(load, load.keys)
        self.outcomes["loaded" if entered else "room"] += 1
        self._pool.emit(Forget(load.ticket))

    def _measure(self, num_bytes: int, seconds: float) -> None:
        if num_bytes < 1 << 20:
            self._latency_s += NEWEST * (min(seconds, 1.0) - self._latency_s)
        else:
            rate = num_bytes / max(seconds - self._latency_s, seconds / 4, 1e-6)
            self._bytes_per_s += NEWEST * (rate - self._bytes_per_s)

    def _count(self, load: Load, num_tokens: int) -> None:
        load.num_loaded = num_tokens
        self.num_tokens += num_tokens
        self.num_bytes += load.place.num_bytes

    # Into the store of messages

    def _enter_message(self, load: Load, key: str) -> bool:
        """Publishes a message that was read -> whether there was room, and nobody was faster."""
        entry, position = load.place.last, load.place.last.facts.position
        place = entry.facts.first, entry.facts.num_tokens, position
        stored = self._messages.restore(entry.facts.namespace, key, *place, load.ticket, entry.id)
        if stored is None:
            return False
        self._count(load, stored.length)
        self._saving.used(entry, stored, read=True)
        return True

    # Into the tree

    def _enter(self, load: Load, keys: Keys) -> bool:
        """Publishes pages and the state that were read -> whether there was room, and what they need is there."""
        place, pool = load.place, self._pool
        path = list(pool.tree.walk(keys.namespace, keys.pages[: place.end]))
        if len(path) < place.first:
            return False
        root = pool.tree.root(keys.namespace)
        missing = place.end - len(path)
        self._pin(root, path)
        state = place.last if place.last.facts.kind is not EntryKind.PAGES else None
        taken = self._take(path, missing, state)
        if taken is not None:
            slots, pages = taken
            for page in pages[:missing]:
                path.append(self._page(load, keys, path[-1] if path else root, len(path), page))
            if slots and state is not None:
                self._keep(load, keys, state, path, root, slots[0], pages[missing:])
            self._count(load, place.num_tokens - place.first * self._page_tokens)
            tip = path[-1] if path else root
            kept = tip.ends.get(keys.tail) if place.num_tokens % self._page_tokens else tip.checkpoint
            self._saving.used(place.last, kept or tip, read=True)
        self._unpin(root, path)
        return taken is not None

    def _take(self, path: list[Node], missing: int, state: Entry | None) -> tuple[list[int], list[int]] | None:
        tail = state is not None and state.facts.num_bytes > self._pool.geometry.slot_bytes
        num_held = sum(node.pins == 1 for node in path)
        return self._pool.take(num_slots=int(state is not None), num_pages=missing + tail, num_held=num_held)

    def _page(self, load: Load, keys: Keys, parent: Node, index: int, page: int) -> Node:
        """A page of a run enters the tree."""
        pool = self._pool
        name, num_bytes = keys.names[index + 1], pool.geometry.page_bytes
        run = next((each for each in load.place.entries if name in each.facts.page_names), None)
        if run is not None:
            offset = run.facts.page_names.index(name) * num_bytes
            pool.emit(Restore(Kind.PAGE, page, load.ticket, run.id, offset, num_bytes))
        node = pool.tree.insert(parent, keys.pages[index], name, page, self._clock(), keys.namespace_of(index))
        pool.publish_page(node)
        node.pins = 1
        return node

    def _keep(
        self, load: Load, keys: Keys, state: Entry, path: list[Node], root: Node, slot: int, pages: list[int]
    ) -> None:
        """The state enters the tree, unless another was faster."""
        pool, node = self._pool, path[-1] if path else root
        slot_bytes, page_bytes = pool.geometry.slot_bytes, pool.geometry.page_bytes
        whole = state.facts.kind is EntryKind.END
        if keys.tail in node.ends if whole else node.checkpoint is not None:
            pool.give(Kind.SLOT, slot)
            for page in pages:
                pool.give(Kind.PAGE, page)
            return
        pool.emit(Restore(Kind.SLOT, slot, load.ticket, state.id, 0, slot_bytes))
        for page in pages:
            pool.emit(Restore(Kind.PAGE, page, load.ticket, state.id, slot_bytes, page_bytes))
        if whole:
            namespace, tail = keys.namespace_of(len(path)), pages[0] if pages else None
            end = PromptEnd(node, keys.end_name, namespace, keys.tail, keys.num_tokens, slot, tail)
            node.ends[keys.tail] = end
            pool.publish(end, path)
        else:
            node.checkpoint = Checkpoint(node, slot, CheckpointKind(state.facts.label))
            pool.publish(node.checkpoint, path)
            pool.rescore_below(node)

    def _pin(self, root: Node, path: list[Node]) -> None:
        root.pins += 1
        for node in path:
            node.pins += 1
            self._pool.queues.withdraw_dead(node)

    def _unpin(self, root: Node, path: list[Node]) -> None:
        root.pins -= 1
        for node in path:
            node.pins -= 1
            node.last_used = self._clock()
            if not node.pins:
                self._pool.allocator.unfix(Kind.PAGE, node.page)
        self._pool.settle(path[-1] if path else root)
