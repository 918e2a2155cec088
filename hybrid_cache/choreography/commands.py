"""What choreography asks of the device, in addition to what the books ask (`cache.commands`): integers only.

Both kinds are carried out in the order in which they arose; `device.composition` does these.
"""

from dataclasses import dataclass

from hybrid_cache.cache.commands import Item
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.tree import KVRows
from hybrid_cache.choreography.arrangement import Composition
from hybrid_cache.kernels.grid import TILE


@dataclass(frozen=True, slots=True)
class Clear:
    """States of zero in a slot."""

    slot: int

    def written(self) -> set[Item]:
        """Items that this writes to."""
        return {(Kind.SLOT, self.slot)}


@dataclass(frozen=True, slots=True, eq=False)
class Relocation:
    """Rows of K and V to copy, with keys rotated on by a number of positions."""

    sources: KVRows
    targets: KVRows
    rotation: int


@dataclass(frozen=True, slots=True)
class Relocate:
    """All at once; no row is both a source and a target. model: the fingerprint of the one whose keys these are"""

    model: str
    relocations: tuple[Relocation, ...]

    def written(self) -> set[Item]:
        """Items that this writes to."""
        return {(Kind.PAGE, page) for each in self.relocations for page in (each.targets // TILE).tolist()}


@dataclass(frozen=True, slots=True)
class StoredEffect:
    """What the tokens of a stored message do to the states: S in a slot, with the convolution windows, P in items."""

    slot: int
    items: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Compose:
    """Takes the states in a slot to those after some messages.

    model: the fingerprint of the one whose states these are
    from_zero: the states are taken for zero, whatever the slot holds
    """

    model: str
    slot: int
    how: Composition
    effects: tuple[StoredEffect, ...]
    from_zero: bool

    def written(self) -> set[Item]:
        """Items that this writes to."""
        return {(Kind.SLOT, self.slot)}


@dataclass(frozen=True, slots=True)
class KeepEffect:
    """Completes P of some tokens in `items`, and takes the states in a slot from those after the tokens to S.

    model: the fingerprint of the one whose states these are
    base: slot with the states before the tokens; None if these were zero
    """

    model: str
    slot: int
    items: tuple[int, ...]
    base: int | None

    def written(self) -> set[Item]:
        """Items that this writes to."""
        return {(Kind.SLOT, self.slot)}


Command = Clear | Relocate | Compose | KeepEffect
