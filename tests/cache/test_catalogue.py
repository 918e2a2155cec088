"""What lies on the disk, by name: what is found there, and what goes with what it needs."""

from hybrid_cache.cache.disk.catalogue import Catalogue
from hybrid_cache.cache.disk.entries import Entry, EntryKind, Facts
from hybrid_cache.cache.geometry import Geometry
from hybrid_cache.cache.keys import Keys, keys_of
from hybrid_cache.kernels.grid import TILE
from tests.cache.driver import SPECS, tokens_of

GEOMETRY = Geometry.of(SPECS["slot of four pages"], 1 << 24)


def run(number: int, keys: Keys, first: int, end: int, above: int | None = None) -> Entry:
    """Pages [first, end) of a text."""
    names = b"".join(keys.names[first + 1 : end + 1])
    num_bytes = (end - first) * GEOMETRY.page_bytes
    return Entry(
        number, Facts("", EntryKind.PAGES, keys.names[end], "", "", first, end * TILE, names, num_bytes), above, b""
    )


def state(number: int, keys: Keys, end: int, above: int) -> Entry:
    facts = Facts("", EntryKind.STATE, keys.names[end], "", "turn_end", end, end * TILE, b"", GEOMETRY.slot_bytes)
    return Entry(number, facts, above, b"")


def test_the_deepest_state_is_found_with_the_pages_before_it_and_goes_with_them() -> None:
    catalogue, keys = Catalogue(TILE, GEOMETRY, stateless=False), keys_of("", tokens_of("abcdef", 5))
    catalogue.add([run(1, keys, 0, 3), state(2, keys, 3, 1), run(3, keys, 3, 5, 1), state(4, keys, 5, 3)])
    place = catalogue.find(keys, 0, 0)
    assert place is not None
    assert ([entry.id for entry in place.entries], place.num_tokens) == ([1, 3, 4], 5 * TILE)
    assert [entry.id for entry in catalogue.find(keys, 3, 3 * TILE).entries] == [3, 4]  # type: ignore[union-attr]
    assert catalogue.find(keys, 5, 5 * TILE) is None
    catalogue.remove([1])
    assert len(catalogue) == 0
    assert catalogue.named(EntryKind.STATE, keys.names[5]) is None
