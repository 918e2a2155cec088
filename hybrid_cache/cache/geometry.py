"""How one budget of bytes is cut into KV pages and state slots, side by side and with no fixed split.

The budget is cut in units as large as the smaller kind of item; the larger kind spans a whole slab of units:

    unit    | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |10 |11 |12 |      here a slot is as large as 4 pages
    slab    |       0       |       1       |       2       |tail
    holds   | one slot      | page page  -   - | nothing yet   |page    small items in one slab, or one large item
    number  | slot 0        | page 4, page 5    |               |page 12

Small items are numbered by unit, large items by slab, so both kinds are plain strided views of one buffer.
"""

from dataclasses import dataclass
from enum import Enum

from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import AttentionSpec, CacheSpec, align64

MIN_FREE_PAGES = 1 << 16  # pages of a model without attention are numbers only, and cost no bytes


class Kind(Enum):
    """What an item of the arena holds."""

    PAGE = "page"
    SLOT = "slot"

    __hash__ = object.__hash__  # members are unique; the enum's own hash is slow


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a budget is cut for one model."""

    page_bytes: int  # 0 for a model without attention
    slot_bytes: int  # states, convolution windows and room for one hidden row
    unit_bytes: int
    span: int  # units in a slab
    num_units: int
    large: Kind  # the kind that takes a whole slab
    entries: tuple[Kind, ...]  # where each of the model's layers keeps what it caches

    @classmethod
    def of(cls, spec: CacheSpec, budget_bytes: int) -> "Geometry":
        """Raises ConfigError for a budget that cannot hold one slot and one page."""
        page_bytes = align64(spec.page_bytes)
        slot_bytes = spec.slot_bytes + align64(spec.hidden_size * spec.hidden_dtype.itemsize)
        unit_bytes = min(page_bytes or slot_bytes, slot_bytes)
        span = -(-max(page_bytes, slot_bytes) // unit_bytes)
        num_units, need = budget_bytes // unit_bytes, span + (page_bytes > 0)
        if num_units < need:
            need_bytes = need * unit_bytes
            raise ConfigError(f"a cache budget of {budget_bytes} bytes holds no sequence, needs at least {need_bytes}")
        large = Kind.SLOT if slot_bytes > page_bytes else Kind.PAGE
        entries = tuple(Kind.PAGE if isinstance(layer, AttentionSpec) else Kind.SLOT for layer in spec.layers)
        return cls(page_bytes, slot_bytes, unit_bytes, span, num_units, large, entries)

    def units(self, kind: Kind) -> int:
        """Units that one item of a kind takes."""
        if kind is Kind.PAGE and not self.page_bytes:
            return 0
        return self.span if kind is self.large else 1

    def stride_bytes(self, kind: Kind) -> int:
        """Bytes from one item of a kind to the next, and the bytes it takes from the budget."""
        return self.units(kind) * self.unit_bytes

    def count(self, kind: Kind) -> int:
        """Highest number of items of one kind."""
        units = self.units(kind)
        return self.num_units // units if units else max(MIN_FREE_PAGES, 64 * self.num_units)

    def first_page(self, num_slots: int) -> int:
        """The first page behind so many slots."""
        unit = self.units(Kind.PAGE)
        return -(-num_slots * self.units(Kind.SLOT) // unit) if unit else 0

    def fits(self, num_pages: int, num_slots: int) -> bool:
        """Whether these numbers of items fit into the whole budget."""
        units = num_pages * self.units(Kind.PAGE) + num_slots * self.units(Kind.SLOT)
        return units <= self.num_units and num_pages <= self.count(Kind.PAGE) and num_slots <= self.count(Kind.SLOT)
