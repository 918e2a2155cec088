"""JSON schemas of which llguidance would follow a part only. Most keywords that it lacks it refuses by name itself."""

OF_DRAFT_3 = frozenset({"disallow", "divisibleBy", "extends"})  # passed over, as are keywords that no draft has
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "default", "examples"})


def fault_of_schema(schema: object) -> str:
    """What of it could not be kept to, in words that name the keyword; empty if all can. It may be no schema at all."""
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
    return ""
