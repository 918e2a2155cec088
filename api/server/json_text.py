"""JSON as replies hold it: UTF-8 without spaces."""

import json
from collections.abc import Iterator, Mapping

from hybrid_cache.api.text.text_work import still_wanted

PIECE = 256  # items of a list that are written at once
DEPTH = 4  # levels at which a reply is taken apart: reply, choices, choice, log-probabilities


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: object) -> bytes:
    """A small value. Raises ValueError for NaN and infinities."""
    return _encode(value).encode()


def json_in_pieces(value: object) -> bytes:
    """The same of a large value: between two pieces other threads run, and work that nobody wants ends."""
    return b"".join(piece.encode() for piece in _pieces(value, DEPTH))


def _pieces(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, Mapping) and depth:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else ''}{_encode(key)}:"
            yield from _pieces(item, depth - 1)
        yield "}"
    elif isinstance(value, list) and depth and value and isinstance(value[0], Mapping):
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from _pieces(item, depth - 1)
        yield "]"
    elif isinstance(value, list) and len(value) > PIECE:
        for begin in range(0, len(value), PIECE):
            still_wanted()
            yield "," if begin else "["
            yield _encode(value[begin : begin + PIECE])[1:-1]
        yield "]"
    else:
        yield _encode(value)
