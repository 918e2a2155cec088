"""Whether two models read text alike: only where both see the same tokens can one use what the other has cached.

What is compared are contents, not files: the tokenizers' steps and vocabularies, the templates' texts, and the tokens
of a conversation of all roles with letters, digits, spaces and characters of several bytes.
"""

from dataclasses import dataclass

from hybrid_cache.api.text.template import ChatTemplate, Clock, Message
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import RequestError

PROBE: tuple[Message, ...] = (
    {"role": "system", "content": "You are brief.  Today is a day."},
    {"role": "user", "content": "Hello, 世界! 3 < 4, isn't it?\n\tdef f(x):\n\t\treturn x ** 2  # ²"},
    {"role": "assistant", "content": "Yes: 12345 < 67890."},
    {"role": "user", "content": "<b>And</b> e\u0301tudes?"},
)


@dataclass(frozen=True, slots=True)
class TextDifference:
    """In what a model differs from its base when it reads text.

    parts        "tokenizer", or what of it differs, and chat templates; empty for a model that reads as its base does
    same_tokens  whether text and conversations become the same tokens: only then can one use what the other has cached
    """

    parts: tuple[str, ...] = ()
    same_tokens: bool = True

    def __str__(self) -> str:
        if not self.parts:
            return "reads text as the model does"
        tokens = "the same" if self.same_tokens else "other"
        return f"differs from the model in its {' and '.join(self.parts)}; a conversation becomes {tokens} tokens"


SAME = TextDifference()


def difference_of(base: TextModel, other: TextModel) -> TextDifference:
    """In what another model reads text otherwise than a base."""
    parts = []
    same_steps = base.tokenizer.as_json() == other.tokenizer.as_json()
    if not same_steps:
        parts.append("tokenizer")
    if base.tokenizer.named_tokens != other.tokenizer.named_tokens:
        parts.append("special tokens")
    names = sorted({*base.chat_templates, *other.chat_templates})
    parts += [f"chat template {name!r}" for name in names if _source(base, name) != _source(other, name)]
    return TextDifference(tuple(parts), same_steps and _probed(base) == _probed(other))


def _source(text: TextModel, name: str) -> str | None:
    template = text.chat_templates.get(name)
    return None if template is None else template.source


def _probed(text: TextModel) -> list[tuple[str, list[int] | None]]:
    """Tokens of the probe by each template, and of its last text as a prompt. None for what a template refuses."""
    clock = Clock()
    plain = text.tokenizer.encode_prompt(str(PROBE[1]["content"]))
    return [("", plain), *((name, _tokens(text, each, clock)) for name, each in sorted(text.chat_templates.items()))]


def _tokens(text: TextModel, template: ChatTemplate, clock: Clock) -> list[int] | None:
    for probe in (PROBE, PROBE[1:]):  # some templates refuse a system message
        try:
            rendered = template.render(probe, {"tools": None, "add_generation_prompt": True}, clock)
        except RequestError:
            continue
        return text.tokenizer.encode_prompt(rendered.text)
    return None
