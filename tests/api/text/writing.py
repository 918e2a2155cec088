"""Tool calls as models of each family write them, right or wrong."""

import json
import random
from collections.abc import Sequence
from typing import Any

from hybrid_cache.api.text.tool_formats import FORMATS

TYPES: dict[str, dict[str, object]] = {
    "look": {
        "at": {"type": "string"},
        "times": {"type": "integer"},
        "how": {"type": ["object", "null"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "wait": {},
}
MARKS = ("<think>", "</think>", *sorted({mark for tools in FORMATS.values() for mark in tools.marks}))
TAGS = ("</parameter>", "</function>", "</invoke>", "<parameter=at>", "<function=look>")
BITS = (
    "a",
    "null",
    '"',
    "'",
    "\\",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "<",
    "\u20ac",
    "\U0001f600",
    "\x07",
    "(",
    ")",
    "=",
)


def random_string(rng: random.Random, bits: Sequence[str]) -> str:
    return "".join(rng.choice(bits) for _ in range(rng.randrange(8)))


def random_value(rng: random.Random, depth: int = 2) -> Any:
    match rng.randrange(8 if depth else 6):
        case 0 | 1:
            return random_string(rng, (*BITS, *MARKS, *TAGS))
        case 2:
            return rng.choice([0, -7, 10**9, 2.5, -1e-7])
        case 3 | 4 | 5:
            return rng.choice([True, False, None])
        case 6:
            return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {random_string(rng, BITS): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def random_arguments(name: str, rng: random.Random) -> dict[str, Any]:
    """Of the tool `look`, or others; such as a form can say."""
    tagged = name in ("qwen3_coder", "minimax_m2")
    said = {
        "at": random_string(rng, (*BITS, *MARKS, *(() if tagged else TAGS))),
        "times": rng.randrange(100),
        "how": {"a": random_value(rng), "b": random_value(rng)},
        "maybe": rng.choice([None, "nul", "a\n\nb", ""]),
    }
    return {key: value for key, value in said.items() if rng.random() < 0.7 and not (tagged and key == "maybe")}


def _json(value: Any, rng: random.Random) -> str:
    separators = rng.choice([(", ", ": "), (",", ":"), (" , ", " : ")])
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators, indent=rng.choice([None, None, 1]))


def _object(name: str, arguments: dict[str, Any], rng: random.Random, key: str) -> str:
    value = arguments if rng.random() < 0.8 else json.dumps(arguments)
    parts = [("name", name), (key, value)]
    if rng.random() < 0.2:
        parts.reverse()
    if rng.random() < 0.2:
        parts.insert(rng.randrange(3), ("id", random_value(rng)))
    return _json(dict(parts), rng)


def _tagged(
    name: str, arguments: dict[str, Any], rng: random.Random, head: str, foot: str, key: str, layout: str
) -> str:
    said = f"{head.format(name)}\n"
    for parameter, value in arguments.items():
        if parameter == "at" and name != "look":
            value = f'"{value}"' if json_like(value) else value
        text = value if isinstance(value, str) else _json(value, rng)
        said += f"{key.format(parameter)}{layout}{text}{layout}</parameter>\n"
    return f"{said}{foot}\n"


def json_like(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _python(name: str, arguments: dict[str, Any], rng: random.Random) -> str:
    value = repr if rng.random() < 0.7 else json.dumps
    return f"{name}({', '.join(f'{key}={value(each)}' for key, each in arguments.items())})"


def written(form: str, calls: Sequence[tuple[str, dict[str, Any]]], rng: random.Random) -> str:
    tools = FORMATS[form]
    match form:
        case "hermes":
            return "\n".join(f"{tools.begin}\n{_object(*call, rng, 'arguments')}\n{tools.end}" for call in calls)
        case "jamba" | "nemotron":
            return f"{tools.begin}[{', '.join(_object(*call, rng, 'arguments') for call in calls)}]{tools.end}"
        case "llama3":
            return "; ".join(_object(*call, rng, "parameters") for call in calls)
        case "lfm2":
            return f"{tools.begin}[{', '.join(_python(*call, rng) for call in calls)}]{tools.end}"
        case "kimi":
            begin, argument, end = tools.inner
            said = (
                f"{begin}functions.{call[0]}:{i}{argument}{_json(call[1], rng)}{end}" for i, call in enumerate(calls)
            )
            return tools.begin + "".join(said) + tools.end
        case "qwen3_coder":
            tags = ("<function={}>", "</function>", "<parameter={}>", "\n")
            return "\n".join(f"{tools.begin}\n{_tagged(*call, rng, *tags)}{tools.end}" for call in calls)
    said = (_tagged(*call, rng, '<invoke name="{}">', "</invoke>", '<parameter name="{}">', "") for call in calls)
    return f"{tools.begin}\n{''.join(said)}{tools.end}"


def random_answer(form: str, rng: random.Random) -> str:
    """Calls with text and thoughts, in which something may have gone wrong."""
    names = ["look", "look", "wait", "other"]
    parts = ["" if form == "llama3" else rng.choice(["", "Sure. ", "<think>\nwhy\n</think>\n\n", "\n"])]
    for _ in range(rng.randrange(1, 3)):
        calls = [(rng.choice(names), random_arguments(form, rng)) for _ in range(rng.randrange(1, 3))]
        parts += [written(form, calls, rng), rng.choice(["", "\n", " So. ", "<think>hm</think>", rng.choice(MARKS)])]
    text = "".join(parts)
    for _ in range(rng.choice([0, 0, 1, 2])):
        place = rng.randrange(len(text) + 1)
        end = min(len(text), place + rng.randrange(4))
        text = text[:place] + rng.choice(["", *BITS, *MARKS, *TAGS, "\\ud83d", "1e999"]) + text[end:]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.2 else text
