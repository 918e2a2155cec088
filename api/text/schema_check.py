"""JSON schemas of which llguidance would follow a part only. Most keywords that it lacks it refuses by name itself."""

import re
from collections.abc import Iterator

OF_DRAFT_3 = frozenset({"disallow", "divisibleBy", "extends"})  # passed over, as are keywords that no draft has
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "default", "examples"})
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PLAIN = frozenset({"string", "number", "integer", "boolean", "null"})
MOST_OPTIONAL = 400  # properties of one object that may be left out
LARGEST = 2**53  # integers beyond it are rounded
SMALLEST = 1e-6  # numbers between it and 0 are, too
_UNSAID = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # characters that have no short escape in JSON


def fault_of_schema(schema: object) -> str:
    """What of it could not be kept to, in words that name the keyword; empty if all can. It may be no schema at all."""
    if endless(schema):
        return "no value is of this schema: every one would have to hold another of the same kind"
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        if not isinstance(node, dict):
            continue
        if fault := _fault(node):
            return fault
        for key, value in node.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                todo += value.values()
            elif key not in _VALUES:
                todo.append(value)
    return ""


def _fault(schema: dict[str, object]) -> str:
    """Of a schema by itself."""
    if old := sorted(OF_DRAFT_3 & schema.keys()):
        return f"keywords of JSON Schema's draft 3 are not supported: {', '.join(old)}"
    least, required = schema.get("minProperties"), schema.get("required")
    known = len({str(name) for name in required}) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > max(1, known):  # a name that is not listed may come twice
        return (
            f"minProperties is {least}, supported up to {max(1, known)}: 1, or as many as there are names in `required`"
        )
    properties = schema.get("properties")
    optional = len(properties) - known if isinstance(properties, dict) else 0
    if optional > MOST_OPTIONAL:
        return f"properties: {optional} may be left out, at most {MOST_OPTIONAL} are supported"
    return next(_faults_of_values(schema), "")


def _faults_of_values(schema: dict[str, object]) -> Iterator[str]:
    """Values that an answer would have in another way."""
    for name in _BOUNDS:
        value = schema.get(name)
        if isinstance(value, int) and abs(value) > LARGEST:
            yield f"{name} is {value}, at most 2^53 is supported"
        if isinstance(value, float) and 0 < abs(value) < SMALLEST:
            yield f"{name} is {value}, at least {SMALLEST:g} is supported"
    for name in ("const", "enum"):
        for value in _within(schema.get(name)):
            if isinstance(value, int) and abs(value) > LARGEST:
                yield f"{name} has {value}, integers up to 2^53 are supported"
            if isinstance(value, str) and (found := _UNSAID.search(value)):
                yield f"{name} has the control character {found[0]!a}, which is not supported"


def _within(value: object) -> Iterator[object]:
    """All values in one, itself included."""
    todo = [value]
    while todo:
        value = todo.pop()
        yield value
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value


def endless(schema: object) -> bool:
    """Whether every value of a schema would hold another of the same, and so on. In linear time: what comes to an end
    is looked for from the innermost parts on.
    """
    nodes = [node for node in _within(schema) if isinstance(node, dict)]
    targets = {id(node): _target(schema, node.get("$ref")) for node in nodes}
    waiting: dict[int, list[dict[object, object]]] = {}  # for a part, the schemas whose values hold its
    for node in nodes:
        properties = node.get("properties")
        parts = [targets[id(node)], *node.values(), *(properties.values() if isinstance(properties, dict) else ())]
        for part in parts:
            for each in part if isinstance(part, list) else [part]:
                waiting.setdefault(id(each), []).append(node)
    ended: set[int] = set()
    todo = nodes
    while todo:
        node = todo.pop()
        if id(node) not in ended and _ends(node, targets[id(node)], ended):
            ended.add(id(node))
            todo += waiting.get(id(node), ())
    return isinstance(schema, dict) and id(schema) not in ended


def _target(root: object, pointer: object) -> object:
    """What a reference within a schema points to; True where that is not known here."""
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return True
    for part in filter(None, pointer.removeprefix("#").split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, dict) or name not in root:
            return True
        root = root[name]
    return root


def _ends(node: dict[object, object], target: object, ended: set[int]) -> bool:
    """Whether a value of a schema can come to its end, as far as is known."""

    def can(part: object) -> bool:
        return not isinstance(part, dict) or id(part) in ended

    kinds = node.get("type")
    if "const" in node or "enum" in node or (isinstance(kinds, str) and kinds in _PLAIN):
        return True
    if isinstance(kinds, list) and any(kind in _PLAIN for kind in kinds if isinstance(kind, str)):
        return True
    properties, required, least = node.get("properties"), node.get("required"), node.get("minItems")
    needed: list[object] = []
    if kinds == "object" and isinstance(properties, dict):
        needed += [properties.get(name) for name in _names(required)]
    if isinstance(least, int) and least > 0 and kinds == "array":
        needed.append(node.get("items"))
    alternatives = (node.get("anyOf"), node.get("oneOf"))
    choices = all(not isinstance(each, list) or not each or any(map(can, each)) for each in alternatives)
    every = node.get("allOf")
    return choices and can(target) and all(map(can, [*needed, *(every if isinstance(every, list) else ())]))


def _names(value: object) -> Iterator[str]:
    yield from (name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
