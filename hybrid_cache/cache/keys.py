"""What the cache knows a token sequence by: keys of its pages, and names of its prefixes.

A key is what the tree looks a page up by, after the pages before it. A name stands for a prefix by itself, and is the
same in every process and on every machine:

    root      of a namespace, which says the model with its adapter and the tenant's salt
    page      of its tokens as little-endian int32, and the name of all that comes before them
    end       of a whole prompt: of the tokens after its last full page, and the name of those pages
    message   of the key that it is stored under, and the root

Each is a BLAKE2b with its kind as personalisation, so that names of two kinds are never equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray

Name = bytes

NAME_BYTES = 16
KEY_BYTES = TILE * 4  # a page's tokens as int32
NO_TAIL = b"\0"  # no tokens at all have these bytes

ROOT, PAGE, END, MESSAGE = (
    blake2b(digest_size=NAME_BYTES, person=kind) for kind in (b"root", b"page", b"end", b"message")
)


@dataclass(slots=True, eq=False)
class Keys:
    """A token sequence as the cache knows it: a key for each full page, and one for the tokens after them.

    Keys are the tokens themselves, see `keys_of`, or names of whole prefixes, see `named_keys`. Names are computed on
    first use, and kept.
    """

    namespace: str
    pages: Sequence[bytes]
    tail: bytes  # empty when the last page is full
    num_tokens: int
    _names: list[Name] = field(default_factory=list, repr=False)  # as far as they are known
    _end_name: Name = field(default=b"", repr=False)

    @property
    def names(self) -> Sequence[Name]:
        """`names[n]` is the name of the first n pages."""
        if len(self._names) <= len(self.pages):
            names = list(self._names) or [root_name(self.namespace)]
            for page in self.pages[len(names) - 1 :]:
                names.append(_digest(PAGE, names[-1], page))
            self._names = names
        return self._names

    @property
    def end_name(self) -> Name:
        """The name of the whole prompt; never that of its full pages, even if no tokens come after them."""
        if not self._end_name:
            self._end_name = _digest(END, self.names[-1], self.tail)
        return self._end_name

    def learn(self, names: list[Name]) -> None:
        """Takes over the first names, which are known from another sequence."""
        if len(names) > len(self._names):
            self._names = names

    def beginning(self, num_tokens: int) -> "Keys":
        """Keys of the first tokens, as the beginning of something longer: no prompt ends there."""
        return Keys(self.namespace, self.pages[: num_tokens // TILE], NO_TAIL, num_tokens + 1)


def keys_of(namespace: str, tokens: TokenArray) -> Keys:
    data = np.ascontiguousarray(tokens, "<i4").tobytes()
    pages = pieces(data, KEY_BYTES)
    return Keys(namespace, pages, data[len(pages) * KEY_BYTES :], len(tokens))


def named_keys(namespace: str, names: Sequence[Name], tail: bytes, num_tokens: int) -> Keys:
    """Keys of pages whose tokens are not known, but a name for each of them and all before it."""
    return Keys(namespace, names, tail, num_tokens, [root_name(namespace), *names])


def root_name(namespace: str) -> Name:
    """Names the empty prefix of a namespace."""
    return _digest(ROOT, namespace.encode("utf-8", "surrogatepass"))  # any string is a namespace


def message_name(namespace: str, key: str) -> Name:
    """Names what is stored under a key outside the tree."""
    return _digest(MESSAGE, root_name(namespace), key.encode())


def pieces(data: bytes, size: int) -> list[bytes]:
    """All pieces of this size, without what is left at the end."""
    return [data[start : start + size] for start in range(0, len(data) - size + 1, size)]


def _digest(kind: blake2b, *parts: bytes) -> Name:
    digest = kind.copy()
    for part in parts:
        digest.update(part)
    return digest.digest()
