"""Other orders of a conversation whose roles a chat template refuses: what vendors do with the same messages.

Mistral joins system messages at the front, and neighbours of one role into one message; so does Anthropic with
neighbours; Gemma, which knows no system role, has its text at the start of the first user's message.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hybrid_cache.api.text.messages import TemplateMessage, TextPart

Messages = Sequence[TemplateMessage]
SYSTEM_FIRST, SYSTEM_IN_USER, MERGED, USER_FIRST = "system-first", "system-in-user", "merged", "user-first"


def other_orders(messages: Messages) -> Iterator[tuple[tuple[str, ...], Messages]]:
    """-> what was done, and the messages after it: what changes least comes first."""
    for names in _LADDER:
        changed, done = messages, list[str]()
        for name in names:
            after = _STEPS[name](changed)
            if after != changed:
                done.append(name)
            changed = after
        if tuple(done) == names:  # otherwise it is one that has been there
            yield names, changed


def _system_first(messages: Messages) -> Messages:
    """One system message, at the front."""
    system = [message for message in messages if _is_system(message)]
    others = [message for message in messages if not _is_system(message)]
    return [_joined(system), *others] if system else messages


def _system_in_user(messages: Messages) -> Messages:
    """What the system says begins the first message of a user, or is one where the model speaks first."""
    system = [message for message in messages if _is_system(message)]
    others = [message for message in messages if not _is_system(message)]
    if not system:
        return messages
    said = replace(_joined(system), role="user", fields={})
    if others and others[0].role == "user":
        return [_joined([said, others[0]]), *others[1:]]
    return [said, *others]


def _merged(messages: Messages) -> Messages:
    """No two messages of a user or of the model in a row."""
    merged: list[TemplateMessage] = []
    for message in messages:
        if merged and merged[-1].role == message.role and message.role in ("user", "assistant"):
            merged[-1] = _joined([merged[-1], message])
        else:
            merged.append(message)
    return merged


def _user_first(messages: Messages) -> Messages:
    """An empty message of a user where none speaks before the model does."""
    place = next((place for place, message in enumerate(messages) if not _is_system(message)), len(messages))
    if place < len(messages) and messages[place].role == "user":
        return messages
    return [*messages[:place], TemplateMessage("user", (TextPart(""),)), *messages[place:]]


def _joined(messages: Messages) -> TemplateMessage:
    """One message with all that several of a role say, think and call. It has a name if they have the same."""
    parts = tuple(part for message in messages for part in message.parts or ())
    fields = {name: value for message in messages for name, value in message.fields.items()}
    for name in ("tool_calls", "reasoning_content"):
        values = [message.fields[name] for message in messages if message.fields.get(name)]
        if len(values) > 1:
            fields[name] = _together(values)
    if len({message.fields.get("name") for message in messages}) > 1:
        fields.pop("name", None)
    marks = [message.mark for message in messages if message.mark is not None]
    return TemplateMessage(messages[-1].role, parts or None, fields, marks[-1] if marks else None)


def _together(values: Sequence[object]) -> object:
    if all(isinstance(value, str) for value in values):
        return "\n".join(map(str, values))
    return [each for value in values if isinstance(value, list) for each in value]


def _is_system(message: TemplateMessage) -> bool:
    return message.role in ("system", "developer")


_STEPS: dict[str, Callable[[Messages], Messages]] = {
    SYSTEM_FIRST: _system_first,
    SYSTEM_IN_USER: _system_in_user,
    MERGED: _merged,
    USER_FIRST: _user_first,
}
_LADDER: tuple[tuple[str, ...], ...] = (
    (SYSTEM_FIRST,),
    (MERGED,),
    (USER_FIRST,),
    (SYSTEM_FIRST, MERGED),
    (MERGED, USER_FIRST),
    (SYSTEM_FIRST, USER_FIRST),
    (SYSTEM_FIRST, MERGED, USER_FIRST),
    (SYSTEM_IN_USER,),
    (SYSTEM_IN_USER, MERGED),
)
