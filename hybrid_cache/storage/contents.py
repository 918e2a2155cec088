"""What lies in a folder, as conversations: for people who look after it. `cache.inventory` says the same of memory.

A conversation ends with a place that no other goes on from, and is known by its name. Its stretch is what it has to
itself: runs and states after the last place where another conversation branches off. A run is one file, so what only a
part of it is needed for stays as a whole.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from hybrid_cache.cache.disk.entries import Entry, EntryKind
from hybrid_cache.cache.disk.index import Use
from hybrid_cache.cache.keys import KEY_BYTES, goes_on_from
from hybrid_cache.storage.folder import BadEntry, Folder

Spot = tuple[str, int | None, int]  # namespace, the run with the page before it, pages before it


@dataclass(frozen=True, slots=True)
class StoredState:
    """A place that a request may go on from."""

    entry: Entry
    use: Use
    age_s: float  # since it was written or used


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A place that no other goes on from, and what it has to itself."""

    end: StoredState
    num_bytes: int  # of the files of its stretch: what is freed when it is dropped
    uses: int  # of all states of its stretch


@dataclass(frozen=True, slots=True)
class WholeChain:
    """One of them, from its beginning."""

    conversation: StoredConversation
    states: tuple[StoredState, ...]  # on the whole path, rising
    files: tuple[Entry, ...]  # that its end needs, in the order in which they are needed


class Contents:
    """Reads an index once, and answers questions about it. Methods raise OSError and sqlite3.Error."""

    def __init__(self, folder: Folder, may_see: Callable[[str], bool], now: Callable[[], float] = time.time) -> None:
        """may_see: asked of namespaces"""
        self._folder = folder
        self._now = now()
        self._entries = {e.id: e for e in folder.index.all() if may_see(e.facts.namespace)}
        self._uses = folder.index.uses()
        self._branches: dict[Spot, set[int]] = defaultdict(set)  # runs of conversations that begin there
        self._reaches: dict[int, Counter[int]] = defaultdict(Counter)  # of a run: pages that conversations need
        self._ends_at: dict[Spot, list[Entry]] = defaultdict(list)
        self._tokens: dict[int, bytes] = {}
        self._places = [entry for entry in self._entries.values() if self._is_place(entry) and self._is_whole(entry)]
        for place in self._places:
            self._ends_at[self._spot(place)].append(place)
            for run, end in self._runs(place):
                self._branches[run.facts.namespace, run.above, run.facts.first].add(run.id)
                self._reaches[run.id][end] += 1

    # Questions

    def conversations(self) -> list[StoredConversation]:
        """The one that was used last comes first."""
        return sorted(map(self._conversation, self._ends), key=lambda each: each.end.age_s)

    def find(self, name: str) -> WholeChain | None:
        """The one whose name begins with these hexadecimal digits; None if there is none, or more than one."""
        end = self._named(name)
        if end is None:
            return None
        runs = [run for run, _ in self._runs(end)][::-1]
        files = (*runs, *(() if end.facts.kind is EntryKind.PAGES else (end,)))
        return WholeChain(self._conversation(end), tuple(map(self._state, self._on_path(end))), files)

    def why_not(self, entry: Entry) -> str:
        """Why the file of an entry is not what it was, in a word; empty if it is."""
        try:
            self._folder.read(entry)
        except BadEntry as error:
            return str(error)
        except OSError as error:
            return error.strerror or "error"
        return ""

    def drop(self, name: str) -> int | None:
        """Removes the stretch of a conversation -> bytes freed. None as in `find`."""
        end = self._named(name)
        return None if end is None else self._remove([entry.id for entry in self._stretch(end)])

    def drop_all(self) -> int:
        """Removes all that is seen -> bytes freed."""
        return self._remove([*self._entries])

    def _remove(self, entries: list[int]) -> int:
        gone = self._folder.index.remove(entries)
        self._folder.erase(gone)
        return sum(self._entries[each].facts.file_bytes for each in set(gone) if each in self._entries)

    # Where places lie

    @cached_property
    def _stateful(self) -> set[str]:
        """Models with states: what lies there of others are pages alone, which may be resumed from."""
        return {entry.facts.identity for entry in self._entries.values() if entry.facts.kind is EntryKind.STATE}

    def _is_place(self, entry: Entry) -> bool:
        return entry.facts.kind is not EntryKind.PAGES or entry.facts.identity not in self._stateful

    def _is_whole(self, entry: Entry) -> bool:
        """Whether all that it needs is there."""
        while entry.above is not None:
            if entry.above not in self._entries:
                return False
            entry = self._entries[entry.above]
        return True

    def _spot(self, place: Entry) -> Spot:
        """Where a place lies; a run lies at its end."""
        facts = place.facts
        is_run = facts.kind is EntryKind.PAGES
        return facts.namespace, place.id if is_run else place.above, facts.end if is_run else facts.first

    def _runs(self, place: Entry) -> Iterator[tuple[Entry, int]]:
        """The runs that a place needs, the last one first; each with the pages that it needs up to there."""
        _, above, end = self._spot(place)
        while above is not None:
            run = self._entries[above]
            yield run, end
            above, end = run.above, run.facts.first

    # Conversations

    @cached_property
    def _ends(self) -> list[Entry]:
        """Places that no other goes on from."""
        return [place for place in self._places if not self._goes_on(place)]

    def _goes_on(self, place: Entry) -> bool:
        after, ends = self._next(self._spot(place)), self._ends_at[self._spot(place)]
        if place.facts.kind is EntryKind.END:
            tail = self._said(place)
            return any(goes_on_from(key, tail) for run, index in after if (key := self._page(run, index)))
        return any(True for _ in after) or any(each.facts.kind is EntryKind.END for each in ends)

    def _next(self, spot: Spot) -> Iterator[tuple[Entry, int]]:
        """Pages with which conversations go on: a run, and pages before it."""
        _, run, num_pages = spot
        if run is not None and max(self._reaches[run], default=0) > num_pages:
            yield self._entries[run], num_pages
        for each in self._branches.get(spot, ()):
            yield self._entries[each], num_pages

    def _page(self, run: Entry, index: int) -> bytes:
        """Its key; empty where its tokens are not known."""
        start = (index - run.facts.first) * KEY_BYTES
        return self._said(run)[start : start + KEY_BYTES]

    def _said(self, entry: Entry) -> bytes:
        if entry.id not in self._tokens:
            self._tokens[entry.id] = self._folder.index.tokens(entry.id)
        return self._tokens[entry.id]

    def _named(self, name: str) -> Entry | None:
        found = [end for end in self._ends if end.facts.name.hex().startswith(name.lower())]
        return found[0] if len(found) == 1 else None

    def _on_path(self, end: Entry) -> list[Entry]:
        """The places of a conversation from its beginning, rising."""
        found = [end, *self._before(end, self._spot(end), lambda: self._said(end))]
        for run, last in self._runs(end):
            for index in range(last - 1, run.facts.first - 1, -1):
                above = run.id if index > run.facts.first else run.above
                spot = run.facts.namespace, above, index
                found += self._before(end, spot, partial(self._page, run, index))
        return sorted(found, key=lambda each: each.facts.num_tokens)

    def _before(self, end: Entry, spot: Spot, after: Callable[[], bytes]) -> Iterator[Entry]:
        """Places at a spot, with which a conversation begins that goes on with some tokens there."""
        for each in self._ends_at.get(spot, ()):
            whole = each.facts.kind is EntryKind.END
            if each is not end and (not whole or goes_on_from(after(), self._said(each))):
                yield each

    def _stretch(self, end: Entry) -> list[Entry]:
        """Entries that are one conversation's alone."""
        shared = {run.id: self._shared(run, last) for run, last in self._runs(end)}
        own = [self._entries[run] for run, num_pages in shared.items() if not num_pages]
        spots = ((each, self._spot(each)) for each in self._on_path(end) if each.facts.kind is not EntryKind.PAGES)
        return own + [each for each, (_, run, n) in spots if each is end or (run is not None and n > shared[run])]

    def _shared(self, run: Entry, last: int) -> int:
        """Pages up to the last one of a run that others need, beside the conversation that needs some; 0 for none."""
        needed = self._needed[run.id]
        return max((num for num, count in needed.items() if count > (num == last)), default=0)

    @cached_property
    def _needed(self) -> dict[int, Counter[int]]:
        """Of runs, up to which page the ends of conversations need them."""
        needed: dict[int, Counter[int]] = defaultdict(Counter)
        for end in self._ends:
            for run, last in self._runs(end):
                needed[run.id][last] += 1
        return needed

    def _conversation(self, end: Entry) -> StoredConversation:
        stretch = self._stretch(end)
        uses = sum(self._uses[entry.id].count for entry in stretch if entry.facts.kind is not EntryKind.PAGES)
        return StoredConversation(self._state(end), sum(entry.facts.file_bytes for entry in stretch), uses)

    def _state(self, place: Entry) -> StoredState:
        use = self._uses[place.id]
        return StoredState(place, use, max(self._now - use.at, 0.0))
