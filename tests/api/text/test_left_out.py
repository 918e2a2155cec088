"""Whatever a template does with the order of roles, no message of a user, of the system or of a tool is lost."""

import itertools
from pathlib import Path

import pytest

from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart, tool_call
from hybrid_cache.api.text.template import ChatTemplate
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import RequestError
from tests.api.servers import write_text_model

FILES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
LOOP = "{% for m in messages %}{{ '[' + m.role + ']' + (m.content or '') }}{% endfor %}"
LAST_SYSTEM = (  # as some families have it: of several system messages the last one is kept
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}{% endif %}{% endfor %}{{ ns.s }}"
    "{% for m in messages %}{% if m.role != 'system' %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
)
OWN = {
    "only the first of a system": "{% for m in messages %}{% if loop.first or m.role != 'system' %}"
    "{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}",
    "the last of a system": "{% set ns = namespace(s='') %}" + LAST_SYSTEM,
    "no system": "{% for m in messages %}{% if m.role != 'system' %}{{ '[' + m.role + ']' + m.content }}{% endif %}"
    "{% endfor %}",
    "what is said in JSON": LOOP.replace("(m.content or '')", "(m.content | tojson)"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextModel.load(folder)


def encoder(model: TextModel, source: str) -> ChatEncoder:
    return ChatEncoder(model.tokenizer, {"default": ChatTemplate(source, model.tokenizer.named_tokens)})


def said(role: str, text: str) -> TemplateMessage:
    return TemplateMessage(role, (TextPart(text),))


@pytest.mark.parametrize("source", [*map(Path.read_text, FILES), *OWN.values()], ids=[*(f.stem for f in FILES), *OWN])
def test_each_message_is_in_the_prompt_once_in_any_order_of_roles(model: TextModel, source: str) -> None:
    chat = encoder(model, source)
    for roles in itertools.chain(*(itertools.product(("system", "user", "assistant"), repeat=n) for n in (1, 2, 3))):
        messages = [said(role, f"<{number}>") for number, role in enumerate(roles)]
        made = chat.rearranged(messages, Rendering(), 10_000)
        text = chat.render(made.talk.messages, Rendering())
        assert [text.count(f"<{number}>") for number in range(len(roles))] == [1] * len(roles), roles


@pytest.mark.parametrize("late", ["Be brief.", "Hi", "user"])
def test_what_stands_elsewhere_by_chance_is_not_taken_for_what_the_system_says(model: TextModel, late: str) -> None:
    messages = [said("system", "Be brief."), said("user", "Hi"), said("system", late), said("user", "Hi there")]
    made = encoder(model, OWN["only the first of a system"]).rearranged(messages, Rendering(), 10_000)
    assert made.rearranged == ("system-first",)


def test_what_no_order_shows_is_refused(model: TextModel) -> None:
    source = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}"
    call = TemplateMessage("assistant", (TextPart(""),), {"tool_calls": [tool_call("a", "f", {})]})
    with pytest.raises(RequestError, match="leaves out what a message with role 'tool' says"):
        encoder(model, source).rearranged([said("user", "Hi"), call, said("tool", "4")], Rendering(), 10_000)


def test_a_message_that_is_empty_is_not_missed(model: TextModel) -> None:
    source = "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}"
    made = encoder(model, source).rearranged([said("system", " "), said("user", "Hi")], Rendering(), 10_000)
    assert made.rearranged == ()


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        (LOOP, ("tools", "messages.name", "messages.tool_calls")),
        (LOOP + "{{ tools }}", ("messages.name", "messages.tool_calls")),
        (LOOP.replace("m.role", "(m.name or m.role)") + "{{ tools }}{{ messages[1].tool_calls }}", ()),
    ],
)
def test_what_a_template_does_not_know_is_named(model: TextModel, source: str, unread: tuple[str, ...]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = TemplateMessage("assistant", (TextPart(""),), {"tool_calls": [tool_call("a", "f", {})]})
    messages = [TemplateMessage("user", (TextPart("Hi"),), {"name": "Bo"}), call, said("tool", "4")]
    assert encoder(model, source).conversation(messages, Rendering(tools=tools), 10_000).unread == unread
