"""Tool calls as a whole, for those who have no use for their parts."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_cache.api.text.generation import CallArguments, CallBegin, CallEnd, Event, Text, Token


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call in a choice."""

    choice: int
    name: str
    arguments: str  # an object as JSON; the beginning of one if the call broke off
    token: Token | None  # as in `Text`
    id: str
    complete: bool = True


@dataclass(slots=True)
class WholeCalls:
    """Puts the parts of calls together."""

    _begun: dict[int, tuple[CallBegin, list[str]]] = field(default_factory=dict)  # by choice

    def take(self, event: Event | ToolCall) -> Iterator[Event | ToolCall]:
        """Takes the next event of an answer -> the same, or a call at its end; a token of a part comes with no text."""
        match event:
            case CallBegin():
                self._begun[event.choice] = (event, [])
            case CallArguments():
                self._begun[event.choice][1].append(event.text)
            case CallEnd():
                begin, parts = self._begun.pop(event.choice)
                yield ToolCall(event.choice, begin.name, "".join(parts), event.token, begin.id, event.complete)
                return
            case _:
                yield event
                return
        if event.token is not None:
            yield Text(event.choice, "", event.token)
