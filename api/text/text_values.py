"""Which texts a schema allows, as a terminal of a grammar: for values that are written as they are, not as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from hybrid_cache.api.text.call_readers import values_of
from hybrid_cache.api.text.grammars import lark_regex
from hybrid_cache.api.text.tool_schemas import MOST_HOPS, Schema, pointed
from hybrid_cache.errors import RequestError

MOST_STEPS = 1 << 16  # parts of schemas and values in them, of one tool
_REFUSED = ("not", "if", "$dynamicRef", "$recursiveRef", "disallow", "extends")


@dataclass(frozen=True, slots=True)
class Texts:
    """Some of the texts that a schema allows, or null.

    values: the only ones, if they are listed   patterns: of each, all of it   low, high: characters; None for any
    """

    null: bool = False
    values: tuple[str, ...] | None = None
    patterns: tuple[str, ...] = ()
    low: int = 0
    high: int | None = None

    def also(self, other: "Texts") -> "Texts":
        """Those that are in both, which are both null or both text."""
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            kept = frozenset(other.values)
            values = tuple(each for each in self.values if each in kept)
        high = min((each for each in (self.high, other.high) if each is not None), default=None)
        return Texts(self.null, values, self.patterns + other.patterns, max(self.low, other.low), high)

    def within(self) -> "Texts":
        """The same without listed values that are too short or too long."""
        if self.values is None:
            return self
        high = self.high
        kept = (each for each in self.values if self.low <= len(each) and (high is None or len(each) <= high))
        return replace(self, values=tuple(kept))

    def terminal(self) -> str:
        """Raises RequestError."""
        if self.null:
            return '"null"'
        if self.values is not None:
            if self.patterns:
                raise RequestError("a `pattern` beside listed values of a text is not supported", param="tools")
            return " | ".join(map(json.dumps, self.values))
        parts = [lark_regex(_inner(pattern), "tools") for pattern in self.patterns]
        if self.low or self.high is not None or not parts:
            parts.append(rf"/(.|\n){{{self.low},{'' if self.high is None else self.high}}}/")
        return " & ".join(parts)


class TextSchemas:
    """The schemas of the texts of one tool."""

    def __init__(self, whole: Schema) -> None:
        """whole: the document that they refer to"""
        self._whole = whole
        self._steps = 0

    def terminal(self, name: str, schema: Schema, end: str, tail: str) -> str:
        """A terminal `name` for a text and what is behind it.

        end: the mark that ends it, which cannot be within it   tail: that mark and what is around it
        `format` is passed over. Raises RequestError for what could not be kept to, and where no text is allowed.
        """
        found = self._allowed(schema, MOST_HOPS)
        if not found:
            raise RequestError("the schema of a parameter allows no text: its keywords contradict", param="tools")
        for value in (value for each in found for value in each.values or ()):
            if end in value:
                raise RequestError(f"{value!r} cannot be written as a text: it holds {end!r}", param="tools")
        texts = " | ".join(f"({each.terminal()})" for each in found)
        within = lark_regex(rf"(.|\n)*{end}(.|\n)*", "tools")
        return f"{name}: (({texts}) & ~{within}) {json.dumps(tail)}"

    def _allowed(self, schema: object, depth: int) -> Sequence[Texts]:
        self._count(1)
        if schema is False:
            return ()
        if not isinstance(schema, dict):
            return (Texts(null=True), Texts())
        if refused := next((key for key in _REFUSED if key in schema), None):
            raise RequestError(f"`{refused}` is not supported for a parameter that is text", param="tools")
        if not depth:
            raise RequestError(f"the schema of a text is nested more than {MOST_HOPS} deep", param="tools")
        found = self._by_itself(schema)
        if "$ref" in schema:
            found = self._both(found, self._allowed(self._pointed(schema["$ref"]), depth - 1))
        for part in _parts(schema, "allOf"):
            found = self._both(found, self._allowed(part, depth - 1))
        if "anyOf" in schema:
            branches = [self._allowed(part, depth - 1) for part in _parts(schema, "anyOf")]
            found = self._both(found, [each for branch in branches for each in branch])
        if "oneOf" in schema:
            found = self._both(
                found, _exactly_one([self._allowed(part, depth - 1) for part in _parts(schema, "oneOf")])
            )
        return found

    def _by_itself(self, schema: Schema) -> Sequence[Texts]:
        """By its own keywords, but for those that hold schemas."""
        kinds, values = schema.get("type", ["string", "null"]), values_of(schema)
        self._count(len(values or ()))
        found = list[Texts]()
        if "null" in _listed(kinds) and (values is None or None in values):
            found.append(Texts(null=True))
        if "string" in _listed(kinds):
            texts = None if values is None else tuple(each for each in values if isinstance(each, str))
            pattern = schema.get("pattern")
            if not isinstance(pattern, str | None):
                raise RequestError(f"`pattern` is {pattern!r}, must be a text", param="tools")
            patterns = () if pattern is None else (pattern,)
            found.append(Texts(False, texts, patterns, _length(schema, "minLength") or 0, _length(schema, "maxLength")))
        return _possible(found)

    def _both(self, some: Sequence[Texts], others: Sequence[Texts]) -> Sequence[Texts]:
        self._count(sum(1 + len(each.values or ()) for each in some) * (1 + len(others)))
        return _possible(a.also(b) for a, b in product(some, others) if a.null == b.null)

    def _pointed(self, reference: object) -> object:
        try:
            return pointed(self._whole, str(reference))
        except LookupError:
            raise RequestError(f"`$ref` is {reference!r}, which is nothing in the schema", param="tools") from None

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise RequestError(
                f"the texts of a tool take {self._steps} steps to read, at most {MOST_STEPS}", param="tools"
            )


def _possible(found: Iterable[Texts]) -> Sequence[Texts]:
    """Without those that no text can be."""
    kept = (each.within() for each in found)
    return [each for each in kept if each.null or (each.values != () and (each.high is None or each.low <= each.high))]


def _exactly_one(branches: Sequence[Sequence[Texts]]) -> Sequence[Texts]:
    """What one of the branches allows, and no other. Raises RequestError where that is not known."""
    nulls = [branch for branch in branches if any(each.null for each in branch)]
    found = [Texts(null=True)] if len(nulls) == 1 else []
    texts = [kept for branch in branches if (kept := [each for each in branch if not each.null])]
    if len(texts) <= 1:
        return [*found, *(texts[0] if texts else ())]
    if any(each.values is None or each.patterns for branch in texts for each in branch):
        raise RequestError("a `oneOf` of texts that are not listed is not supported; use `anyOf`", param="tools")
    times = Counter(value for branch in texts for value in {value for each in branch for value in each.values or ()})
    return [*found, Texts(values=tuple(value for value, count in times.items() if count == 1))]


def _parts(schema: Schema, key: str) -> Sequence[object]:
    """Raises RequestError."""
    parts = schema.get(key, [])
    if not isinstance(parts, list):
        raise RequestError(f"`{key}` is {parts!r}, must be a list of schemas", param="tools")
    return parts


def _listed(kinds: object) -> Sequence[object]:
    return kinds if isinstance(kinds, list) else [kinds]


def _length(schema: Schema, key: str) -> int | None:
    """Raises RequestError."""
    if key not in schema:
        return None
    length = schema[key]
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 0 or length != int(length):
        raise RequestError(f"`{key}` is {length!r}, must be a number of characters", param="tools")
    return int(length)


def _inner(pattern: str) -> str:
    """A pattern of all of a text without the anchors around it. One that may match a part is kept to by all of it."""
    before = pattern.removesuffix("$")
    if (len(before) - len(before.rstrip("\\"))) % 2 == 0:  # else it is a dollar sign
        pattern = before
    return pattern.removeprefix("^")
