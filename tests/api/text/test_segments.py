"""Messages to prompts: the tokens of a message do not depend on what follows it."""

from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.api.text import rendered_ends
from hybrid_cache.api.text.boundaries import limited, prompt_of_tokens
from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.template import ChatTemplate
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt
from tests.api.small_text import TEMPLATE, small_text

ROOM = 100_000
OPENING = "{% if add_generation_prompt %}assistant:{% endif %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + OPENING
TRIMS = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
BY_NUMBER = (
    "{% for i in range(messages | length) %}{{ messages[i].role }}: {{ messages[i].content }}\n{% endfor %}" + OPENING
)
JOINS = (
    "{% for m in messages %}{{ m.role }}:he{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:he{% endif %}"
)
FORGETS = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
USER_LAST = "{% if messages[-1].role != 'user' %}{{ raise_exception('user must be last') }}{% endif %}" + PLAIN
CLOSED = Rendering(add_generation_prompt=False)


@pytest.fixture(scope="module")
def text() -> TextModel:
    return small_text()


def encoder_for(text: TextModel, template: str) -> ChatEncoder:
    return ChatEncoder(text.tokenizer, {"default": ChatTemplate(template, text.tokenizer.named_tokens)})


def said(*contents: str) -> list[TemplateMessage]:
    return [TemplateMessage("assistant" if i % 2 else "user", (TextPart(c),)) for i, c in enumerate(contents)]


def ends(prompt: Prompt) -> list[int]:
    return [b.position for b in prompt.boundaries]


words = st.text(alphabet="helo w\n😀:<|im_end|>", max_size=12)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, TRIMS, BY_NUMBER], ids=["chatml", "plain", "trims", "by-number"])
@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.lists(words, max_size=4))
def test_messages_that_follow_do_not_change_the_tokens_before(
    text: TextModel, template: str, contents: list[str], more: list[str]
) -> None:
    encoder = encoder_for(text, template)
    short = encoder.encode(said(*contents), CLOSED, ROOM)
    long = encoder.encode(said(*contents, *more), Rendering(), ROOM)
    assert long.tokens[: len(short.tokens)].tolist() == short.tokens.tolist()
    assert ends(long)[: len(contents)] == ends(short)
    assert ends(short)[-1] == len(short.tokens)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, BY_NUMBER, JOINS], ids=["chatml", "plain", "by-number", "joins"])
@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=5).filter(lambda c: len(c) % 2 == 1), words, st.lists(words, max_size=2))
def test_the_opening_of_an_answer_keeps_its_tokens_when_the_answer_is_a_message(
    text: TextModel, template: str, contents: list[str], answer: str, more: list[str]
) -> None:
    encoder = encoder_for(text, template)
    asked = encoder.encode(said(*contents), Rendering(), ROOM)
    later = encoder.encode(said(*contents, answer, *more), Rendering(), ROOM)
    assert later.tokens[: len(asked.tokens)].tolist() == asked.tokens.tolist()


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, max_size=3))
@settings(max_examples=25, deadline=None)
def test_the_embedded_model_has_stable_messages(contents: list[str], more: list[str]) -> None:
    text = embedded()
    encoder = ChatEncoder(text.tokenizer, text.chat_templates)
    short = encoder.encode(said(*contents), CLOSED, ROOM)
    long = encoder.encode(said(*contents, *more), Rendering(), ROOM)
    assert long.tokens[: len(short.tokens)].tolist() == short.tokens.tolist()


_EMBEDDED: list[TextModel] = []


def embedded() -> TextModel:
    if not _EMBEDDED:
        _EMBEDDED.append(TextModel.load(embedded_path()))
    return _EMBEDDED[0]


def test_each_message_end_is_a_boundary_and_text_is_what_the_template_says(text: TextModel) -> None:
    encoder = encoder_for(text, TEMPLATE)
    prompt = encoder.encode(said("hello", "w", "hello"), Rendering(), ROOM)
    rendered = encoder.render(said("hello", "w", "hello"), Rendering())
    assert text.tokenizer.decode(prompt.tokens.tolist()) == rendered
    parts = np.split(prompt.tokens, ends(prompt))
    assert [text.tokenizer.decode(p.tolist()) for p in parts] == [
        "<|im_start|>user\nhello<|im_end|>\n",
        "<|im_start|>assistant\nw<|im_end|>\n",
        "<|im_start|>user\nhello<|im_end|>\n",
        "<|im_start|>assistant\n",
    ]


def test_a_prompt_says_where_each_message_ends(text: TextModel) -> None:
    """Messages whose end the template does not show end together."""
    messages = said("hello", "he", "lo")
    prompt = encoder_for(text, PLAIN).encode(messages, Rendering(), ROOM)
    lines = ["user: hello\n", "assistant: he\n", "user: lo\n"]
    starts = (0, *prompt.ends)
    decoded = [text.tokenizer.decode(prompt.tokens[a:b].tolist()) for a, b in pairwise(starts)]
    assert decoded == lines
    forgets = encoder_for(text, FORGETS).encode(messages, Rendering(), ROOM)
    assert set(forgets.ends) == {len(forgets.tokens)}
    assert prompt_of_tokens([1, 2], text.tokenizer).ends == ()


def test_boundaries_say_whose_message_ends_there(text: TextModel) -> None:
    prompt = encoder_for(text, TEMPLATE).encode(said("hello", "w", "hello"), Rendering(), ROOM)
    assert [b.role for b in prompt.boundaries] == ["user", "assistant", "user"]


def test_remembered_ends_give_the_same_prompt(text: TextModel) -> None:
    contents = ["hello"] * 7
    fresh = encoder_for(text, TEMPLATE).encode(said(*contents), Rendering(), ROOM)
    encoder = encoder_for(text, TEMPLATE)
    for n in range(1, 8):
        grown = encoder.encode(said(*contents[:n]), Rendering(), ROOM)
    assert grown.tokens.tolist() == fresh.tokens.tolist()
    assert grown.boundaries == fresh.boundaries


def test_a_message_that_the_template_changes_later_is_no_boundary(text: TextModel) -> None:
    prompt = encoder_for(text, FORGETS).encode(said("hello", "w", "hello"), Rendering(), ROOM)
    assert ends(prompt) == [len(prompt.tokens)]


def test_prefixes_that_the_template_refuses_have_ends_all_the_same(text: TextModel) -> None:
    prompt = encoder_for(text, USER_LAST).encode(said("hello", "w", "hello"), Rendering(), ROOM)
    assert (
        prompt.boundaries == encoder_for(text, PLAIN).encode(said("hello", "w", "hello"), Rendering(), ROOM).boundaries
    )


def test_what_the_template_refuses_is_the_clients_fault(text: TextModel) -> None:
    with pytest.raises(RequestError, match="user must be last"):
        encoder_for(text, USER_LAST).encode(said("hello", "w"), Rendering(), ROOM)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, TRIMS], ids=["chatml", "plain", "trims"])
@pytest.mark.parametrize("last", [False, True], ids=["inside", "at-the-end"])
def test_a_marked_part_ends_in_an_explicit_boundary(text: TextModel, template: str, last: bool) -> None:
    parts = (TextPart("hello w  ", marked=True, ttl_s=60.0), *(() if last else (TextPart("more"),)))
    messages = [*said("first"), TemplateMessage("user", parts), *said("then")]
    prompt = encoder_for(text, template).encode(messages, Rendering(default_ttl_s=9.0), ROOM)
    (mark,) = [b for b in prompt.boundaries if b.kind is BoundaryKind.EXPLICIT]
    before = text.tokenizer.decode(prompt.tokens[: mark.position].tolist())
    assert before.endswith("hello w" if last and template == TRIMS else "hello w  ")
    assert mark.ttl_s == 60.0


def test_a_mark_without_a_lifetime_takes_the_requests(text: TextModel) -> None:
    messages = [TemplateMessage("user", (TextPart("hello", marked=True),))]
    prompt = encoder_for(text, TEMPLATE).encode(messages, Rendering(default_ttl_s=1800.0), ROOM)
    assert [b.ttl_s for b in prompt.boundaries if b.kind is BoundaryKind.EXPLICIT] == [1800.0]


def test_parts_are_split_whether_marked_or_not(text: TextModel) -> None:
    encoder = encoder_for(text, TEMPLATE)

    def tokens(marked: bool) -> list[int]:
        parts = (TextPart("hel", marked=marked), TextPart("lo"))
        return cast("list[int]", encoder.encode([TemplateMessage("user", parts)], Rendering(), ROOM).tokens.tolist())

    assert tokens(True) == tokens(False)


def test_a_noncharacter_in_the_text_is_no_mark(text: TextModel) -> None:
    messages = [TemplateMessage("user", (TextPart("\ufdd0hello", marked=True), TextPart("\ufdd1")))]
    prompt = encoder_for(text, TEMPLATE).encode(messages, Rendering(), ROOM)
    (mark,) = [b for b in prompt.boundaries if b.kind is BoundaryKind.EXPLICIT]
    assert text.tokenizer.decode(prompt.tokens[: mark.position].tolist()).endswith("\ufdd0hello")


def test_continuing_the_last_message_leaves_it_open(text: TextModel) -> None:
    rendering = Rendering(add_generation_prompt=False, continue_final_message=True)
    prompt = encoder_for(text, TEMPLATE).encode(said("hello", "wo"), rendering, ROOM)
    assert text.tokenizer.decode(prompt.tokens.tolist()).endswith("assistant\nwo")
    assert len(prompt.boundaries) == 1


def test_too_many_tokens_are_refused_with_both_numbers(text: TextModel) -> None:
    encoder = encoder_for(text, PLAIN)
    length = len(encoder.encode(said("hello" * 50), Rendering(), ROOM).tokens)
    with pytest.raises(ContextTooLong, match=rf"{length} tokens.* 20\b"):
        encoder.encode(said("hello" * 50), Rendering(), 20)


def test_long_conversations_are_split_sparsely_where_each_end_takes_a_rendering(
    text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendered_ends, "DENSE_MESSAGES", 4)
    monkeypatch.setattr(rendered_ends, "SPARSE", 3)
    encoder = encoder_for(text, BY_NUMBER)
    prompt = encoder.encode(said(*["hello"] * 11), Rendering(), ROOM)
    assert len(prompt.boundaries) == 6  # after 1 2 3 4, 6, 9
    longer = encoder.encode(said(*["hello"] * 12), Rendering(), ROOM)
    assert longer.boundaries[:6] == prompt.boundaries


def test_at_most_64_boundaries_are_kept_marked_ones_first() -> None:
    plain = [Boundary(100 * i) for i in range(1, 200)]
    marked = [Boundary(100 * i + 50, BoundaryKind.EXPLICIT) for i in range(1, 11)]
    prompt = Prompt(np.zeros(0, np.int32), tuple(sorted([*plain, *marked], key=lambda b: b.position)))
    kept = limited(prompt).boundaries
    assert len(kept) == 64
    assert [b for b in kept if b.kind is BoundaryKind.EXPLICIT] == marked
    assert kept[0] == plain[0]
    assert kept[-1] == plain[-1]


def test_raw_tokens_have_boundaries_after_runs_of_special_tokens_but_bos(text: TextModel) -> None:
    tokens = text.tokenizer.encode("<|bos|>hello<|im_end|><|im_start|>w<|im_end|>")
    assert ends(prompt_of_tokens(tokens, text.tokenizer)) == [4, 6]


def test_a_model_without_a_template_refuses_messages(text: TextModel) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        ChatEncoder(text.tokenizer, {}).encode(said("hello"), Rendering(), ROOM)


def test_an_opening_and_the_answer_after_it_are_tokenised_apart(text: TextModel) -> None:
    encoder = encoder_for(text, JOINS)
    asked = encoder.encode(said("w"), Rendering(), ROOM)
    later = encoder.encode(said("w", "llo", "w"), Rendering(), ROOM)
    assert later.tokens[: len(asked.tokens)].tolist() == asked.tokens.tolist()
