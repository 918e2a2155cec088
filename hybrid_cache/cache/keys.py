"""What the cache knows a token sequence by: keys of its pages, and names of its prefixes.

A key is what the tree looks a page up by, after the pages before it. A name stands for a prefix by itself, and is the
same in every process and on every machine:

    root      of a namespace, which says the model with its adapter and the tenant's salt
    page      of its tokens as little-endian int32, and the name of all that comes before them
    end       of a whole prompt: of the tokens after its last full page, and the name of those pages
    message   of the key that it is stored under, and the root
    inputs    of a layer for some pages: its number, and the name of the last of them

Each is a BLAKE2b with its kind as personalisation, so that names of two kinds are never equal.

Where another model takes over inside a sequence (`Mark`), the key of the page with its first token says so behind the
tokens; the pages that follow hang below that one, and the pages before it are anybody's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray

Name = bytes

NAME_BYTES = 16
TOKEN_BYTES = 4  # int32
KEY_BYTES = TILE * TOKEN_BYTES  # a page's tokens
MARK_BYTES = 1 + NAME_BYTES  # tokens of the page before the mark, and the digest of a namespace
NO_TAIL = b"\0"  # no tokens at all have these bytes

ROOT, PAGE, END, MESSAGE, INPUTS, MARK = (
    blake2b(digest_size=NAME_BYTES, person=kind) for kind in (b"root", b"page", b"end", b"message", b"inputs", b"mark")
)


@dataclass(frozen=True, slots=True)
class Mark:
    """From a token on, a sequence is computed by another model than its namespace says, such as an adapter.

    position: tokens before it   namespace: with that model, and the same salt
    """

    position: int
    namespace: str


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
    mark: Mark | None = None  # inside these tokens
    _stem: "Keys | None" = field(default=None, repr=False)

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

    @property
    def stem(self) -> "Keys | None":
        """What comes before the mark, as a whole prompt of the namespace; None if that is nothing."""
        if self.mark is None or not self.mark.position:
            return None
        num_pages, num_tail = divmod(self.mark.position, TILE)
        if self._stem is None:
            tail = self.pages[num_pages] if num_pages < len(self.pages) else self.tail
            tail = tail[: num_tail * TOKEN_BYTES]
            self._stem = Keys(self.namespace, self.pages[:num_pages], tail, self.mark.position)
        self._stem.learn(self._names[: num_pages + 1])
        return self._stem

    def ending_at(self, position: int) -> "Keys":
        """These, or their stem: the one that ends there."""
        stem = self.stem
        return stem if stem is not None and stem.num_tokens == position else self

    def namespace_of(self, index: int) -> str:
        """That of the model which computes the end of a page, or of the tail behind the pages."""
        return self.namespace if self.mark is None or index < self.mark.position // TILE else self.mark.namespace

    def learn(self, names: list[Name]) -> None:
        """Takes over the first names, which are known from another sequence."""
        if len(names) > len(self._names):
            self._names = names

    def beginning(self, num_tokens: int) -> "Keys":
        """Keys of the first tokens, as the beginning of something longer: no prompt ends there."""
        mark = self.mark if self.mark is not None and self.mark.position < num_tokens // TILE * TILE else None
        return Keys(self.namespace, self.pages[: num_tokens // TILE], NO_TAIL, num_tokens + 1, mark=mark)


def keys_of(namespace: str, tokens: TokenArray, mark: Mark | None = None) -> Keys:
    """mark: at a position among the tokens"""
    data = np.ascontiguousarray(tokens, "<i4").tobytes()
    pages = pieces(data, KEY_BYTES)
    tail = data[len(pages) * KEY_BYTES :]
    if mark is not None:
        index, before = divmod(mark.position, TILE)
        said = bytes([before]) + _digest(MARK, root_name(mark.namespace))
        if index < len(pages):
            pages[index] += said
        else:
            tail += said
    return Keys(namespace, pages, tail, len(tokens), mark=mark)


def tokens_in(key: bytes) -> bytes:
    """The tokens of a page or a tail, as bytes, without a mark."""
    return key[:-MARK_BYTES] if len(key) % TOKEN_BYTES else key


def common(a: bytes, b: bytes) -> int:
    """Bytes of the tokens that two keys begin with and that one model computes."""
    if a[-MARK_BYTES:] == b[-MARK_BYTES:] and len(a) % TOKEN_BYTES:
        a, b = tokens_in(a), tokens_in(b)
    else:
        a, b = _before_mark(a), _before_mark(b)
    size = min(len(a), len(b))
    if a[:TOKEN_BYTES] != b[:TOKEN_BYTES]:
        return 0
    differing = int.from_bytes(a[:size]) ^ int.from_bytes(b[:size])
    return (size - (differing.bit_length() + 7) // 8) // TOKEN_BYTES * TOKEN_BYTES


def goes_on_from(key: bytes, tail: bytes) -> bool:
    """Whether what has a key begins with all that ends with a tail at the same place."""
    return common(key, tail) == len(tokens_in(tail))


def _before_mark(key: bytes) -> bytes:
    return key[: key[-MARK_BYTES] * TOKEN_BYTES] if len(key) > MARK_BYTES and len(key) % TOKEN_BYTES else key


def named_keys(namespace: str, names: Sequence[Name], tail: bytes, num_tokens: int) -> Keys:
    """Keys of pages whose tokens are not known, but a name for each of them and all before it."""
    return Keys(namespace, names, tail, num_tokens, [root_name(namespace), *names])


def root_name(namespace: str) -> Name:
    """Names the empty prefix of a namespace."""
    return _digest(ROOT, namespace.encode("utf-8", "surrogatepass"))  # any string is a namespace


def message_name(namespace: str, key: str) -> Name:
    """Names what is stored under a key outside the tree."""
    return _digest(MESSAGE, root_name(namespace), key.encode())


def inputs_name(page: Name, layer: int) -> Name:
    """Names what a layer was given for pages of which this is the last."""
    return _digest(INPUTS, page, layer.to_bytes(4, "little"))


def pieces(data: bytes, size: int) -> list[bytes]:
    """All pieces of this size, without what is left at the end."""
    return [data[start : start + size] for start in range(0, len(data) - size + 1, size)]


def _digest(kind: blake2b, *parts: bytes) -> Name:
    digest = kind.copy()
    for part in parts:
        digest.update(part)
    return digest.digest()
