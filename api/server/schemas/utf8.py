"""Text that UTF-8 cannot carry: half of a surrogate pair, which an escape such as \\ud800 makes in JSON."""

from typing import TypeAlias

_Place: TypeAlias = "tuple[_Place, str | int] | None"  # of what holds a value, and the value's key or number there


def broken_text(value: object) -> str | None:
    """Where parsed JSON has such a text, as in `messages.0.name`; None if nowhere. A key counts as what holds it."""
    todo: list[tuple[object, _Place]] = [(value, None)]
    while todo:
        value, place = todo.pop()
        if isinstance(value, str):
            if not _is_sound(value):
                return _written_out(place)
        elif isinstance(value, dict):
            if not all(_is_sound(key) for key in value if isinstance(key, str)):
                return _written_out(place)
            todo += [(item, (place, key)) for key, item in value.items()]
        elif isinstance(value, list):
            todo += [(item, (place, i)) for i, item in enumerate(value) if not isinstance(item, int | float)]
    return None


def _is_sound(text: str) -> bool:
    if text.isascii():  # known without looking
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written_out(place: _Place) -> str:
    steps = list[str]()
    while place is not None:
        place, step = place
        steps.append(str(step))
    return ".".join(reversed(steps))
