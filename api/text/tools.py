"""Tool calls in the Hermes form, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, found as text comes."""

import json
import re
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str  # JSON as the model wrote it, so that the next turn renders to the same tokens


class ToolCallParser:
    """Text in, text and complete calls out. What is not a well-formed call stays text."""

    def __init__(self) -> None:
        self._held = ""  # may be the beginning of a call
        self._calls = 0

    def push(self, text: str) -> list[str | ParsedCall]:
        """Takes text -> what is now certain, in order."""
        self._held += text
        found: list[str | ParsedCall] = []
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            self._say(self._held[:start], found)
            call = parse_call(self._held[start + len(OPEN) : end])
            end += len(CLOSE)
            self._calls += call is not None
            found.append(call or self._held[start:end])
            self._held = self._held[end:]
        certain = len(self._held) - self._uncertain() if start < 0 else start
        self._say(self._held[:certain], found)
        self._held = self._held[certain:]
        return found

    def finish(self) -> list[str | ParsedCall]:
        """What was held back: a call that was never closed is text."""
        found: list[str | ParsedCall] = []
        self._say(self._held, found)
        self._held = ""
        return found

    def _say(self, text: str, found: list[str | ParsedCall]) -> None:
        """Space around calls is layout, not an answer."""
        if text and not (self._calls and text.isspace()):
            found.append(text)

    def _uncertain(self) -> int:
        """How many of the last characters may be the beginning of a call."""
        return next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)


def parse_call(text: str) -> ParsedCall | None:
    """The call in the text between the tags; None if there is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        return ParsedCall(call["name"], arguments)
    for match in _ARGUMENTS.finditer(text):
        value, end = json.JSONDecoder().raw_decode(text, match.end())
        if value == arguments:
            return ParsedCall(call["name"], text[match.end() : end])
    return ParsedCall(call["name"], json.dumps(arguments, ensure_ascii=False))
