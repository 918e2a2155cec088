"""What lies on the disk for the models that are served, by name. In memory, so that to ask it takes no time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybrid_cache.cache.disk.entries import Entry, EntryKind, Facts
from hybrid_cache.cache.geometry import Geometry
from hybrid_cache.cache.keys import Keys, Name
from hybrid_cache.cache.tree import CheckpointKind

_LABELS = {kind.value for kind in CheckpointKind}


@dataclass(frozen=True, slots=True)
class Place:
    """What a prompt can be resumed from with what is on the disk."""

    entries: tuple[Entry, ...]  # to be read: runs of pages from the first to the last, then the state
    first: int  # pages that memory had
    end: int  # pages that are there then
    num_tokens: int  # that need not be computed then

    @property
    def num_bytes(self) -> int:
        return sum(entry.facts.num_bytes for entry in self.entries)

    @property
    def last(self) -> Entry:
        """By which it is known."""
        return self.entries[-1]


class Catalogue:
    """Entries by id and by name, and the pages of all runs."""

    def __init__(self, page_tokens: int, geometry: Geometry, *, stateless: bool, effect_bytes: int = 0) -> None:
        """stateless: a model of attention layers only, which may resume from any page
        effect_bytes: of what the tokens of a message do to the states
        """
        self._page_tokens = page_tokens
        self._geometry = geometry
        self._effect_bytes = effect_bytes
        self._stateless = stateless
        self._has_pages = geometry.page_bytes > 0
        self._entries: dict[int, Entry] = {}
        self._by_name: dict[tuple[EntryKind, Name], Entry] = {}
        self._runs: dict[Name, Entry] = {}  # by the name of each of its pages
        self._below: dict[int, set[int]] = {}  # entries that need an entry

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, entry: int) -> Entry | None:
        return self._entries.get(entry)

    def named(self, kind: EntryKind, name: Name) -> Entry | None:
        return self._by_name.get((kind, name))

    def run(self, page: Name) -> Entry | None:
        """The run with a page, which is the last one of this prefix."""
        return self._runs.get(page)

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes in what is new and can be; those of which the same is known stay."""
        for entry in entries:
            if entry.id in self._entries or not self._can_be(entry.facts):
                continue
            self._entries[entry.id] = entry
            self._by_name[entry.facts.key] = entry
            if entry.above is not None:
                self._below.setdefault(entry.above, set()).add(entry.id)
            if entry.facts.kind is EntryKind.PAGES:
                for name in entry.facts.page_names:
                    self._runs.setdefault(name, entry)

    def _can_be(self, facts: Facts) -> bool:
        """Whether an entry has the size that its kind has here. What others wrote into the index decides nothing."""
        page_bytes, slot_bytes = self._geometry.page_bytes, self._geometry.slot_bytes
        num_pages = facts.end - facts.first
        if facts.kind is EntryKind.PAGES:
            return num_pages > 0 and facts.num_bytes == num_pages * page_bytes
        if facts.kind is EntryKind.MESSAGE:
            return self._can_be_message(facts)
        if facts.label not in _LABELS or (facts.kind is EntryKind.STATE and facts.num_bytes != slot_bytes):
            return False
        return facts.num_bytes in (slot_bytes, slot_bytes + page_bytes)

    def _can_be_message(self, facts: Facts) -> bool:
        length = facts.num_tokens - facts.first
        num_bytes = self._geometry.slot_bytes - (-length // self._page_tokens) * self._geometry.page_bytes
        there = min(length - 1, facts.first, facts.position) >= 0
        return there and facts.num_bytes == num_bytes + self._effect_bytes

    def remove(self, entries: Iterable[int]) -> None:
        """With all that need them. Nothing happens for those that are not here."""
        numbers = list(entries)
        for number in numbers:
            numbers += self._below.pop(number, ())
            entry = self._entries.pop(number, None)
            if entry is None:
                continue
            if entry.above in self._below:
                self._below[entry.above].discard(number)
            if self._by_name.get(entry.facts.key) is entry:
                del self._by_name[entry.facts.key]
            for name in entry.facts.page_names:
                if self._runs.get(name) is entry:
                    del self._runs[name]

    def of_prefix(self, name: Name) -> list[int]:
        """Entries that end with a prefix."""
        found = (self._by_name.get((kind, name)) for kind in EntryKind)
        return [entry.id for entry in found if entry is not None]

    def of_namespaces(self, may: Callable[[str], bool]) -> list[int]:
        return [entry.id for entry in self._entries.values() if may(entry.facts.namespace)]

    def find(self, keys: Keys, num_pages: int, length: int) -> Place | None:
        """The deepest place that a prompt can be resumed from, if that is deeper than where it can without the disk.

        num_pages: of the prompt, that memory has   length: tokens that need not be computed without the disk
        """
        if not self._entries or length >= keys.num_tokens:
            return None
        names, reach = keys.names, self._reach(keys, num_pages)
        end = self._by_name.get((EntryKind.END, keys.end_name))
        if end is not None and reach == len(keys.pages):
            return Place((*self._path(names, num_pages, reach), end), min(num_pages, reach), reach, keys.num_tokens)
        most = min(max(keys.num_tokens - 1, 0) // self._page_tokens, reach)
        for n in range(most, length // self._page_tokens, -1):
            state = self._by_name.get((EntryKind.STATE, names[n]))
            if state is not None or self._stateless:
                last = () if state is None else (state,)
                entries = (*self._path(names, num_pages, n), *last)
                return Place(entries, min(num_pages, n), n, n * self._page_tokens) if entries else None
        return None

    def _reach(self, keys: Keys, num_pages: int) -> int:
        """Pages of a prompt that are there one after the other, in memory and on the disk."""
        if not self._has_pages:
            return len(keys.pages)
        while num_pages < len(keys.pages) and keys.names[num_pages + 1] in self._runs:
            num_pages += 1
        return num_pages

    def _path(self, names: Sequence[Name], first: int, end: int) -> list[Entry]:
        """Runs with the pages [first, end) of a prompt, which are there."""
        if not self._has_pages:
            return []
        return list({run.id: run for name in names[first + 1 : end + 1] if (run := self._runs[name])}.values())
