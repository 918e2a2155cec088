"""Chat templates: jinja in a sandbox, with the functions that Hugging Face templates expect."""

import datetime
import json
import time
from collections.abc import Mapping, Sequence, Sized
from hashlib import blake2b
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hybrid_cache.errors import ModelError, RequestError

MAX_RENDERED = 16 * 2**20  # characters; a template loops over what a client sent
MAX_SECONDS = 5.0  # of processor time for one rendering
MAX_BITS = 4096  # of a whole number
DEADLINE = "#deadline"  # no name that a template could write

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
        environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _GenerationBlock])
        environment.filters["tojson"] = _to_json
        environment.filters |= {"hc_look": _look, "hc_joined": _joined}
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError) as e:  # the last two: nested too deeply
            raise ModelError(f"the chat template does not compile: {e}") from e
        self._special_tokens = dict(special_tokens)
        self.source = source
        self.name = blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self.takes_argument_text = self._shows_argument_text()

    def render(self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object], clock: Clock) -> str:
        """The text of a conversation. Raises RequestError for what the template refuses, for too much text or work."""
        context = {**self._special_tokens, **variables, "messages": messages, "strftime_now": clock.strftime}
        context[DEADLINE] = time.thread_time() + MAX_SECONDS
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


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox that bounds loops, recursion and the size of values."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        watched: nodes.Template = _Watching().visit(source)
        return super()._generate(watched, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * right)
        elif operator == "*":
            values, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(values, Sized):
                _check_size(len(values) * times)
            elif isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


class _Watching(NodeTransformer):
    """Checks the clock in each iteration of a loop and each call of a macro, and the size of what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        watched = self._watch(node)
        if node.test is not None:  # a loop that skips all has no iteration
            node.test = nodes.And(_look_at_clock(True, node.lineno), node.test, lineno=node.lineno)
        return watched

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._watch(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._watch(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "hc_joined", [], [], None, None, lineno=node.lineno)

    def _watch(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_look_at_clock(None, node.lineno), lineno=node.lineno))
        return node


def _look_at_clock(value: object, lineno: int) -> nodes.Filter:
    return nodes.Filter(nodes.Const(value), "hc_look", [], [], None, None, lineno=lineno)


@pass_context
def _look(context: Context, value: object) -> object:
    if time.thread_time() > context.resolve(DEADLINE):
        raise RequestError(f"the chat template takes more than {MAX_SECONDS:g} s for these messages", param="messages")
    return value


def _joined(value: Sized) -> Sized:
    _check_size(len(value))
    return value


def _check_size(size: int) -> None:
    if size > MAX_RENDERED:
        raise TemplateError(f"a value of size {size}, at most {MAX_RENDERED}")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateError(f"a number of {bits} bits, at most {MAX_BITS}")


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
