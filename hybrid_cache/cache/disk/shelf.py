"""What requests may resume from on the disk, as `cache.resumable` says of memory.

As entries come and go, pages begin to lead to a state that lies there, and cease to. A run has many pages, of which
those count that something needs: its own states, and runs behind it. So each run counts how many need it up to which
page, and is said as far as the last of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hybrid_cache.cache.disk.entries import Entry, EntryKind
from hybrid_cache.cache.keys import KEY_BYTES, NAME_BYTES, Name
from hybrid_cache.cache.resumable import Change, Group, Removed, Stored, Tier

COVERS = (Group.PAGES, Group.ENDS)


def _counters() -> dict[Group, Counter[int]]:
    return {group: Counter() for group in COVERS}


@dataclass(slots=True, eq=False)
class _Item:
    """What is known of an entry, and of a run what needs it."""

    id: int
    kind: EntryKind
    namespace: str
    name: Name
    first: int
    above: int | None
    pages: bytes = b""
    needed: dict[Group, Counter[int]] = field(default_factory=_counters)  # up to a page, by how many
    below: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        return self.first + len(self.pages) // NAME_BYTES

    def page(self, number: int) -> Name:
        """The name of the first so many pages, of which the last is in this run."""
        start = (number - self.first - 1) * NAME_BYTES
        return self.pages[start : start + NAME_BYTES]

    def last(self, group: Group) -> int:
        """Pages up to the last one that something needs."""
        return max(self.needed[group], default=self.first)


class Shelf:
    """See the module docstring. An entry must have gone before what it needs is asked for again."""

    def __init__(
        self, may_know: Callable[[str], bool], tokens_of: Callable[[int], bytes], *, states: bool, stateless: bool
    ) -> None:
        """may_know: asked of namespaces   tokens_of: of an entry that is there
        states: all groups, not only the pages   stateless: a model of attention only, which resumes from any page
        """
        self._may_know = may_know
        self._tokens_of = tokens_of
        self._states = states
        self._stateless = stateless
        self._items: dict[int, _Item] = {}
        self._early: dict[int, dict[int, Entry]] = {}  # entries that came before what they need
        self._told: dict[Group, Counter[Name]] = {group: Counter() for group in COVERS}  # pages, by runs that have them
        self._spaces: dict[str, str] = {}

    def __len__(self) -> int:
        """Entries that are known, and can be reached."""
        return len(self._items)

    def came(self, entries: Iterable[Entry]) -> Iterator[Change]:
        """What is to be said now, of entries that were not there before."""
        waiting = list(entries)[::-1]
        while waiting:
            entry = waiting.pop()
            if entry.id in self._items or not self._may_know(entry.facts.namespace):
                continue
            if entry.above is not None and entry.above not in self._items:
                self._early.setdefault(entry.above, {})[entry.id] = entry
            elif (item := self._item(entry)) is not None:
                yield from self._put(item)
                waiting += self._early.pop(entry.id, {}).values()

    def _item(self, entry: Entry) -> _Item | None:
        """None for one that cannot be, as nothing leads to it."""
        facts, above = entry.facts, None if entry.above is None else self._items[entry.above]
        reach = (0, 0) if above is None else (above.first + 1, above.end)
        if not reach[0] <= facts.first <= reach[1]:
            return None
        namespace = self._spaces.setdefault(facts.namespace, facts.namespace)
        item = _Item(entry.id, facts.kind, namespace, facts.name, facts.first, entry.above, facts.pages)
        self._items[entry.id] = item
        if above is not None:
            above.below.add(entry.id)
        return item

    def _put(self, item: _Item) -> Iterator[Change]:
        if item.kind is EntryKind.PAGES:
            if self._stateless:
                yield from self._need(Group.PAGES, item.id, item.end)
        elif item.kind is EntryKind.STATE:
            yield from self._need(Group.PAGES, item.above, item.first)
            if self._states and item.above is not None:
                yield self._stored(Group.STATES, self._items[item.above], item.first - 1, item.first)
        elif self._states:
            yield from self._need(Group.ENDS, item.above, item.first)
            before, tail = self._before(item), self._tokens_of(item.id)
            yield Stored(Group.ENDS, item.namespace, before, (item.name,), (tail,), Tier.DISK)

    def went(self, entries: Iterable[int]) -> Iterator[Change]:
        """What is to be said now that entries are gone, with all that need them."""
        for number in entries:
            for early in self._early.values():
                early.pop(number, None)
            for item in self._with_below(number):
                del self._items[item.id]
                if item.above in self._items:
                    self._items[item.above].below.discard(item.id)
                yield from self._take(item)

    def _with_below(self, number: int) -> list[_Item]:
        """An entry and all that need it, those first that need others."""
        found = [self._items[number]] if number in self._items else []
        for item in found:
            found += [self._items[each] for each in item.below]
        return found[::-1]

    def _take(self, item: _Item) -> Iterator[Change]:
        gone = list[Name]()
        if item.kind is EntryKind.PAGES:
            if self._stateless:
                gone = self._spare(Group.PAGES, item, item.end)
        elif item.kind is EntryKind.STATE:
            if self._states and item.above is not None:
                yield Removed(Group.STATES, (item.name,), Tier.DISK)
            gone = self._spare(Group.PAGES, self._run(item), item.first)
        elif self._states:
            gone = self._spare(Group.ENDS, self._run(item), item.first)
            yield Removed(Group.ENDS, (item.name, *gone), Tier.DISK)
            return
        if gone:
            yield Removed(Group.PAGES, tuple(gone), Tier.DISK)

    # Pages that are needed

    def _run(self, item: _Item) -> _Item | None:
        """That it needs, which goes after it."""
        return None if item.above is None else self._items[item.above]

    def _before(self, item: _Item) -> Name | None:
        """The page before it."""
        return None if item.above is None else self._items[item.above].page(item.first)

    def _need(self, group: Group, above: int | None, end: int) -> Iterator[Change]:
        """Something needs a run, and those before it, up to a page."""
        new = list[tuple[_Item, int, int]]()
        while above is not None:
            run = self._items[above]
            start, was_needed = run.last(group), bool(run.needed[group])
            run.needed[group][end] += 1
            if end > start:
                new.append((run, start, end))
            if was_needed:
                break
            above, end = run.above, run.first
        for run, start, end in reversed(new):
            yield from self._tell(group, run, start, end)

    def _tell(self, group: Group, run: _Item, start: int, end: int) -> Iterator[Change]:
        """Those of the pages [start, end) that no other run has."""
        told = self._told[group]
        for number in range(start + 1, end + 1):
            told[run.page(number)] += 1
        while start < end and told[run.page(start + 1)] > 1:  # what two have in common is at the beginning
            start += 1
        if start < end:
            yield self._stored(group, run, start, end)

    def _stored(self, group: Group, run: _Item, start: int, end: int) -> Stored:
        tokens = self._tokens_of(run.id)
        names = tuple(run.page(number) for number in range(start + 1, end + 1))
        at = ((index - run.first) * KEY_BYTES for index in range(start, end))
        keys = tuple(tokens[place : place + KEY_BYTES] for place in at)
        before = run.page(start) if start > run.first else self._before(run)
        return Stored(group, run.namespace, before, names, keys, Tier.DISK)

    def _spare(self, group: Group, run: _Item | None, end: int) -> list[Name]:
        """Something no longer needs a run up to a page -> pages that nothing needs any more, the longest first."""
        gone = list[Name]()
        while run is not None:
            needed = run.needed[group]
            needed[end] -= 1
            if not needed[end]:
                del needed[end]
            gone += self._withdraw(group, run, run.last(group), end)
            if needed:
                break
            end = run.first
            run = self._run(run)
        return gone

    def _withdraw(self, group: Group, run: _Item, start: int, end: int) -> Iterator[Name]:
        told = self._told[group]
        for number in range(end, start, -1):
            name = run.page(number)
            told[name] -= 1
            if not told[name]:
                del told[name]
                yield name
