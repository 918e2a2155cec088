"""Keys of sequences that another model takes over: alike up to there, and nowhere else."""

import numpy as np
import pytest

from hybrid_cache.cache.keys import KEY_BYTES, Keys, Mark, common, goes_on_from, keys_of, tokens_in
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray
from tests.fakes import tokens_of

PLACES = (0, 1, 63, 64, 65, 100, 128, 149)
TOKENS = tokens_of(0, 150)


def marked(position: int, namespace: str = "a/", tokens: TokenArray = TOKENS) -> Keys:
    return keys_of("base/", tokens, Mark(position, namespace))


@pytest.mark.parametrize("position", PLACES)
def test_pages_before_the_mark_are_anybodys_and_those_from_there_on_are_not(position: int) -> None:
    plain, keys, other = keys_of("base/", TOKENS), marked(position), marked(position, "b/")
    shared = position // TILE
    assert len({plain.end_name, keys.end_name, other.end_name, marked((position + 1) % 150).end_name}) == 4
    assert plain.names[: shared + 1] == keys.names[: shared + 1]
    for one, two in ((plain, keys), (keys, other)):
        assert not {*one.names[shared + 1 :]} & {*two.names}
    assert marked(position).end_name == keys.end_name
    assert b"".join(map(tokens_in, (*keys.pages, keys.tail))) == np.ascontiguousarray(TOKENS, "<i4").tobytes()


@pytest.mark.parametrize("position", PLACES)
def test_the_stem_is_the_prompt_that_ends_at_the_mark(position: int) -> None:
    keys, expected = marked(position), keys_of("base/", TOKENS[:position])
    stem = keys.stem
    if not position:
        assert stem is None
        return
    assert stem is not None
    assert (stem.pages, stem.tail, stem.num_tokens) == (expected.pages, expected.tail, position)
    assert (stem.names, stem.end_name) == (expected.names, expected.end_name)
    assert keys.ending_at(position) is stem
    assert keys.ending_at(len(TOKENS)) is keys
    assert [keys.namespace_of(i) for i in range(3)] == ["base/" if i < position // TILE else "a/" for i in range(3)]


def test_a_beginning_before_the_mark_has_none() -> None:
    assert marked(100).beginning(100).mark is None
    assert marked(100).beginning(130).mark == Mark(100, "a/")
    assert marked(100).beginning(130).stem is not None


def key(text: str, at: int | None = None, namespace: str = "a/") -> bytes:
    """Of the letters as tokens."""
    tokens = np.array([ord(letter) for letter in text], np.int32)
    return keys_of("base/", tokens, None if at is None else Mark(at, namespace)).tail


@pytest.mark.parametrize(
    ("one", "other", "num_tokens"),
    [
        (key("abcd"), key("abxd"), 2),
        (key("abcd"), key("abcd"), 4),
        (key("abcd"), key("abcd", 3), 3),
        (key("abcd", 1), key("abcd", 3), 1),
        (key("abcd", 1), key("abcd", 1), 4),
        (key("abcd", 1), key("abcx", 1), 3),
        (key("abcd", 1), key("abcd", 1, "b/"), 1),
        (key("abcd", 0), key("abcd"), 0),
        (key("abcd", 1), key("xbcd", 1), 0),
        (key("abcd", 2), key("ab"), 2),
        (key(""), key("ab", 1), 0),
    ],
)
def test_what_two_keys_have_in_common_ends_where_their_models_differ(one: bytes, other: bytes, num_tokens: int) -> None:
    assert common(one, other) == common(other, one) == 4 * num_tokens


def test_what_goes_on_from_a_tail_has_the_same_models_up_to_its_end() -> None:
    page = key("abcd", 2)
    assert goes_on_from(page, key("ab"))
    assert goes_on_from(page, key("abc", 2))
    assert goes_on_from(page, key(""))
    assert not goes_on_from(page, key("abc"))
    assert not goes_on_from(page, key("abc", 1))
    assert not goes_on_from(key("abcd"), key("abc", 2))
    assert len(marked(3).pages[0]) > KEY_BYTES == len(tokens_in(marked(3).pages[0]))
