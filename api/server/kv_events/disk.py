"""What the publisher asks of a disk tier: the index is looked at from outside, so that the engine loses no time."""

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from hybrid_cache.cache.disk.shelf import Shelf
from hybrid_cache.cache.resumable import Change
from hybrid_cache.storage.watch import Watch

LOOK_S = 0.5  # between two looks at what has changed

logger = logging.getLogger("hybrid_cache.server")


class Disk:
    """What can be resumed from a folder, told in parts. For the publisher's thread."""

    def __init__(self, folder: Path, identities: Callable[[], Collection[str]]) -> None:
        """identities: of the models that are served"""
        self._watch = Watch(folder)
        self._identities = identities
        self._new_shelf: Callable[[], Shelf] | None = None
        self._shelf: Shelf | None = None
        self._has_failed = False
        self.more = False  # the last look has not seen all that there is

    def open(self, may_know: Callable[[str], bool], *, states: bool, stateless: bool) -> None:
        """See `Shelf`. To be called before the first look."""
        self._new_shelf = lambda: Shelf(may_know, self._watch.tokens, states=states, stateless=stateless)
        self.rewind()

    def rewind(self) -> None:
        """Nothing has been told."""
        assert self._new_shelf is not None
        self._shelf = self._new_shelf()
        self._watch.rewind()

    def changes(self) -> Iterator[Change]:
        """The next of what is to be told. An index that cannot be read now is looked at again later."""
        assert self._shelf is not None
        try:
            with self._watch.look(self._identities()) as seen:
                self.more = seen.more
                yield from self._shelf.went(seen.gone)
                yield from self._shelf.came(seen.new)
        except sqlite3.Error as error:
            if not self._has_failed:
                logger.warning("KV events: the index of the disk tier cannot be read: %s", error)
            self._has_failed, self.more = True, False

    def close(self) -> None:
        self._watch.close()
