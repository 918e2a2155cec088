"""What choreography keeps: encoded messages outside the tree, and items that it borrows.

A message holds KV rows of its tokens and what they do to recurrent states, in items of the same budget.
"""

from collections.abc import Iterable, Sequence

from hybrid_cache.cache.commands import Item, Restore
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.keys import message_name
from hybrid_cache.cache.policies.base import Worth
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import CheckpointKind, Node, StoredMessage
from hybrid_cache.spec import PrefillCost


class MessageStore:
    """Messages by key, and loans. No room is never an error: methods return None."""

    def __init__(self, pool: Pool, cost: PrefillCost, effect_bytes: int) -> None:
        """effect_bytes: size of what the tokens of a message do to all states"""
        self._pool = pool
        self._cost = cost
        self.effect_bytes = effect_bytes
        self._num_extra = -(-effect_bytes // pool.item_bytes[pool.extra_kind])
        self.stored: dict[str, StoredMessage] = {}
        self.loans: set[tuple[Kind, int]] = set()  # items that are lent, each to one user
        self.unwritten: set[StoredMessage] = set()

    def get(self, key: str) -> StoredMessage | None:
        """What is stored under a key."""
        return self.stored.get(key)

    def lend_extra(self, namespace: str, key: str, start: int, end: int) -> list[int] | None:
        """Items for what the tokens [start, end) do to the states, while they are being computed.

        They end in `reserve` or `return_extra`. None where the policy would give no room to such a message.
        """
        num_extra, kind = self._num_extra, self._pool.extra_kind
        score = self._score(namespace, key, start, end)
        slots, pages = (num_extra, 0) if kind is Kind.SLOT else (0, num_extra)
        taken = None if score is None else self._pool.take(num_slots=slots, num_pages=pages, ceiling=score)
        if taken is None:
            self._pool.declines["message"] += 1
            return None
        items = taken[0] + taken[1]
        self.loans.update((kind, item) for item in items)
        return items

    def return_extra(self, items: Sequence[int]) -> None:
        for item in items:
            self._return(self._pool.extra_kind, item)

    def reserve(
        self, namespace: str, key: str, start: int, end: int, position: int, extra: Sequence[int]
    ) -> StoredMessage | None:
        """Room for rows and states of the tokens [start, end) of a sequence, to be written.

        extra: lent items with what they do to the states, which become the message's
        None when the key is taken, or the policy would have to evict something better; `extra` is lent as before.
        """
        if key in self.stored:
            return None
        num_pages, score = self._num_pages(start, end), self._score(namespace, key, start, end)
        taken = None if score is None else self._pool.take(num_slots=1, num_pages=num_pages, ceiling=score)
        if taken is None:
            self._pool.declines["message"] += 1
            return None
        slots, pages = taken
        self.loans.difference_update((self._pool.extra_kind, item) for item in extra)
        root = Node(namespace, None, b"", 0, -1, 0.0)
        stored = StoredMessage(
            root, message_name(namespace, key), key, start, end, position, slots[0], pages, list(extra), self.stored
        )
        self.unwritten.add(stored)
        return stored

    def _num_pages(self, start: int, end: int) -> int:
        return -(-(end - start) // self._pool.tree.page_tokens) if self._pool.geometry.page_bytes else 0

    def _score(self, namespace: str, key: str, start: int, end: int) -> float | None:
        """The score that a message with these tokens would have."""
        items = (
            self._pool.bytes_of(1, self._num_pages(start, end))
            + self._num_extra * self._pool.item_bytes[self._pool.extra_kind]
        )
        worth = Worth(self._cost.flops(start, end), items)
        return self._pool.policy.candidate(CheckpointKind.EXPLICIT, message_name(namespace, key), worth)

    def pieces(self, extra: Sequence[int]) -> tuple[tuple[Kind, int, int], ...]:
        """Items with what tokens do to the states, each with the bytes that are of use in it."""
        kind, size = self._pool.extra_kind, self._pool.item_bytes[self._pool.extra_kind]
        left = (self.effect_bytes - start for start in range(0, self.effect_bytes, size))
        return tuple((kind, item, min(num_bytes, size)) for item, num_bytes in zip(extra, left, strict=True))

    def restore(
        self, namespace: str, key: str, start: int, end: int, position: int, ticket: int, entry: int
    ) -> StoredMessage | None:
        """Publishes a message that was read from a disk, see `cache.disk`. None as `reserve`."""
        extra = None if key in self.stored else self.lend_extra(namespace, key, start, end)
        if extra is None:
            return None
        stored = self.reserve(namespace, key, start, end, position, extra)
        if stored is None:
            self.return_extra(extra)
            return None
        geometry, offset = self._pool.geometry, 0
        items = [(Kind.SLOT, stored.slot, geometry.slot_bytes)]
        items += [(Kind.PAGE, page, geometry.page_bytes) for page in stored.pages]
        for kind, item, num_bytes in (*items, *self.pieces(extra)):
            self._pool.emit(Restore(kind, item, ticket, entry, offset, num_bytes))
            offset += num_bytes
        self.publish(stored)
        return stored

    def publish(self, message: StoredMessage) -> None:
        """From now on it can be found: everything of it has been written."""
        self.unwritten.remove(message)
        self.stored[message.key] = message
        self._pool.publish(message, [])

    def forget(self, items: Iterable[Item]) -> None:
        """Drops the messages that own some of these items, which could not be written. None of them may be held."""
        pool = self._pool
        owners = (pool.page_owner.get(item) if kind is Kind.PAGE else pool.slot_owner.get(item) for kind, item in items)
        for message in {owner for owner in owners if isinstance(owner, StoredMessage)}:
            assert not message.holders
            pool.evict(message)

    def hold(self, stored: StoredMessage) -> None:
        """Keeps a message where it is until `let_go`."""
        self._pool.verify(self._pool.items(stored))
        if not stored.holders:
            self._pool.guard(stored)
        stored.holders += 1

    def let_go(self, stored: StoredMessage, *, used: bool) -> None:
        """Ends one `hold`; used: whether it was, for the policy."""
        stored.holders -= 1
        if used:
            self._pool.verify(self._pool.items(stored))
            self._pool.stamp(stored, [])
        if not stored.holders:
            self._pool.unguard(stored)

    def lend_slot(self) -> int | None:
        """A slot until `return_slot`; None when there is no room."""
        taken = self._pool.take(num_slots=1, num_pages=0)
        if taken is None:
            return None
        self.loans.add((Kind.SLOT, taken[0][0]))
        return taken[0][0]

    def return_slot(self, slot: int) -> None:
        self._return(Kind.SLOT, slot)

    def _return(self, kind: Kind, item: int) -> None:
        self.loans.remove((kind, item))
        self._pool.give(kind, item)

    def copy_slot(self, source: int, target: int) -> None:
        self._pool.copy(Kind.SLOT, source, target)
