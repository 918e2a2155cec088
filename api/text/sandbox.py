"""What a chat template may do, and how much of it: jinja in a sandbox, with an allowance for each rendering.

It sees data only: no attribute that could reach the interpreter, no file, no network. Loops and macros look at a clock
of processor time. Filters and methods are those of a list, whose time and memory go with the sizes of what they get
and give, and values are bounded in size when they are made, with all that is in them.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from string import Formatter
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from hybrid_cache.api.text.marks import LOOP, MARKS

MAX_RENDERED = 16 * 2**20  # characters; a template loops over what a client sent
MAX_ITEMS = 1 << 18  # of a list, with what is in them
MAX_MADE = 8 * MAX_RENDERED  # characters and items of all values that one rendering makes
MAX_SECONDS = 5.0  # of processor time for one rendering
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 64  # of what a format pads or indents to

ALLOWANCE = "#allowance"  # no name that a template could write

FILTERS = frozenset(
    re.findall(
        r"\w+",
        """abs attr batch capitalize count d default dictsort e escape first float format groupby indent int items join
        last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
        sum title tojson trim unique upper wordcount""",
    )
)
METHODS = frozenset(
    re.findall(
        r"\w+",
        """capitalize casefold count endswith find format get index isalnum isalpha isascii isdigit islower isnumeric
        isspace isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
        rsplit rstrip split splitlines startswith strip swapcase title upper values""",
    )
)
TOO_LARGE = MAX_RENDERED + 1
_FORMAT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?")


class TooMuch(TemplateError):
    """A template takes more than it may."""


class Allowance:
    """How much one rendering may still do."""

    def __init__(self, messages: Sequence[object], look: Callable[[], None]) -> None:
        """look: called now and then; raises to end the rendering"""
        self._deadline = time.thread_time() + MAX_SECONDS
        self._left = MAX_MADE
        self._look = look
        self._index = {id(message): i for i, message in enumerate(messages)}
        self.loops: list[int | None] = []  # for each mark of a loop the message that it begins with, None at an end

    def look(self) -> None:
        """Raises TooMuch when the time is used up."""
        self._look()
        if time.thread_time() > self._deadline:
            raise TooMuch(f"it takes more than {MAX_SECONDS:g} s")

    def make(self, size: int) -> None:
        """A value of this size is made. Raises TooMuch if it is too large, or one too many."""
        self._left -= size
        if size > MAX_RENDERED:
            raise TooMuch(f"a value of size {size}, at most {MAX_RENDERED}")
        if self._left < 0:
            raise TooMuch(f"values of more than {MAX_MADE} characters in all")
        if size > 1 << 16:
            self.look()

    def at(self, value: object) -> str:
        """A mark where an iteration begins with a message."""
        index = self._index.get(id(value))
        if index is None:
            return ""
        self.loops.append(index)
        return LOOP

    def after(self) -> str:
        """A mark at the end of a loop."""
        self.loops.append(None)
        return LOOP


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs templates."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _GenerationBlock])
        kept = {name: _counted(filter_) for name, filter_ in self.filters.items() if name in FILTERS}
        kept |= {"tojson": _counted(to_json), "replace": _replace, "join": _join, "indent": _indent, "format": _format}
        self.filters = kept | {"hc_look": _look, "hc_made": _made, "hc_at": _at, "hc_after": _after}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals["raise_exception"] = _raise

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        watched: nodes.Template = _Watching().visit(source)
        return super()._generate(watched, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        allowance = _allowance(context)
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * right)
        elif operator == "%":
            if isinstance(left, str):
                _check_format(left)
                allowance.make(_size(left) + _size(right))
        elif operator == "*":
            values, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(values, Sized):
                size = _size(values) * max(times, 0)
                allowance.make(size if isinstance(values, str) else _size_of_items(size))
            elif isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, Sized) and isinstance(right, Sized):
            allowance.make(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of methods are counted, and those that could make much of little are bounded or refused."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str | bytes | Mapping | list | tuple | int | float):
            name = function.__name__
            if name not in METHODS:
                raise TemplateError(f"the method {name!r} is not available to templates")
            _check_call(_allowance(context), owner, name, args)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, dict | Namespace):
            _allowance(context).make(_size(result))
        return result


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's filter of this name; marks stay what they are."""
    if isinstance(indent, int):
        _check_width(indent)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


_NOT_ASCII = re.compile(f"[^\x00-\x7f{MARKS}]")


class _Watching(NodeTransformer):
    """Has the clock looked at in each iteration of a loop and each call of a macro, what `~` joins counted, and marks
    where loops over messages begin and end, if what they write comes out as it is.
    """

    def __init__(self) -> None:
        self._held = 0  # blocks around, whose text is a value first
        self._loops = 0

    def visit_For(self, node: nodes.For) -> nodes.Node | list[nodes.Node]:
        self._loops += 1
        watched = self._watch(node)
        self._loops -= 1
        if not self._held and isinstance(node.target, nodes.Name):
            value = nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body.insert(1, _written(_filter(value, "hc_at"), node.lineno))
        if node.test is not None:  # a loop that skips all has no iteration
            node.test = nodes.And(_filter(nodes.Const(True), "hc_look"), node.test, lineno=node.lineno)
        if self._held or self._loops:
            return watched
        return [watched, _written(_filter(nodes.Const(None), "hc_after"), node.lineno)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self._holding(node, self.generic_visit)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        return self._holding(node, self.generic_visit)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._count(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._count(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._count(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._count(node) if node.ctx == "load" else node

    def _count(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "hc_made")

    def _holding(self, node: Any, visit: Callable[[Any], nodes.Node]) -> nodes.Node:
        self._held += 1
        visited = visit(node)
        self._held -= 1
        return visited

    def _watch(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), "hc_look"), lineno=node.lineno))
        return node


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _written(value: nodes.Expr, lineno: int) -> nodes.Output:
    return nodes.Output([value], lineno=lineno)


def _allowance(context: Context) -> Allowance:
    allowance = context.resolve(ALLOWANCE)
    assert isinstance(allowance, Allowance)
    return allowance


@pass_context
def _look(context: Context, value: object) -> object:
    _allowance(context).look()
    return value


@pass_context
def _at(context: Context, value: object) -> str:
    return _allowance(context).at(value)


@pass_context
def _after(context: Context, value: object) -> str:
    return _allowance(context).after()


@pass_context
def _made(context: Context, value: object) -> object:
    _allowance(context).make(_size(value))
    return value


def _counted(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, whose argument and result are counted."""
    passes = getattr(filter_, "jinja_pass_arg", None)
    passed = {"context": 0, "eval_context": 1, "environment": 2}.get(getattr(passes, "name", ""))

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        allowance = _allowance(context)
        allowance.make(_size(value))
        first = () if passed is None else ((context, context.eval_ctx, context.environment)[passed],)
        result = filter_(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            return _watched(allowance, result)
        allowance.make(_size(result))
        return result

    return counted


def _watched(allowance: Allowance, items: Iterator[Any]) -> Iterator[Any]:
    """The same items, of which none is made before it is wanted."""
    for number, item in enumerate(items):
        if number % 256 == 0:
            allowance.look()
        if number > MAX_ITEMS:
            raise TooMuch(f"more than {MAX_ITEMS} items")
        yield item


@pass_context
def _replace(context: Context, value: object, old: object, new: object, count: int | None = None) -> str:
    text = str(value)
    _check_call(_allowance(context), text, "replace", (str(old), str(new)))
    return text.replace(str(old), str(new), -1 if count is None else count)


@pass_context
def _join(context: Context, value: Any, d: object = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = context.environment.filters["map"](context, value, attribute=attribute)
    texts = [str(item) for item in value]
    _check_call(_allowance(context), str(d), "join", (texts,))
    return str(d).join(texts)


@pass_context
def _indent(context: Context, value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, indent = str(value), width if isinstance(width, str) else " " * _check_width(width)
    _allowance(context).make(len(text) + len(indent) * (text.count("\n") + 1))
    lines = [line if blank is False and not line else indent + line for line in text.split("\n")]
    return "\n".join(lines) if first else "\n".join(lines)[len(indent) if lines[0] else 0 :]


@pass_context
def _format(context: Context, value: object, *args: object, **kwargs: object) -> str:
    _check_format(str(value))
    _allowance(context).make(len(str(value)) + _size(args) + _size(list(kwargs.values())))
    return str(value) % (kwargs or args)


def _check_call(allowance: Allowance, owner: Any, name: str, args: Sequence[Any]) -> None:
    """Counts what a method makes."""
    size = _size(owner)
    if name == "replace" and len(args) > 1:
        old, new = args[0], args[1]
        times = (owner.count(old) if old else len(owner) + 1) if isinstance(old, str) else 0
        size += times * max(0, _size(new) - _size(old))
    elif name == "join" and args and isinstance(args[0], Sequence):
        size = _size(args[0]) + size * len(args[0])
    elif name == "format":
        for _, _, spec, _ in Formatter().parse(owner):
            for width in re.findall(r"\d+|{", spec or ""):
                _check_width(_width(width))
        size += _size(args)
    allowance.make(size)


def _size(value: object) -> int:
    """Characters and items in a value and in all that it holds, as often as it holds them. Those of too many items
    are not counted, but too large.
    """
    if isinstance(value, str):
        return len(value)
    size, num_items, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        num_items += 1
        if num_items + len(stack) > MAX_ITEMS:
            return TOO_LARGE
        if isinstance(item, Namespace):
            item = getattr(item, "_Namespace__attrs")  # noqa: B009
        size += len(item) if isinstance(item, str | Collection) else 1
        if isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            stack += item[: MAX_ITEMS + 1]
    return size


def _size_of_items(num_items: int) -> int:
    return num_items if num_items <= MAX_ITEMS else TOO_LARGE


def _check_format(form: str) -> None:
    for found in _FORMAT.finditer(form):
        for width in filter(None, found.groups()):
            _check_width(_width(width))


def _width(text: str) -> int:
    """One that is filled in later may be anything."""
    return int(text) if text.isdigit() and len(text) < 10 else MAX_WIDTH + 1


def _check_width(width: int) -> int:
    if width > MAX_WIDTH:
        raise TooMuch(f"a width of {width}, at most {MAX_WIDTH}")
    return width


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooMuch(f"a number of {bits} bits, at most {MAX_BITS}")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what training should learn from; serving only needs its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)
