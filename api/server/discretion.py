"""What of an error may stand in a log: what went wrong and where, and no value that a client has sent.

Messages for clients quote what they sent. Whatever is quoted goes; so a message that passes on foreign words, or a
client's, has to quote them.
"""

import re
from collections.abc import Iterable
from functools import cache

from hybrid_cache.errors import HybridCacheError

HIDDEN = "'...'"
MOST_CHARACTERS = 400
_QUOTED = re.compile(r"""['"`\u2018\u201c].*['"`\u2019\u201d]""", re.DOTALL)
_PLACE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def without_values(message: str) -> str:
    """A message without anything from its first quotation mark to its last: what is quoted may hold such marks."""
    return _QUOTED.sub(HIDDEN, message)[:MOST_CHARACTERS]


def place_of(parts: Iterable[object]) -> str:
    """Where in a request something is: names of fields and places in lists, but no keys of a client's own."""
    return ".".join(str(part) if isinstance(part, int) or part in field_names() else "*" for part in parts)


@cache
def field_names() -> frozenset[str]:
    """Of all that requests may hold."""
    from pydantic import BaseModel

    found, new = set[type[BaseModel]](), [BaseModel]
    while new:
        found.update(new)
        new = [sub for each in new for sub in each.__subclasses__() if sub not in found]
    ours = [each for each in found if each.__module__.startswith("hybrid_cache.")]
    return frozenset(name for each in ours for name in each.model_fields)


def words_of(error: BaseException) -> str:
    """An exception's own words: no values, nor the words of what it was raised from, which may be a client's."""
    message, cause = str(error), error.__cause__
    for foreign in (str(cause), str(cause).partition("\n")[0]) if cause else ():
        message = message.replace(foreign, HIDDEN) if foreign else message
    name = "" if isinstance(error, HybridCacheError) else f"{type(error).__name__}: "
    return name + without_values(message) + (f" ({type(cause).__name__})" if cause else "")
