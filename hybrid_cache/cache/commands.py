"""What the books ask of the memory of the cache, in order: integers only. `device.memory` carries it out.

Whatever the books decide is true at once in the books. So commands are carried out in the order in which they arose,
and all of them before the next forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hybrid_cache.cache.disk.entries import NewEntry
from hybrid_cache.cache.geometry import Kind

Item = tuple[Kind, int]  # a page or a slot, by its number


@dataclass(frozen=True, slots=True)
class Copy:
    """All bytes of an item."""

    kind: Kind
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Move:
    """Items of a kind, each (from, to), all at once; none is both. What was published stays published."""

    kind: Kind
    moves: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CopyEntries:
    """What some layers have in items, each (from, to); the rest of these items stays as it is."""

    kind: Kind
    copies: tuple[tuple[int, int], ...]
    entries: tuple[int, ...]  # of the kind, in the order of `CacheSpec.layers`


@dataclass(frozen=True, slots=True)
class KeepHidden:
    """One of the hidden rows that the latest forward pass gave, into a slot."""

    slot: int
    row: int


@dataclass(frozen=True, slots=True)
class Seal:
    """These items are published: no byte of them changes from now on. `what` is for error messages."""

    items: tuple[Item, ...]
    what: str


@dataclass(frozen=True, slots=True)
class Unseal:
    """These items are no longer published: they are free, or belong to one request."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """These published items are about to be read."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class VerifySome:
    """Compares a few published items at random."""


@dataclass(frozen=True, slots=True)
class Store:
    """An item of the device to a place in host memory."""

    kind: Kind
    item: int
    host: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is at a place in host memory to an item of the device."""

    kind: Kind
    host: int
    item: int


@dataclass(frozen=True, slots=True)
class MoveHost:
    """As `Move`, in host memory."""

    kind: Kind
    moves: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Items of the device to files that belong together, which are written later."""

    job: int
    entries: tuple[NewEntry, ...]


@dataclass(frozen=True, slots=True)
class Restore:
    """Bytes that were read from a file, from an offset on, to an item of the device."""

    kind: Kind
    item: int
    ticket: int
    entry: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Forget:
    """What was read under a ticket is not needed any more."""

    ticket: int


Memory = Copy | CopyEntries | Move | KeepHidden | Seal | Unseal | Verify | VerifySome
Command = Memory | Store | Load | MoveHost | Save | Restore | Forget
Emit = Callable[[Command], None]


def nowhere(command: Command) -> None:
    """For books without any memory, as simulations keep them."""
