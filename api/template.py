"""Chat templates: jinja in a sandbox, with the functions that Hugging Face templates expect."""

import datetime
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybrid_cache.errors import ModelError, RequestError

MAX_RENDERED = 16 * 2**20  # characters; a template loops over what a client sent

# What a request may not set by way of chat_template_kwargs.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class Clock:
    """The time of one request: however often its messages are rendered, they show the same time."""

    def __init__(self) -> None:
        self._now = datetime.datetime.now()
        self.printed: set[str] = set()  # what templates have shown of it

    def strftime(self, form: str) -> str:
        text = self._now.strftime(form)
        self.printed.add(text)
        return text


class ChatTemplate:
    """A compiled template. It sees data only: no attribute that could reach the interpreter, no file, no network."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError for a template that does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as e:
            raise ModelError(f"the chat template does not compile: {e}") from e
        self._special_tokens = dict(special_tokens)
        self.source = source
        self.name = blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self.takes_argument_text = self._shows_argument_text()

    def render(self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object], clock: Clock) -> str:
        """The text of a conversation. Raises RequestError for what the template refuses, and for too much text."""
        context = {**self._special_tokens, **variables, "messages": messages, "strftime_now": clock.strftime}
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(context):
                length += len(part)
                if length > MAX_RENDERED:
                    raise RequestError(f"the rendered messages have more than {MAX_RENDERED} characters")
                parts.append(part)
        except RequestError:
            raise
        except Exception as e:  # whatever a template can raise, it raises because of these messages
            raise RequestError(f"the chat template cannot render these messages: {e}", param="messages") from e
        return "".join(parts)

    def _shows_argument_text(self) -> bool:
        """Whether the arguments of a tool call may be JSON text; many templates want the object and quote a string."""
        probe = '{"probe":[1]}'  # an object would be written with spaces
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": probe}}
        messages: list[dict[str, object]] = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        try:
            return probe in self.render(messages, {"tools": None, "add_generation_prompt": False}, Clock())
        except RequestError:
            return False


class _GenerationBlock(Extension):
    """`{% generation %}` marks what training should learn from; serving only needs its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
