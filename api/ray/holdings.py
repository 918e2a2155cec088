"""What a replica can resume, under the keys of requests: what its router is told.

Each prompt that comes teaches which pages lie between the ends of two messages, and so belong to the key of the later
one. Pages that lead to a state that lives (`cache.resumable`) make their keys worth a way to this replica; when the
state goes, they do not. What goes on from the end of a prompt, such as its answer, belongs to the prompt's last key.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from hybrid_cache.api.ray.chain import Chain
from hybrid_cache.cache.journal import Journal
from hybrid_cache.cache.keys import Name, keys_of, root_name
from hybrid_cache.cache.resumable import Change, Cleared, Group, Removed, Resumable, Stored
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Prompt

MOST_PLACES = 1 << 17  # pages whose keys are known
MOST_USED = 1 << 14  # keys, of which the latest are told
MOST_OF_ONE = 8  # keys of one page: where conversations part inside a message
MOST_OPEN = 64  # ends of prompts behind one page
MOST_ENTRIES = 4096  # of a digest: 32 KiB
PAGES_BITS = 16
PAGE_BYTES = 4 * TILE  # of a page's tokens
MOST_PAGES = (1 << PAGES_BITS) - 1
MOST_NOTES = 100_000

Digest = bytes


class Holdings:
    """Reads a journal of the cache. Belongs to one thread."""

    def __init__(self, *, states: bool) -> None:
        """states: whether the model has any"""
        self.journal = Journal(lambda: None)
        self._resumable = Resumable(states=states)
        self._keys: OrderedDict[Name, tuple[int, list[int]]] = OrderedDict()  # of a place: pages before it, its keys
        self._open: dict[Name, list[tuple[bytes, int]]] = {}  # ends of prompts: tokens behind the page, and the key
        self._covered: set[Name] = set()  # places of which requests may make use
        self._held: dict[int, dict[Name, int]] = {}  # by key: its covered places, with their pages
        self._used: OrderedDict[int, None] = OrderedDict()  # keys, the latest last

    def learn(self, chain: Chain, namespace: str, prompt: Prompt) -> None:
        """A request with these keys has this prompt."""
        if not chain.keys:
            return
        keys, ends = keys_of(namespace, prompt.tokens), _ends(chain, prompt)
        for pages in range(1, len(keys.pages) + 1):
            place = min(bisect_left(ends, pages * TILE), len(ends) - 1)
            self._attribute(keys.names[pages], pages, chain.keys[place])
        last = keys.names[-1]
        self._attribute(keys.end_name, min(len(keys.pages) + 1, MOST_PAGES), chain.keys[-1])
        self._leave_open(last, keys.tail, chain.keys[-1])
        for key in chain.keys:
            self._used[key] = None
            self._used.move_to_end(key)
        self._forget_oldest()

    def digest(self) -> Digest:
        """Keys with the pages that each leads to, the latest first: little-endian, 48 bits and 16 bits."""
        self.read(self._resumable.read(self.journal.take(MOST_NOTES)))
        entries = array("Q")
        for key in reversed(self._used):
            if places := self._held.get(key):
                entries.append(key << PAGES_BITS | min(max(places.values()), MOST_PAGES))
            if len(entries) == MOST_ENTRIES:
                break
        return entries.tobytes()

    def read(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if isinstance(change, Cleared):
                self._covered.clear()
                self._held.clear()
            elif isinstance(change, Removed):
                self._removed(change)
            elif change.group is not Group.STATES:
                self._stored(change)

    def _stored(self, stored: Stored) -> None:
        if stored.group is Group.ENDS:  # pages before an end have a group of their own
            if len(stored.keys[0]) < PAGE_BYTES:
                self._cover(stored.names[0])
            return
        before = stored.before or root_name(stored.namespace)
        for name, key in zip(stored.names, stored.keys, strict=True):
            self._go_on(before, name, key)
            self._cover(name)
            before = name

    def _go_on(self, before: Name, name: Name, key: bytes) -> None:
        """A page behind the end of a prompt, which begins with the rest of that, belongs to the prompt."""
        pages = self._keys[before][0] + 1 if before in self._keys else 1
        for tail, owner in list(self._open.get(before, ())):
            if key.startswith(tail):
                self._attribute(name, pages, owner)
                self._leave_open(name, b"", owner)

    def _removed(self, removed: Removed) -> None:
        gone = removed.names[:1] if removed.group is Group.ENDS else removed.names  # of an end: its pages have a group
        for name in gone if removed.group is not Group.STATES else ():
            self._covered.discard(name)
            for key in self._keys.get(name, (0, ()))[1]:
                self._drop(key, name)

    def _cover(self, name: Name) -> None:
        self._covered.add(name)
        if name in self._keys:
            pages, keys = self._keys[name]
            for key in keys:
                self._held.setdefault(key, {})[name] = pages

    def _attribute(self, name: Name, pages: int, key: int) -> None:
        _, keys = self._keys.setdefault(name, (pages, []))
        self._keys.move_to_end(name)
        if key not in keys:
            keys.append(key)
            if len(keys) > MOST_OF_ONE:
                self._drop(keys.pop(0), name)
        if name in self._covered:
            self._held.setdefault(key, {})[name] = pages

    def _leave_open(self, name: Name, tail: bytes, key: int) -> None:
        ends = self._open.setdefault(name, [])
        if (tail, key) not in ends:
            ends.append((tail, key))
            del ends[:-MOST_OPEN]

    def _drop(self, key: int, name: Name) -> None:
        places = self._held.get(key, {})
        places.pop(name, None)
        if not places:
            self._held.pop(key, None)

    def _forget_oldest(self) -> None:
        while len(self._keys) > MOST_PLACES:
            name, (_, keys) = self._keys.popitem(last=False)
            self._open.pop(name, None)
            for key in keys:
                self._drop(key, name)
        while len(self._used) > MOST_USED:
            self._used.popitem(last=False)


def entries_of(digest: Digest) -> dict[int, int]:
    """Of a digest: tokens by key."""
    return {entry >> PAGES_BITS: (entry & MOST_PAGES) * TILE for entry in array("Q", digest)}


def _ends(chain: Chain, prompt: Prompt) -> Sequence[int]:
    """Tokens before the end of each of the chain's messages: as rendered, or where that has others, by their sizes."""
    if len(prompt.ends) == len(chain.keys):
        return prompt.ends
    return [len(prompt.tokens) * size // max(chain.size, 1) for size in chain.sizes]
