"""The second tier's books: what is copied, what goes from there first, and where it is found again."""

import pytest

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.claims import Claim
from hybrid_cache.cache.commands import Command, Load, Store
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.host import ROOMY, HostTier
from hybrid_cache.cache.keys import Keys, keys_of
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Node
from hybrid_cache.kernels.grid import TILE
from tests.cache.driver import COST, SPECS, tokens_of

HYBRID = SPECS["slot of four pages"]


class Tier:
    """A second tier with room for so many states and pages, and what it had copied."""

    def __init__(self, slots: int, pages: int) -> None:
        geometry = Geometry.of(HYBRID, 1 << 24)
        budget = slots * geometry.stride_bytes(Kind.SLOT) + pages * geometry.stride_bytes(Kind.PAGE)
        self.sent: list[Command] = []
        self.host = HostTier(Geometry.of(HYBRID, budget), budget, self.sent.append, stateless=False)

    def keep(self, text: str, *, claimed: bool = True, namespace: str = "") -> Keys:
        """The state and the pages of a text leave the device -> its keys."""
        keys, nodes = nodes_of(text, namespace)
        state = Checkpoint(nodes[-1], ord(text[-1]), CheckpointKind.MESSAGE_END)
        self.host.keep_state(state, claimed=claimed)
        for node in reversed(nodes):
            self.host.keep_page(node)
        self.host.check()
        return keys

    def resumes_at(self, keys: Keys) -> int:
        """In pages, with none on the device."""
        return self.host.resumes_at(keys, 0, 0, len(keys.pages))

    def load(self, keys: Keys, first: int, end: int) -> None:
        self.host.hold(keys, first, end)
        self.host.load(keys, first, end, range(100 + first, 100 + end), 77)
        self.host.check()


def nodes_of(text: str, namespace: str = "") -> tuple[Keys, list[Node]]:
    """The keys of a text and a node for each of its letters, which is one page; its number is that of the letter."""
    keys, nodes = keys_of(namespace, tokens_of(text)), list[Node]()
    above = Node(namespace, None, b"", 0, 0, 0.0)
    for n, letter in enumerate(text):
        above = Node(namespace, above, keys.pages[n], (n + 1) * TILE, ord(letter), 0.0, keys.names[n + 1])
        nodes.append(above)
    return keys, nodes


def test_what_left_is_found_by_its_name_and_resumed_from_its_last_state() -> None:
    tier = Tier(4, 12)
    tier.keep("ab")
    keys = tier.keep("abcd")
    assert tier.resumes_at(keys) == 4
    assert tier.resumes_at(keys_of("", tokens_of("abcx"))) == 2
    assert tier.resumes_at(keys_of("", tokens_of("x"))) == 0
    assert tier.host.resumes_at(keys, 1, 1, 3) == 2
    assert tier.host.resumes_at(keys, 3, 3, 3) == 3, "the device has as much"


def test_what_comes_back_is_loaded_from_where_it_was_stored() -> None:
    tier = Tier(4, 12)
    tier.keep("xyz")
    keys = tier.keep("abcd")
    stored = {(c.kind, c.item): c.host for c in tier.sent if isinstance(c, Store)}
    tier.sent.clear()
    tier.load(keys, 1, 4)
    pages = [Load(Kind.PAGE, stored[Kind.PAGE, ord(letter)], 101 + n) for n, letter in enumerate("bcd")]
    assert tier.sent == [*pages, Load(Kind.SLOT, stored[Kind.SLOT, ord("d")], 77)]
    assert tier.host.num_loaded == 3


def test_a_full_tier_makes_room_only_for_what_is_counted_on() -> None:
    tier = Tier(2, 2)
    first, second = tier.keep("a"), tier.keep("b")
    third = tier.keep("c", claimed=False)
    assert [tier.resumes_at(keys) for keys in (first, second, third)] == [1, 1, 0]
    third = tier.keep("c")
    assert [tier.resumes_at(keys) for keys in (first, second, third)] == [0, 1, 1]


def test_a_tier_with_room_takes_what_nobody_counts_on_until_a_part_of_it_is_left() -> None:
    tier = Tier(64, 0)
    kept = [tier.resumes_at(tier.keep(chr(100 + number), claimed=False)) for number in range(64)]
    assert kept[0] == 1
    assert kept[-1] == 0
    assert tier.host.num_dropped == 0
    assert 0 < tier.host.budget_bytes - tier.host.used_bytes <= tier.host.budget_bytes // ROOMY


def test_pages_are_copied_only_where_a_state_behind_them_was() -> None:
    tier = Tier(4, 12)
    _, nodes = nodes_of("abc")
    tier.host.keep_page(nodes[2])
    assert len(tier.host) == 0
    tier.host.keep_state(Checkpoint(nodes[1], 5, CheckpointKind.MESSAGE_END), claimed=True)
    for node in nodes:
        tier.host.keep_page(node)
    assert [c.item for c in tier.sent if isinstance(c, Store) and c.kind is Kind.PAGE] == [ord("a"), ord("b")]


def test_what_is_about_to_come_back_stays_while_others_are_copied() -> None:
    tier = Tier(2, 4)
    keys = tier.keep("abc")
    tier.host.hold(keys, 0, 3)
    for letter in "xyz":
        _, (node,) = nodes_of(letter)
        tier.host.keep_state(Checkpoint(node, ord(letter), CheckpointKind.MESSAGE_END), claimed=True)
        tier.host.keep_page(node)
    assert tier.resumes_at(keys) == 3
    tier.host.load(keys, 0, 3, range(3), 7)
    tier.host.check()
    for text in ("rs", "tuv", "wxy"):
        tier.keep(text)
    assert tier.resumes_at(keys) == 0, "it may go again"


def test_of_one_prefix_the_last_pages_go_first() -> None:
    tier = Tier(3, 4)
    keys = tier.keep("abcd")
    tier.load(keys, 0, 4)
    for n in range(4, 0, -1):
        assert {(Kind.PAGE, name) in tier.host._items for name in keys.names[1 : n + 1]} == {True}
        tier.host._drop_oldest()
        assert (Kind.PAGE, keys.names[n]) not in tier.host._items


def test_what_leaves_again_is_not_copied_again_but_counts_as_used() -> None:
    tier = Tier(2, 4)
    first, second = tier.keep("a"), tier.keep("b")
    num_stored = tier.host.num_stored
    tier.keep("a")
    assert tier.host.num_stored == num_stored
    tier.keep("c")
    assert [tier.resumes_at(keys) for keys in (first, second)] == [1, 0]


def test_dropping_one_namespace_leaves_the_others() -> None:
    tier = Tier(4, 12)
    first, second = tier.keep("ab", namespace="a"), tier.keep("abc", namespace="b")
    used_bytes = tier.host.used_bytes
    freed = tier.host.drop("a")
    assert tier.host.used_bytes == used_bytes - freed > 0
    assert [tier.resumes_at(keys) for keys in (first, second)] == [0, 3]
    tier.host.drop(None)
    assert tier.host.used_bytes == len(tier.host) == 0
    tier.host.check()


@pytest.mark.parametrize("claimed", [False, True])
def test_what_has_to_leave_the_device_goes_to_a_full_tier_if_it_is_counted_on(claimed: bool) -> None:
    geometry = Geometry.of(HYBRID, 1 << 24)
    host_bytes = geometry.stride_bytes(Kind.SLOT) + geometry.stride_bytes(Kind.PAGE)
    books = Books(HYBRID, COST, 1 << 20, LRU(), host_bytes=host_bytes)
    for letter in "ab":
        tokens = tokens_of(letter, 1)
        lease = books.acquire(books.match("", tokens), tokens)
        assert lease is not None
        assert books.reserve_checkpoint(lease, TILE, CheckpointKind.MESSAGE_END) is not None
        books.publish(lease, TILE)
        books.release(lease)
        (node,) = lease.nodes
        assert node.checkpoint is not None
        if claimed:
            books.claims.place(Claim(), node, TILE)
        books.pool.evict(node.checkpoint)
        books.pool.evict_page(node)
        books.check()
    assert [books.match("", tokens_of(letter, 1)).length for letter in "ab"] == ([0, TILE] if claimed else [TILE, 0])


def test_a_match_of_a_beginning_stays_one_where_nothing_may_come_from_the_second_tier() -> None:
    """A private lease takes nothing from there, and no more of its prompt than was asked for from the device."""
    books = Books(HYBRID, COST, 1 << 20, LRU(), host_bytes=1 << 20)
    tokens = tokens_of("abcd", 1)
    lease = books.acquire(books.match("", tokens), tokens)
    assert lease is not None
    for position in (TILE, 2 * TILE, 4 * TILE):
        assert books.reserve_checkpoint(lease, position, CheckpointKind.MESSAGE_END) is not None
    books.publish(lease, 4 * TILE)
    books.release(lease)
    state = lease.nodes[1].checkpoint
    assert state is not None
    books.pool.evict(state)
    match = books.match("", keys_of("", tokens).beginning(2 * TILE + 5))
    assert (match.length, match.hosted) == (2 * TILE, True)
    private = books.acquire(match, tokens, publish=False)
    assert private is not None
    assert private.length == TILE
    books.release(private)
    books.check()
