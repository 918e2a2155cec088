"""Where messages end in a rendering, for templates that do not loop over them as most do.

The first messages end where a rendering of them alone ends, if that is a prefix of the whole. One rendering for each
message takes time in the square of the conversation's length, so only some ends of long ones are sought; and those of
a conversation that grows are remembered.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock

from hybrid_cache.errors import RequestError

DENSE_MESSAGES = 64  # beyond these, only the ends of every `SPARSE` messages are sought
SPARSE = 64
MAX_REMEMBERED = 1 << 14


@dataclass(frozen=True, slots=True)
class _End:
    """Where the rendering of the first messages of a conversation ends, and a digest of it."""

    length: int
    digest: bytes


class RenderedEnds:
    """Remembers ends by digests. Safe to use from several threads."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, _End | None] = OrderedDict()  # None: cannot be rendered
        self._lock = Lock()

    def find(
        self,
        text: str,
        before: Callable[[int], str],
        head: object,
        bodies: Iterable[object],
        num_messages: int,
    ) -> Iterator[tuple[int, int]]:
        """-> (count, where the first `count` messages end in `text`), in order.

        before: renders so many messages; may raise RequestError
        head, bodies: JSON of everything that this depends on: for all, and of each message
        """
        keys = _prefix_keys(head, bodies)
        seen, position = blake2b(digest_size=16), 0
        for count in range(1, num_messages + 1):
            if count > DENSE_MESSAGES and count % SPARSE:
                continue
            end = self._end(keys[count - 1], before, count)
            if end is None or not position <= end.length <= len(text):
                continue
            ahead = seen.copy()
            ahead.update(_bytes(text[position : end.length]))
            if ahead.digest() == end.digest:
                seen, position = ahead, end.length
                yield count, position

    def _end(self, key: bytes, before: Callable[[int], str], count: int) -> _End | None:
        with self._lock:
            if key in self._ends:
                self._ends.move_to_end(key)
                return self._ends[key]
        try:
            text = before(count)
            end = _End(len(text), blake2b(_bytes(text), digest_size=16).digest())
        except RequestError:  # some templates want the user to speak last
            end = None
        with self._lock:
            self._ends[key] = end
            while len(self._ends) > MAX_REMEMBERED:
                self._ends.popitem(last=False)
        return end


def _prefix_keys(head: object, bodies: Iterable[object]) -> list[bytes]:
    """A digest for each prefix of the messages, of everything that its rendering may depend on."""
    seen, keys = blake2b(_canonical(head), digest_size=16), []
    for body in bodies:
        seen.update(_canonical(body))
        keys.append(seen.digest())
    return keys


def _canonical(value: object) -> bytes:
    return json.dumps(value, default=str).encode() + b"\0"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
