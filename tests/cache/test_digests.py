"""The checking mode: a write to what was published is found, at its next use at the latest."""

from collections import deque

import pytest
import torch

from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.tree import StoredMessage
from hybrid_cache.config import VERIFY_VARIABLE, verify_by_default
from hybrid_cache.device.digests import Digests
from hybrid_cache.errors import PublishedBytesChanged
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from tests.cache.at_once import HybridCache
from tests.cache.driver import SPECS, begin, fill, forward, new_cache, tokens_of
from tests.cache.test_messages import items, store

HYBRID = SPECS["slot of four pages"]
A, B, C = ((Kind.PAGE, number) for number in range(3))


class Bytes:
    """What items hold, each a few bytes."""

    def __init__(self) -> None:
        self.of = {A: b"a", B: b"b", C: b"c"}
        self.digests = Digests(lambda kind, number: self.of[kind, number])
        self.digests.seal([A, B], "two pages")


def test_a_change_is_found_at_the_next_use() -> None:
    held = Bytes()
    held.digests.verify([A, B])
    held.of[B] = b"x"
    held.digests.verify([A])
    with pytest.raises(PublishedBytesChanged, match="page 1 was written to after it was published: two pages"):
        held.digests.verify([A, B])


def test_a_change_is_found_when_an_item_goes() -> None:
    held = Bytes()
    held.of[A] = b"x"
    with pytest.raises(PublishedBytesChanged):
        held.digests.unseal([A])


def test_a_change_is_found_when_an_item_is_moved() -> None:
    held = Bytes()
    held.of[C] = held.of[A]
    held.digests.moved(Kind.PAGE, [(0, 2)])
    held.digests.verify([B, C])
    held.of[A] = b"y"
    with pytest.raises(PublishedBytesChanged):
        held.digests.moved(Kind.PAGE, [(1, 0)])


def test_a_change_is_found_by_looking_around() -> None:
    held = Bytes()
    held.of[A] = b"x"
    with pytest.raises(PublishedBytesChanged):
        deque((held.digests.verify_some() for _ in range(100)), maxlen=0)


def test_what_has_gone_may_be_written_to() -> None:
    held = Bytes()
    held.digests.unseal([A])
    held.of[A] = b"x"
    held.digests.verify_some()
    held.digests.check({B})
    held.digests.seal([A], "another page")
    held.digests.check({A, B})


@pytest.mark.parametrize(("value", "verifies"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch, value: str | None, verifies: bool) -> None:
    monkeypatch.delenv(VERIFY_VARIABLE)
    if value is not None:
        monkeypatch.setenv(VERIFY_VARIABLE, value)
    assert verify_by_default() is verifies
    cache = new_cache(HYBRID, slots=2, pages=4)
    assert cache.pool.verifies is verifies


def spoil(cache: HybridCache, kind: Kind, item: int) -> None:
    """Changes one number of a page, or of a slot."""
    for layer in cache.tensors:
        if isinstance(layer, KVTensors) and kind is Kind.PAGE:
            layer.v[item, 60] += 1.0
        elif isinstance(layer, StateTensors) and kind is Kind.SLOT:
            layer.state[item, -1, -1] += 1.0


@pytest.mark.parametrize("what", ["page", "checkpoint", "end", "last page"])
def test_a_request_does_not_start_from_what_was_changed(what: str) -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("ab", 61), TILE, end=True)
    first, last = cache.match("", tokens_of("ab", 1)).path
    (end,) = last.ends.values()
    assert first.checkpoint is not None
    assert end.page is not None
    items = {
        "page": (Kind.PAGE, first.page),
        "checkpoint": (Kind.SLOT, first.checkpoint.slot),
        "end": (Kind.SLOT, end.slot),
        "last page": (Kind.PAGE, end.page),
    }
    spoil(cache, *items[what])
    with pytest.raises(PublishedBytesChanged):
        begin(cache, tokens_of("ab", 61 if what in ("end", "last page") else 1))


def test_a_page_that_is_taken_over_is_compared() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    slow, fast = begin(cache, tokens_of("abc", 1)), begin(cache, tokens_of("abc", 1))
    forward(cache, fast, len(fast.tokens))
    cache.publish(fast.lease, 3 * TILE)
    last = fast.lease.pages[2]
    spoil(cache, Kind.PAGE, last)
    cache.memory.digests.verify_some = lambda: None  # type: ignore[method-assign]
    cache.publish(slow.lease, 2 * TILE)
    with pytest.raises(PublishedBytesChanged, match=f"page {last} "):
        cache.publish(slow.lease, 3 * TILE)


def test_a_change_is_found_when_somebody_gives_pages_back() -> None:
    cache = new_cache(HYBRID, slots=8, pages=16)
    fill(cache, tokens_of("a", 1))
    (page,) = (node.page for node in cache.tree.nodes() if node.num_tokens == TILE)
    run = begin(cache, tokens_of("x", 1))
    spoil(cache, Kind.PAGE, page)
    with pytest.raises(PublishedBytesChanged):
        cache.release(run.lease)


@pytest.mark.parametrize("when", ["held", "let go"])
def test_a_message_is_compared_when_it_is_held_and_when_it_has_been_read(when: str) -> None:
    cache = items(12)
    stored = store(cache, "m")
    assert isinstance(stored, StoredMessage)
    if when == "let go":
        cache.messages.hold(stored)
    cache.memory.numbers[stored.extra[0], 99] += 1.0
    with pytest.raises(PublishedBytesChanged, match="message m"):
        cache.messages.hold(stored) if when == "held" else cache.messages.let_go(stored, used=True)


def test_every_byte_of_an_item_counts() -> None:
    cache = new_cache(HYBRID, slots=2, pages=4)
    for kind, tensor in ((Kind.PAGE, cache.tensors[1].v), (Kind.SLOT, cache.tensors[2].state)):
        before = cache.memory._arena.digest(kind, 0)
        tensor[0].view(torch.uint8).flatten()[-1] ^= 1
        assert cache.memory._arena.digest(kind, 0) != before
