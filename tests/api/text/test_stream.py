"""Tokens to text: the same characters however the tokens fall, nothing shown that is taken back later."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_cache.api.server.responses import event
from hybrid_cache.api.text.stream import ChoiceText, Detokenizer, StopMatcher, make_stopper
from hybrid_cache.api.text.tokenizer import TextModel, Tokenizer
from hybrid_cache.request import FinishReason, TokenOutput
from tests.api.small_text import CONTROL, NUM_TOKENS, small_text


@pytest.fixture(scope="module")
def text() -> TextModel:
    return small_text()


def said(tokenizer: Tokenizer, ids: list[int], stops: list[str], *, include: bool = False) -> list[str]:
    """Pieces of text as a client gets them, when the engine stops where the stopper says."""

    def detokenizer() -> Detokenizer:
        return Detokenizer(tokenizer, [], tokenizer.special_ids)

    stopper = make_stopper(detokenizer, stops)()
    choice = ChoiceText(detokenizer(), stops, (), (), include_stop=include)
    pieces = []
    for i, token in enumerate(ids):
        finish = FinishReason.STOP if stopper(token) else FinishReason.LENGTH if i == len(ids) - 1 else None
        pieces.append(choice.push(TokenOutput(0, token, None, finish)).text)
        if finish is FinishReason.STOP:
            break
    return pieces


@settings(deadline=None)
@given(st.text(max_size=40).filter(lambda content: not any(mark in content for mark in CONTROL)))
@example("<tool_call>")
def test_text_comes_back_whole_whatever_the_tokens(text: TextModel, content: str) -> None:
    tokenizer = text.tokenizer
    assert "".join(said(tokenizer, tokenizer.encode(content), [])) == content


@settings(deadline=None)
@given(
    st.text(alphabet="abé😀 ", max_size=30), st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=4), min_size=1)
)
def test_text_is_cut_at_the_first_stop_string_to_be_complete(text: TextModel, content: str, stops: list[str]) -> None:
    tokenizer = text.tokenizer
    pieces = said(tokenizer, tokenizer.encode(content), stops)
    ends = [(content.find(s) + len(s), content.find(s)) for s in stops if s in content]
    shown = "".join(pieces)
    if not ends:
        assert shown == content
        return
    # A token may complete several stop strings; the one that begins first counts.
    first_end = min(ends)[0]
    assert content.startswith(shown)
    assert len(shown) <= first_end
    assert not any(s in shown for s in stops)


def test_a_character_that_spans_tokens_is_held_back_until_it_is_whole(text: TextModel) -> None:
    tokenizer = text.tokenizer
    assert said(tokenizer, tokenizer.encode("😀"), []) == ["", "", "", "😀"]


def test_bytes_that_never_become_a_character_are_replaced_and_do_not_hold_up_the_rest(text: TextModel) -> None:
    tokenizer = text.tokenizer
    broken = tokenizer.encode("😀")[:1]
    pieces = said(tokenizer, broken * 9, [])
    assert "".join(pieces) == "\ufffd" * 9
    assert any(pieces[:-1])


def test_an_unfinished_character_at_the_end_is_shown_as_replaced(text: TextModel) -> None:
    tokenizer = text.tokenizer
    assert "".join(said(tokenizer, tokenizer.encode("a😀")[:-1], [])) == "a\ufffd"


def test_text_that_may_begin_a_stop_string_is_held_back(text: TextModel) -> None:
    tokenizer = text.tokenizer
    ids = [tokenizer.encode(c)[0] for c in "xEOx"]
    assert said(tokenizer, ids, ["EOS"]) == ["x", "", "", "EOx"]


@pytest.mark.parametrize(("include", "shown"), [(False, "x"), (True, "xEOS")])
def test_a_stop_string_over_several_tokens_is_cut_off_unless_asked_for(
    text: TextModel, include: bool, shown: str
) -> None:
    ids = [text.tokenizer.encode(c)[0] for c in "xEOSy"]
    assert "".join(said(text.tokenizer, ids, ["EOS"], include=include)) == shown


def test_a_stop_string_inside_a_token_cuts_the_token(text: TextModel) -> None:
    assert "".join(said(text.tokenizer, text.tokenizer.encode("hello"), ["ll"])) == "he"


def test_a_match_that_was_let_pass_is_not_found_again() -> None:
    matcher = StopMatcher(["ab", "bcdefg"])
    assert matcher.push("xab") is not None
    assert matcher.push("c") is None
    found = matcher.push("ab")
    assert found is not None
    assert (found.start, found.stop) == (4, "ab")


def test_a_named_stop_token_is_reported_and_an_end_token_is_not(text: TextModel) -> None:
    tokenizer = text.tokenizer
    a = tokenizer.encode("a")[0]
    for named, reported in (((a,), a), ((), None)):
        choice = ChoiceText(Detokenizer(tokenizer, [], ()), [], (a,), named, include_stop=False)
        piece = choice.push(TokenOutput(0, a, None, FinishReason.STOP))
        assert (piece.text, piece.stop) == ("", reported)


@settings(deadline=None)
@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=40))
def test_any_tokens_can_be_shown(text: TextModel, ids: list[int]) -> None:
    tokenizer = text.tokenizer
    whole = "".join(said(tokenizer, ids, [])) if ids else ""
    shown = [i for i in ids if i not in tokenizer.special_ids]
    if "\ufffd" not in whole:
        assert whole == tokenizer.decode(shown)


def test_offsets_grow_by_the_text(text: TextModel) -> None:
    tokenizer = text.tokenizer
    choice = ChoiceText(Detokenizer(tokenizer, [], ()), [], (), (), include_stop=False)
    pieces = [choice.push(TokenOutput(0, i, None, None)) for i in tokenizer.encode("hello é!")]
    for piece, following in pairwise(pieces):
        assert following.offset == piece.offset + len(piece.text)


def test_an_event_is_one_line_of_json() -> None:
    assert event({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()
