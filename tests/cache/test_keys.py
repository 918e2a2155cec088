"""Names of prefixes: what they follow, that they are the same everywhere, and that they are made once."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hybrid_cache.cache import keys
from hybrid_cache.cache.keys import NAME_BYTES, Name, keys_of, message_name, named_keys, root_name
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray
from tests.cache.driver import SPECS, begin, fill, forward, new_cache, tokens_of

NAMES = """
import numpy as np
from hybrid_cache.cache.keys import keys_of, message_name
known = keys_of("model/tenant", np.arange(150, dtype=np.int32))
print(*(name.hex() for name in (*known.names, known.end_name, message_name("model/tenant", "key"))))
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Name]:
    """All names that are computed from now on."""
    names, digest = list[Name](), keys._digest
    monkeypatch.setattr(keys, "_digest", lambda *args: names.append(digest(*args)) or names[-1])
    return names


def names(namespace: str, tokens: TokenArray) -> list[Name]:
    """Of the empty prefix, all full pages and the end."""
    known = keys_of(namespace, tokens)
    return [*known.names, known.end_name]


def test_names_are_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", NAMES],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert {tuple(line.split()) for line in printed} == {
        (
            "982fa5bb305623def0cc7cd1cd28fbb5",
            "273e59bfead4ba2a3cb66428f2b9e067",
            "1b38d66b88a88ccf76b1f413e730e84e",
            "535bae0835c4e8965952fc5ab641319c",
            "33b36c05d2712a8cba50d3992a1d3606",
        )
    }


def test_a_name_follows_the_page_and_all_that_comes_before_it() -> None:
    known, other = keys_of("", tokens_of("abc")), keys_of("", tokens_of("xbc"))
    assert known.names[0] == other.names[0] == root_name("")
    assert not set(known.names[1:]) & set(other.names[1:])
    assert known.names[:3] == keys_of("", tokens_of("abx")).names[:3]
    assert known.names[3] != keys_of("", tokens_of("abx")).names[3]


def test_no_two_namespaces_have_a_name_in_common() -> None:
    spaces = ["", "model/", "model/tenant", "model/other", "other/tenant", "\ud800"]
    found = [name for space in spaces for name in (*names(space, tokens_of("ab", 3)), message_name(space, "key"))]
    assert len(set(found)) == len(found) == 5 * len(spaces)
    assert {len(name) for name in found} == {NAME_BYTES}


def test_names_of_different_kinds_are_not_equal() -> None:
    """Though they are made of the same bytes."""
    page = tokens_of("a")
    whole, root = keys_of("", page), root_name("")
    longer = keys.Keys("", [], page.tobytes(), TILE)
    assert len({whole.names[1], whole.end_name, longer.end_name, root, message_name("", page.tobytes().decode())}) == 5
    assert root_name((root + b"key").decode("utf-8", "surrogateescape")) != message_name("", "key")


def test_the_end_of_a_prompt_follows_the_tokens_after_its_last_page() -> None:
    ends = [keys_of("", tokens_of("ab", tail)).end_name for tail in range(4)]
    assert len({*ends, *keys_of("", tokens_of("ab")).names}) == 4 + 3


def test_pages_without_tokens_bear_the_names_that_they_are_given() -> None:
    given = [bytes([i] * NAME_BYTES) for i in (1, 2)]
    known = named_keys("n", given, b"", 2 * TILE)
    assert known.names == [root_name("n"), *given]
    known.learn([root_name("n")])
    assert known.names[1:] == given


def test_a_beginning_has_the_pages_of_the_prompt_and_no_end() -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=20)
    tokens = tokens_of("ab", 3)
    fill(cache, tokens, TILE, 2 * TILE, end=True)
    fill(cache, tokens_of("ab"), end=True)
    known = keys_of("", tokens)
    for num_tokens, length in ((0, 0), (TILE - 1, 0), (TILE, TILE), (2 * TILE, 2 * TILE), (2 * TILE + 3, 2 * TILE)):
        match = cache.match("", known.beginning(num_tokens))
        assert (match.length, match.end) == (length, None)
    assert cache.match("", known).length == len(tokens)


def test_the_nodes_of_a_tree_bear_the_names_of_their_prefixes() -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=20)
    fill(cache, tokens_of("abc", 3), 2 * TILE, end=True)
    fill(cache, tokens_of("abd", 5), 3 * TILE, end=True)
    fill(cache, tokens_of("ab"), namespace="n")
    expected = {("", 0): root_name(""), ("n", 0): root_name("n")}
    for space, tokens in (("", tokens_of("abc")), ("", tokens_of("abd")), ("n", tokens_of("ab"))):
        found = keys_of(space, tokens).names
        nodes = cache.tree.walk(space, keys_of(space, tokens).pages)
        assert [node.name for node in nodes] == found[1:]
    assert {(n.namespace, n.num_tokens): n.name for n in cache.tree.nodes() if n.parent is None} == expected
    ends = {end.name for node in cache.tree.nodes() for end in node.ends.values()}
    assert ends == {keys_of("", tokens).end_name for tokens in (tokens_of("abc", 3), tokens_of("abd", 5))}


def test_looking_for_a_prompt_takes_no_name(made: list[Name]) -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=20)
    fill(cache, tokens_of("abc"), 3 * TILE)
    made.clear()
    assert cache.match("", tokens_of("abcd")).length == 3 * TILE
    assert made == []


def test_names_of_pages_in_the_tree_are_not_computed_again(made: list[Name]) -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=20)
    fill(cache, tokens_of("abc"), 3 * TILE)
    made.clear()
    run = begin(cache, tokens_of("abcde", 3))
    cache.propose(run.lease)
    cache.reserve_checkpoint(run.lease, 5 * TILE, CheckpointKind.MESSAGE_END)
    forward(cache, run, 5 * TILE)
    cache.publish(run.lease, 5 * TILE)
    new = list(made)
    assert new == keys_of("", tokens_of("abcde")).names[4:]


def test_keys_of_another_namespace_are_refused() -> None:
    cache = new_cache(SPECS["slot of four pages"], slots=8, pages=20)
    with pytest.raises(AssertionError):
        cache.match("x", keys_of("y", np.zeros(3, np.int32)))
