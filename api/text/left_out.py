"""Messages that a chat template drops without a word, such as what the system says after the first turn.

A template's text is searched for what each message says. What is not there may have been written in another way, so
what counts is whether the text is the same whatever the message says.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hybrid_cache.api.text.marks import Quoting
from hybrid_cache.api.text.messages import TemplateMessage, TextPart

OTHER = "x"  # what a message says instead begins with it
MOST_APART = 4  # messages of the system that are not seen, and tried one by one
_PLAIN = Quoting(())

Messages = Sequence[TemplateMessage]


def left_out(messages: Messages, text: str, render: Callable[[Messages], str | None]) -> str | None:
    """The role of a message whose text has no effect on the prompt; None if there is none.

    Answers are not looked at: what becomes of their thoughts and calls is the template's own affair.

    text: of all messages, or the beginning of it   render: the text of other ones, None where that is refused
    """
    for places in _suspects(messages, text):
        varied = [replace(m, parts=_other(m)) if place in places else m for place, m in enumerate(messages)]
        other = render(varied)
        if other is not None and other.startswith(text):
            return messages[min(places)].role
    return None


def _suspects(messages: Messages, text: str) -> Iterator[frozenset[int]]:
    """Places of messages that are to be varied together: those of one role, where the text does not show one.

    What the system says later is always among them: it is often short, and may stand there by chance.
    """
    missing: dict[str, list[int]] = {"user": [], "tool": [], "system": []}
    unseen, begin = list[int](), 0
    for place, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        said = (message.content(_PLAIN) or "").strip()
        if not said or role not in missing:
            continue
        found = -1 if missing[role] and role != "system" else text.find(said, begin)
        if found >= 0:
            begin = found + len(said)
        elif role == "system":
            unseen.append(place)
        if found < 0 or (role == "system" and place > 0):
            missing[role].append(place)
    yield from (frozenset(places) for places in missing.values() if places)
    yield from (frozenset([place]) for place in unseen[:MOST_APART])


def _other(message: TemplateMessage) -> tuple[TextPart, ...]:
    return tuple(replace(part, text=OTHER + part.text) for part in message.parts or ())
