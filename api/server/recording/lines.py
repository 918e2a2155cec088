"""The lines of a record of what a server served: what happened to requests and to the cache, and no text.

A record is JSON, an object a line; what a line tells is its first field:

    format    a server has started, with an empty cache: its model, its layout, its budget, its policy
    request   a prompt and its answers have ended
    turn      what the next prompt of a conversation begins with was computed, when nobody waited
    called    the answer to a request called a tool
    lost      so many lines are missing here
    stopped   the last line of a record that ended before its server

Times are seconds since the server started. Names are keyed digests (BLAKE2b) of 8 bytes in hexadecimal, or many of
them in base64 one after the other. The name of a page stands for its tokens and all before them. A line has only the
pages that the lines before it do not have, and names the one that they come `after`; now and then pages are said again,
so that neither side needs all of a long record.
"""

import base64
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from hybrid_cache.cache.keys import Name
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.spec import AttentionSpec, StateSpec
from hybrid_cache.tokens import Boundary, BoundaryKind

FORMAT = "hybrid-cache-record"
VERSION = 1
NAME_BYTES = 8
KEY_BYTES = 32

Line = dict[str, object]


class Secret:
    """Makes names that nobody can make who does not have the key. Equal things have equal names."""

    def __init__(self, key: bytes | None = None) -> None:
        """key: for names that another record with the same key has, too; None for one of this process alone, which
        is kept nowhere
        """
        self._key = os.urandom(KEY_BYTES) if key is None else blake2b(key, digest_size=KEY_BYTES).digest()
        self.salt_id = self.name(b"salt", b"")  # equal for equal keys

    def name(self, kind: bytes, data: bytes) -> str:
        return self.digest(kind, data).hex()

    def of_text(self, kind: bytes, text: str) -> str:
        """Empty for an empty one."""
        return self.name(kind, text.encode("utf-8", "surrogatepass")) if text else ""

    def digest(self, kind: bytes, data: bytes) -> bytes:
        return blake2b(data, digest_size=NAME_BYTES, key=self._key, person=kind).digest()


@dataclass(slots=True)
class PageWriter:
    """Writes down the pages of prompts, each once."""

    secret: Secret
    known: set[Name] = field(default_factory=set)  # the engine's names of those that have been written

    def fields(self, names: Sequence[Name]) -> Line:
        """names: of all full pages of a prompt, from the first on"""
        num_known = next((i for i in range(len(names), 0, -1) if names[i - 1] in self.known), 0)
        self.known.update(names[num_known:])
        new = b"".join(self.secret.digest(b"page", name) for name in names[num_known:])
        after = self.secret.name(b"page", names[num_known - 1]) if num_known else ""
        return {"after": after, "pages": base64.b64encode(new).decode()}


def marks_of(boundaries: Iterable[Boundary]) -> list[list[object]]:
    """[position, role], with true behind them where the client asked for a checkpoint, and the seconds to keep it."""
    return [
        [b.position, b.role, *([True] if b.kind is BoundaryKind.EXPLICIT else []), *([b.ttl_s] if b.ttl_s else [])]
        for b in boundaries
    ]


def layers_of(shape: ModelShape) -> list[Line]:
    """The parts of a model, as far as a policy can tell: what each costs and keeps."""
    return [
        {
            "kind": layer.kind,
            "flops": layer.cost.per_token,
            "flops_per_position": layer.cost.per_token_per_position,
            **_kept(layer.cache),
        }
        for layer in shape.layers
    ]


def _kept(cache: AttentionSpec | StateSpec | None) -> Line:
    if isinstance(cache, AttentionSpec):
        return {"kv": [cache.num_kv_heads, cache.head_dim, _dtype(cache.dtype)]}
    if isinstance(cache, StateSpec):
        window, state = list(cache.conv_shape), list(cache.state_shape)
        return {"state": [window, state, _dtype(cache.conv_dtype), list(cache.effect)]}
    return {}


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def encoded(line: Line) -> bytes:
    return (json.dumps(line, separators=(",", ":")) + "\n").encode()
