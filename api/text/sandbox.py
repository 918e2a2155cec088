"""What a chat template may do, and how much of it: jinja in a sandbox, with an allowance for each rendering.

It sees data only: no attribute that could reach the interpreter, no file, no network. Loops, calls and comparisons look
at a clock of processor time. Filters and methods are those of a list, whose time and memory go with the sizes of what
they get and give, and values are bounded in size when they are made, with all that is in them.
"""

import itertools
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

from hybrid_cache.api.text.marks import LOOP, shown

MAX_RENDERED = 16 * 2**20  # characters; a template loops over what a client sent
MAX_ITEMS = 1 << 18  # of a list, with what is in them
MAX_DEPTH = 100  # of values in values
MAX_MADE = 8 * MAX_RENDERED  # characters and items of all values that one rendering makes
MAX_SECONDS = 5.0  # of processor time for one rendering
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 64  # of what a format pads or indents to
MAX_ARGUMENT = 4096  # characters of what is looked for, stripped, or names an attribute
TOO_LARGE = MAX_RENDERED + 1

ALLOWANCE = "#allowance"  # no name that a template could write

FILTERS = frozenset(
    re.findall(
        r"\w+",
        """abs attr batch capitalize count d default dictsort e escape first float format groupby indent int items join
        last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
        sum title tojson trim unique upper wordcount""",
    )
)
QUICK = frozenset(["abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "round"])
OF_TEXT = frozenset(
    re.findall(r"\w+", "capitalize e escape format indent lower replace safe string title tojson trim upper wordcount")
)
GROWING = frozenset(["d", "default", "format", "join", "replace"])  # what may have long arguments
METHODS = frozenset(
    re.findall(
        r"\w+",
        """capitalize casefold count endswith find format get index isalnum isalpha isascii isdecimal isdigit islower
        isnumeric isspace isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values""",
    )
)
_FORMAT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?([a-zA-Z%])?")


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
        extensions = [LoopControls, GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_written_out)
        own = {"tojson": to_json, "replace": _replace, "join": _join, "indent": _indent, "format": _format}
        filters = {**self.filters, **own, "string": _text_of}
        kept = {name: _counted(name, filter_) for name, filter_ in filters.items() if name in FILTERS}
        self.filters = {**kept, "hc_look": _look, "hc_made": _made, "hc_text": _text, "hc_at": _at, "hc_after": _after}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "joiner")}
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
                right = _for_format(left, right)
                allowance.make(len(left) + left.count("%") * _size(right))
        elif operator == "*":
            values, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(values, Sized):
                size = _size(values) * max(times, 0)
                allowance.make(size if isinstance(values, str) or size <= MAX_ITEMS else TOO_LARGE)
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
            args, kwargs = _for_method(_allowance(context), owner, name, args, kwargs)
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
    for width in (indent, *(separators or ())):
        _check_width(len(width) if isinstance(width, str) else width or 0)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[0], text) if ensure_ascii else text


_ESCAPED = re.compile(r"\\u(fd[de][0-9a-f])|\\.")  # what is reserved, or another escape, such as that of a backslash


class _Watching(NodeTransformer):
    """Has the clock looked at and values counted, and marks where loops over messages begin and end, if what they
    write comes out as it is.
    """

    def __init__(self) -> None:
        self._held = 0  # blocks around, whose text is a value first
        self._loops = 0

    def visit_For(self, node: nodes.For) -> nodes.Node | list[nodes.Node]:
        self._loops += 1
        watched = self._watch(node)
        self._loops -= 1
        if node.test is not None:  # a loop that skips all has no iteration
            node.test = nodes.And(_filter(nodes.Const(True), "hc_look"), node.test, lineno=node.lineno)
        if self._held or self._loops:
            return watched
        if isinstance(node.target, nodes.Name):
            value = nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body.insert(1, _written(_filter(value, "hc_at"), node.lineno))
        return [watched, _written(_filter(nodes.Const(None), "hc_after"), node.lineno)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._holding(node, self._watch)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self._holding(node, self.generic_visit)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        return self._holding(node, self.generic_visit)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        counted = self._count(node)
        node.nodes = [_filter(operand, "hc_text") for operand in node.nodes]
        return counted

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._count(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._count(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._count(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._count(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        return _filter(node, "hc_made") if node.ctx == "load" and node.name in ("varargs", "kwargs") else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _looked(node.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.name not in ("defined", "undefined"):
            node.node = _looked(node.node)
        return node

    def _holding(self, node: Any, visit: Callable[[Any], nodes.Node]) -> nodes.Node:
        self._held += 1
        visited = visit(node)
        self._held -= 1
        return visited

    def _watch(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), "hc_look"), lineno=node.lineno))
        return node

    def _count(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "hc_made")


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _looked(value: nodes.Expr) -> nodes.Expr:
    return value if isinstance(value, nodes.Const) else _filter(value, "hc_look")


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


@pass_context
def _written_out(context: Context, value: object) -> object:
    """What comes out of `{{ }}`."""
    _allowance(context).make(len(value) if isinstance(value, str) else _size(value))
    return _text_of(value)


@pass_context
def _text(context: Context, value: object) -> object:
    """An operand of `~`."""
    return _text_of(value)


def _text_of(value: Any) -> Any:
    """Text stays what it is; of what holds some, the form that Python prints."""
    return shown(value) if isinstance(value, dict | list | tuple) else value


def _counted(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, whose arguments and result are counted."""
    passes = getattr(filter_, "jinja_pass_arg", None)
    passed = {"context": 0, "eval_context": 1, "environment": 2}.get(getattr(passes, "name", ""))

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        allowance = _allowance(context)
        allowance.look()
        if name not in QUICK:
            allowance.make(_size(value))
            _check_items(len(value) if isinstance(value, str) and name not in OF_TEXT else 0)
        _check_arguments(name, [*args, *kwargs.values()] + ([value] if name in ("int", "float") else []))
        first = () if passed is None else ((context, context.eval_ctx, context.environment)[passed],)
        result = filter_(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            return _watched(allowance, result)
        if name not in QUICK:
            allowance.make(_size(result))
        return result

    return counted


def _watched(allowance: Allowance, items: Iterator[Any]) -> Iterator[Any]:
    """The same items, of which none is made before it is wanted."""
    for number, item in enumerate(items):
        if number % 256 == 0:
            allowance.look()
        _check_items(number)
        yield item


@pass_context
def _replace(context: Context, value: object, old: object, new: object, count: int | None = None) -> str:
    text = str(value)
    _check_growth(_allowance(context), text, "replace", (str(old), str(new)))
    return text.replace(str(old), str(new), -1 if count is None else count)


@pass_context
def _join(context: Context, value: Any, d: object = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = context.environment.filters["map"](context, value, attribute=attribute)
    texts = [str(_text_of(item)) for item in _watched(_allowance(context), iter(value))]
    _check_growth(_allowance(context), str(d), "join", (texts,))
    return str(d).join(texts)


@pass_context
def _indent(context: Context, value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_width(len(width) if isinstance(width, str) else width)
    text, indent = str(value), width if isinstance(width, str) else " " * width
    _allowance(context).make(len(text) + len(indent) * (text.count("\n") + 1))
    lines = [line if blank is False and not line else indent + line for line in text.split("\n")]
    return "\n".join(lines) if first else "\n".join(lines)[len(indent) if lines[0] else 0 :]


@pass_context
def _format(context: Context, value: object, *args: object, **kwargs: object) -> str:
    text = str(value)
    values = _for_format(text, kwargs or args)
    _allowance(context).make(len(text) + text.count("%") * _size(values))
    formatted: str = text % values
    return formatted


def _for_method(
    allowance: Allowance, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a method, within bounds."""
    allowance.look()
    _check_arguments(name, [*args, *kwargs.values()])
    if name == "join" and args and not isinstance(args[0], str | list | tuple):
        args = (list(_watched(allowance, iter(args[0]))), *args[1:])
    if name == "format":
        args, kwargs = tuple(map(_text_of, args)), {key: _text_of(item) for key, item in kwargs.items()}
    _check_growth(allowance, owner, name, (*args, *kwargs.values()))
    return args, kwargs


def _check_growth(allowance: Allowance, owner: Any, name: str, args: Sequence[Any]) -> None:
    """Counts what a method makes."""
    size = len(owner) if isinstance(owner, str) else 1
    if name == "replace" and len(args) > 1:
        old, new = args[0], args[1]
        times = (owner.count(old) if old else len(owner) + 1) if isinstance(old, str) else 0
        size += times * max(0, _size(new) - _size(old))
    elif name == "join" and args:
        size = _size(args[0]) + size * len(args[0])
    elif name == "format":
        size += _check_fields(owner) * _size(args)
    elif name in ("split", "rsplit", "splitlines"):
        separators = [args[0]] if args and isinstance(args[0], str) else list(" \t\n\r\f\v")
        _check_items(sum(owner.count(separator) for separator in separators if separator))
    allowance.make(size)


def _for_format(form: str, values: Any) -> Any:
    """What `%` fills in, within bounds."""
    for found in _FORMAT.finditer(form):
        *widths, conversion = found.groups()
        _check_conversion(conversion)
        for width in filter(None, widths):
            _check_width(_width(width))
    if isinstance(values, dict) and "%(" in form:
        return {key: _text_of(value) for key, value in values.items()}
    return tuple(map(_text_of, values)) if isinstance(values, tuple) else _text_of(values)


def _check_fields(form: str) -> int:
    """How many fields a form of `format` fills in, within bounds."""
    fields = list(Formatter().parse(form))
    for _, _, spec, conversion in fields:
        _check_conversion(conversion)
        for width in re.findall(r"\d+|{", spec or ""):
            _check_width(_width(width))
    return len(fields)


def _size(value: object) -> int:
    """Characters and items in a value and in all that it holds, as often as it holds them. Those of too many items, or
    too deep ones, are not counted, but too large.
    """
    if isinstance(value, str):
        return len(value)
    size, num_items, level = 0, 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, Namespace):
                item = getattr(item, "_Namespace__attrs")  # noqa: B009
            size += len(item) if isinstance(item, Sized) else 1
            if isinstance(item, Mapping):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, Collection) and not isinstance(item, str | bytes | range):
                below += itertools.islice(item, MAX_ITEMS + 1)
            if num_items + len(below) > MAX_ITEMS:
                return TOO_LARGE
        if not below:
            return size
        num_items, level = num_items + len(below), below
    return TOO_LARGE


def _check_items(number: int) -> None:
    if number > MAX_ITEMS:
        raise TooMuch(f"{number} items, at most {MAX_ITEMS}")


def _check_arguments(name: str, values: Sequence[object]) -> None:
    """Of a filter or method: the time that it takes may go with the product of what it gets."""
    for value in values:
        if isinstance(value, str) and len(value) > MAX_ARGUMENT and name not in GROWING:
            raise TooMuch(f"an argument of {len(value)} characters, at most {MAX_ARGUMENT}")
        if isinstance(value, int) and abs(value) > MAX_ITEMS:
            raise TooMuch(f"an argument of {value.bit_length()} bits, at most {MAX_ITEMS}")
        if name == "sum" and isinstance(value, Collection) and not isinstance(value, str):
            raise TooMuch("a sum that begins with a list")


def _check_conversion(conversion: str | None) -> None:
    if conversion in ("r", "a"):
        raise TemplateError(f"the conversion {conversion!r} is not available to templates")


def _width(text: str) -> int:
    """One that is filled in later may be anything."""
    return int(text) if text.isdigit() and len(text) < 10 else MAX_WIDTH + 1


def _check_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise TooMuch(f"a width of {width}, at most {MAX_WIDTH}")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooMuch(f"a number of {bits} bits, at most {MAX_BITS}")


class GenerationBlock(Extension):
    """`{% generation %}` marks what training should learn from; serving only needs its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)
