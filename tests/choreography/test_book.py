"""The message book keeps what fits a number of bytes, and never mixes namespaces up."""

import tracemalloc
from itertools import count

import numpy as np
import pytest

from hybrid_cache.choreography.arrangement import message_id
from hybrid_cache.choreography.book import MESSAGE_BYTES, SHARE, MessageBook
from hybrid_cache.errors import MessageGone, UnknownMessage
from hybrid_cache.tokens import TokenArray

KIB, MIB = 1 << 10, 1 << 20


def tokens(first: int, length: int = 10) -> TokenArray:
    return np.arange(first, first + length, dtype=np.int32)


def filled(book: MessageBook, text_bytes: int, num_messages: int) -> list[str]:
    """The ids of messages with a text each, and as many bytes sent."""
    return [
        book.add("n", "user", tokens(i), text="x" * text_bytes, sent="y", sent_bytes=text_bytes).id
        for i in range(num_messages)
    ]


def test_bytes_are_those_of_tokens_text_and_what_was_sent() -> None:
    book = MessageBook()
    book.add("n", "user", tokens(0, 1000), text="x" * 5000, sent_bytes=300)
    assert 4000 + 5000 + 300 + MESSAGE_BYTES <= book.num_bytes <= 4000 + 5000 + 300 + MESSAGE_BYTES + 100
    before = book.num_bytes
    book.add("n", "user", tokens(0, 1000), text="x" * 5000, sent_bytes=300)
    assert (len(book), book.num_bytes) == (1, before)


def test_the_bound_holds_whatever_comes_and_what_is_used_stays() -> None:
    book = MessageBook(MIB)
    [kept] = filled(book, 10 * KIB, 1)
    for i in count(1):
        book.add("n", "user", tokens(i), text="x" * 9 * KIB)
        assert book.num_bytes <= MIB
        assert book.find("n", kept).id == kept
        if i > 3 * MIB // (9 * KIB):
            break
    assert book.num_bytes > MIB // 2


def test_what_was_dropped_is_gone_and_not_unknown() -> None:
    book = MessageBook(MIB)
    ids = filled(book, 10 * KIB, 200)
    with pytest.raises(MessageGone, match=ids[0]):
        book.find("n", ids[0])
    assert book.find("n", ids[-1]).id == ids[-1]
    with pytest.raises(UnknownMessage):
        book.find("another", ids[-1])
    with pytest.raises(UnknownMessage):
        book.find("another", ids[0])


def test_a_message_that_is_too_large_is_gone_at_once_and_costs_no_other() -> None:
    book = MessageBook(MIB)
    small = filled(book, KIB, 3)
    large = book.add("n", "user", tokens(9), sent_bytes=MIB // SHARE)
    with pytest.raises(MessageGone, match=large.id):
        book.find("n", large.id)
    assert [book.find("n", name).id for name in small] == small


def test_the_names_of_forgotten_messages_are_bounded_as_well() -> None:
    book = MessageBook(64 * KIB)
    ids = filled(book, KIB, 1000)
    assert book.num_bytes <= 64 * KIB
    with pytest.raises(UnknownMessage):
        book.find("n", ids[0])


@pytest.mark.parametrize("length", [1, 1000])
def test_the_memory_taken_is_what_is_counted(length: int) -> None:
    book = MessageBook(4 * MIB)
    parents = tuple(book.add("n", "user", tokens(-1 - i)).id for i in range(20))
    tracemalloc.start()
    for i in range(20_000):
        book.add(f"namespace {i} {'s' * 200}", "user", tokens(i, length), parents[: i % 20], text="x" * (i % 300))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert book.num_bytes > 3 * MIB
    assert taken < 1.05 * book.most_bytes


def test_no_two_namespaces_and_contexts_have_one_id() -> None:
    parts = [("a", ("x", "y")), ("a\0x", ("y",)), ("a\0x\0y", ()), ("a", ("x\0y",)), ("ax", ("y",)), ("a", ("xy",))]
    ids = {message_id(namespace, tokens(0), context) for namespace, context in parts}
    assert len(ids) == len(parts)
    cut = tokens(0).tobytes()[:4].decode()
    assert message_id("a", tokens(0), (cut,)) != message_id("a", tokens(1, 9), (cut,))
