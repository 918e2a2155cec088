"""The pages that lead to what requests may start from: as places come and go, which pages begin and cease to.

A page is of use as long as a state lies at its end or somewhere behind it. So each node counts its own state and those
of its children that count, and is said to be there while that is more than none: once said, once taken back.

Three groups are kept apart, as a page may belong to more than one:

    PAGES    pages down to the deepest states, or all pages of a model without states
    STATES   the states at the ends of pages: from these alone can a longer prompt go on
    ENDS     ends of whole prompts, with all pages before them: good for exactly that prompt
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import groupby

from hybrid_cache.cache.journal import Note, Place
from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.tree import Checkpoint, Node, PromptEnd


class Group(IntEnum):
    """See the module docstring."""

    PAGES = 0
    STATES = 1
    ENDS = 2


class Tier(Enum):
    """Where something lies."""

    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Stored:
    """Pages that follow each other, in one namespace; or the end of a prompt behind its last page."""

    group: Group
    namespace: str
    before: Name | None  # the page before them; None at the beginning of a sequence
    names: tuple[Name, ...]
    keys: tuple[bytes, ...]  # of the pages, or of what the prompt has behind them
    tier: Tier = Tier.MEMORY

    @classmethod
    def of(cls, group: Group, nodes: tuple[Node, ...]) -> "Stored":
        names, keys = tuple(node.name for node in nodes), tuple(node.key for node in nodes)
        return cls(group, nodes[0].namespace, _name_of(nodes[0].parent), names, keys)


def _name_of(page: Node | None) -> Name | None:
    return None if page is None or page.parent is None else page.name


@dataclass(frozen=True, slots=True)
class Removed:
    """Prefixes that are of no use any more, the longest first."""

    group: Group
    names: tuple[Name, ...]
    tier: Tier = Tier.MEMORY


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing of all that was said is there."""


Change = Stored | Removed | Cleared


class Cover:
    """Nodes that lead to something, each with the number of reasons."""

    def __init__(self) -> None:
        self._reasons: dict[Node, int] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, node: Node) -> tuple[Node, ...]:
        """Something is at a node -> nodes that lead to something now, and did not before, from the first to the last.

        Takes time in proportion to what it returns.
        """
        new = list[Node]()
        while node.parent is not None:
            count = self._reasons.get(node, 0)
            self._reasons[node] = count + 1
            if count:
                break
            new.append(node)
            node = node.parent
        return tuple(reversed(new))

    def remove(self, node: Node) -> tuple[Node, ...]:
        """What was at a node is gone -> nodes that lead to nothing any more, from the last to the first."""
        gone = list[Node]()
        while node.parent is not None:
            self._reasons[node] -= 1
            if self._reasons[node]:
                break
            del self._reasons[node]
            gone.append(node)
            node = node.parent
        return tuple(gone)


class Resumable:
    """Says what has changed, of the namespaces that others may know of. See the module docstring."""

    def __init__(self, may_know: Callable[[str], bool] = lambda namespace: True, states: bool = True) -> None:
        """may_know: asked of the namespace of each place that comes   states: all groups, not only the pages"""
        self._may_know = may_know
        self._states = states
        self._pages, self._ends = Cover(), Cover()
        self._places: dict[Place, None] = {}

    @property
    def num_pages(self) -> int:
        """Pages that requests may go on from."""
        return len(self._pages)

    def read(self, notes: Iterable[Note]) -> Iterator[Change]:
        """What is to be said of these, which must be all notes in their order."""
        for place, came in notes:
            if place is None:
                yield self._forget()
            elif came:
                yield from self._came(place)
            elif place in self._places:
                yield from self._went(place)

    def all(self) -> Iterator[Change]:
        """Everything from the beginning, for those who have missed something. To be taken to its end."""
        places = list(self._places)
        yield self._forget()
        for place in places:
            yield from self._came(place)

    def _forget(self) -> Cleared:
        self._pages, self._ends = Cover(), Cover()
        self._places = {}
        return Cleared()

    def _came(self, place: Place) -> Iterator[Change]:
        wanted = self._states or not isinstance(place, PromptEnd)
        if not wanted or place in self._places or not self._may_know(place.namespace):
            return
        self._places[place] = None
        if isinstance(place, PromptEnd):
            yield from (Stored.of(Group.ENDS, run) for run in _runs(self._ends.add(place.node)))
            yield Stored(Group.ENDS, place.namespace, _name_of(place.node), (place.name,), (place.tail,))
            return
        node = place.node if isinstance(place, Checkpoint) else place
        yield from (Stored.of(Group.PAGES, run) for run in _runs(self._pages.add(node)))
        if self._states and isinstance(place, Checkpoint):
            yield Stored.of(Group.STATES, (node,))

    def _went(self, place: Place) -> Iterator[Change]:
        del self._places[place]
        if isinstance(place, PromptEnd):
            gone = tuple(node.name for node in self._ends.remove(place.node))
            yield Removed(Group.ENDS, (place.name, *gone))
            return
        if self._states and isinstance(place, Checkpoint):
            yield Removed(Group.STATES, (place.name,))
        node = place.node if isinstance(place, Checkpoint) else place
        if gone := tuple(node.name for node in self._pages.remove(node)):
            yield Removed(Group.PAGES, gone)


def _runs(nodes: Iterable[Node]) -> Iterator[tuple[Node, ...]]:
    """Those of one namespace together."""
    return (tuple(run) for _, run in groupby(nodes, lambda node: node.namespace))
