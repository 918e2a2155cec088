"""Keys of what requests begin with."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_cache.api.ray.chain import MOST_KEYS, Chain, chain_of

SECRET = b"secret"
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is in box 1?"},
]


def keys(body: object, whose: str = "", secret: bytes = SECRET) -> tuple[int, ...]:
    return chain_of(body, whose, secret).keys


def test_a_conversation_that_goes_on_begins_with_the_keys_it_had() -> None:
    longer = keys({"messages": TALK})
    assert len(set(longer)) == 4
    for length in (1, 2, 3):
        assert keys({"messages": TALK[:length]}) == longer[:length]


@pytest.mark.parametrize("place", range(4))
def test_another_message_changes_its_key_and_all_that_follow(place: int) -> None:
    other = [dict(message) for message in TALK]
    other[place]["content"] += " "
    before, after = keys({"messages": TALK}), keys({"messages": other})
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < place for i in range(4)]


@pytest.mark.parametrize(
    ("body", "whose", "secret"),
    [
        ({"messages": TALK}, "another tenant", SECRET),
        ({"messages": TALK}, "", b"other"),
        ({"messages": TALK, "model": "another"}, "", SECRET),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "", SECRET),
    ],
)
def test_what_prompts_depend_on_beside_messages_changes_all_keys(body: object, whose: str, secret: bytes) -> None:
    assert not set(keys({"messages": TALK})) & set(keys(body, whose, secret))


def test_forms_that_mean_the_same_have_the_same_keys() -> None:
    parts = [{**TALK[1], "content": [{"type": "text", "text": "Hello!", "cache_control": {"type": "ephemeral"}}]}]
    assert keys({"messages": parts}) == keys({"messages": TALK[1:2]})


def test_instructions_beside_messages_are_the_first_one() -> None:
    chat = keys({"messages": TALK})
    assert keys({"system": "You are brief.", "messages": TALK[1:]}) == chat
    assert keys({"instructions": "You are brief.", "input": TALK[1:]}) == chat
    assert keys({"input": "Hello!"}) == keys({"messages": TALK[1:2]})


def test_a_billing_header_that_changes_does_not_count() -> None:
    def system(number: int) -> object:
        return {
            "system": [{"type": "text", "text": f"x-anthropic-billing-header: {number}\nBe brief."}],
            "messages": TALK,
        }

    assert keys(system(1)) == keys(system(2))


def test_what_follows_the_instructions_is_a_conversation_of_its_own() -> None:
    assert chain_of({"messages": TALK}, "", SECRET).own == 1
    assert chain_of({"messages": TALK[1:]}, "", SECRET).own == 0


@pytest.mark.parametrize("prompt", ["a" * 1000, list(range(250)), [list(range(250)), [1]]])
def test_texts_and_tokens_have_a_key_for_each_piece(prompt: Any) -> None:
    chain = chain_of({"prompt": prompt}, "", SECRET)
    assert len(chain.keys) == 4
    assert chain.size == (1000 if isinstance(prompt, str) else 250)
    assert chain.own == 2


def test_sizes_grow_with_the_messages() -> None:
    chain = chain_of({"messages": TALK}, "", SECRET)
    assert list(chain.sizes) == sorted(set(chain.sizes))
    assert all(0 <= key < 1 << 48 for key in chain.keys)


def test_keys_are_bounded() -> None:
    assert len(keys({"messages": TALK * 1000})) == MOST_KEYS
    assert len(keys({"prompt": "a" * 1_000_000})) == MOST_KEYS


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELDS = ("messages", "input", "system", "instructions", "prompt", "tools", "model")


@given(st.dictionaries(st.sampled_from(FIELDS), anything) | anything)
def test_a_body_that_nobody_has_checked_does_no_harm(body: object) -> None:
    chain = chain_of(body, "", SECRET)
    assert isinstance(chain, Chain)
    assert len(chain.keys) == len(chain.sizes)
