"""What requests may start from, as it comes and goes: noted by the books, read by a thread that tells others.

A note is one append to a queue, so that the books' thread loses no time. The queue is bounded: once it is full, all
that waits is replaced by what there is at that moment, which is no more than the cache holds.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from hybrid_cache.cache.tree import Checkpoint, Node, PromptEnd

Place = Checkpoint | PromptEnd | Node  # a node: of a model without states, which may start from any page
MOST_NOTES = 100_000


class Note(NamedTuple):
    """A place came, or went. Without a place: forget all that was said before, what is there now follows."""

    place: Place | None
    came: bool


ANEW = Note(None, came=True)


class Watcher(Protocol):
    """Is told of each place at once, on the thread of the books."""

    def came(self, place: Place) -> None: ...
    def went(self, place: Place) -> None: ...


class Nobody:
    """Watches nothing."""

    def came(self, place: Place) -> None:
        pass

    def went(self, place: Place) -> None:
        pass


class Journal:
    """A `Watcher` whose notes another thread takes. One thread writes, one reads."""

    def __init__(self, wake: Callable[[], None], most: int = MOST_NOTES) -> None:
        """wake: called, on either thread, once there are notes after the reader has said that it sleeps
        most: notes that may wait, unless more places are there
        """
        self.num_overflows = 0
        self._notes: deque[Note] = deque()
        self._wake = wake
        self._awake = False
        self._most = self._limit = most
        self._places: Callable[[], Iterable[Place]] = tuple

    def __len__(self) -> int:
        """Notes that wait."""
        return len(self._notes)

    def begin(self, places: Callable[[], Iterable[Place]]) -> None:
        """places: all that are there when it is called, on the writer's thread"""
        self._places = places
        self._begin_anew()
        self._ring()

    def came(self, place: Place) -> None:
        self._note(Note(place, came=True))

    def went(self, place: Place) -> None:
        self._note(Note(place, came=False))

    def take(self, most: int) -> list[Note]:
        """The next notes, oldest first; empty if there are none. To be called by the reader."""
        return [self._notes.popleft() for _ in range(min(most, len(self._notes)))]

    def sleep(self) -> None:
        """To be called by the reader, which wants to be woken by the next note."""
        self._awake = False  # before it looks: what is noted meanwhile wakes it, too
        if self._notes:
            self._ring()

    def _note(self, note: Note) -> None:
        if len(self._notes) >= self._limit:
            self.num_overflows += 1
            self._begin_anew()  # the change has been made, and is among what there is
        else:
            self._notes.append(note)
        self._ring()

    def _ring(self) -> None:
        if not self._awake:
            self._awake = True
            self._wake()

    def _begin_anew(self) -> None:
        places = list(self._places())
        self._notes.clear()
        self._notes.append(ANEW)
        self._notes.extend(Note(place, came=True) for place in places)
        self._limit = max(self._most, 2 * len(self._notes))
