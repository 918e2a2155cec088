"""What a request asks of the choreography: its parts, and how they may be put together."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b

import numpy as np

from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import TokenArray

SEAMS = (0, 8, 16, 32, 64)


class Fidelity(StrEnum):
    """What an answer may be made from.

    EXACT      the bits of encoding everything again: only checkpointed prefixes are reused
    RELOCATED  keys and values of messages are moved to other positions; for models of attention layers only
    COMPOSED   and what messages do to recurrent states is composed in the order asked for
    """

    EXACT = "exact"
    RELOCATED = "relocated"
    COMPOSED = "composed"


class Composition(StrEnum):
    """How the effects of neighbouring messages on a state become one, see `compose`."""

    ORDERED = "ordered"
    ROTATIONS = "rotations"
    PERMUTATIONS = "permutations"
    MEAN = "mean"
    LAST = "last"


class Positions(StrEnum):
    """Positions of reused messages: one after the other, or siblings all from the same position on."""

    CONSECUTIVE = "consecutive"
    LEFTMOST = "leftmost"


class Order(StrEnum):
    """Whether adjacent messages may be reordered, where that finds a longer prefix in the cache."""

    GIVEN = "given"
    ANY = "any"


class Encoding(StrEnum):
    """The context in which a new message is encoded: none (from zero), or all that the request places before it."""

    ALONE = "alone"
    IN_PLACE = "in_place"


@dataclass(frozen=True, slots=True)
class Style:
    """How faithful a call is, see `Arrangement`. `encoding` is for messages that are new in a call."""

    fidelity: Fidelity = Fidelity.EXACT
    seam: int = 0
    composition: Composition = Composition.ORDERED
    positions: Positions = Positions.CONSECUTIVE
    order: Order = Order.GIVEN
    encoding: Encoding = Encoding.IN_PLACE


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens of a prompt. Without an id they are computed in place, and not kept as a message.

    keep: whether they may be stored under the id when they are computed in place
    role: only messages of one role are reordered, see `Arrangement.order`
    """

    num_tokens: int
    id: str = ""
    encoding: Encoding = Encoding.IN_PLACE
    keep: bool = True
    role: str = ""


@dataclass(frozen=True)
class Arrangement:
    """How the tokens of a prompt fall into parts, in the order in which the model shall see them.

    order         ANY: adjacent messages of one role are unordered, except the last one, which asks something
                  of the others; used where the fidelity is exact
    seam          tokens at the start of each reused message that are computed again at their new position
    closing       tokens that end the answer's message, which is kept after the request if this is not None
    answer_start  token of the prompt with which the answer's message begins (its header)
    context       ids that the answer's id is made from
    reordered     the order is not the one asked for, see `order`

    Raises RequestError, when made, for a seam that is not offered.
    """

    parts: tuple[Part, ...]
    fidelity: Fidelity
    seam: int = 0
    composition: Composition = Composition.ORDERED
    positions: Positions = Positions.CONSECUTIVE
    order: Order = Order.GIVEN
    closing: tuple[int, ...] | None = None
    answer_start: int = 0
    context: tuple[str, ...] = ()
    reordered: bool = False

    def __post_init__(self) -> None:
        if self.seam not in SEAMS:
            raise RequestError(f"seam is {self.seam}, must be one of {', '.join(map(str, SEAMS))}", param="seam")

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(part.id for part in self.parts if part.id)

    def check(self, num_tokens: int) -> None:
        """Raises RequestError if the parts do not add up to a prompt of `num_tokens`."""
        total = sum(part.num_tokens for part in self.parts)
        if total != num_tokens:
            raise RequestError(f"the parts have {total} tokens, the prompt {num_tokens}", param="choreography")
        if any(part.num_tokens < 1 for part in self.parts):
            raise RequestError("a part has 0 tokens, must have at least 1", param="choreography")


def closed(tokens: TokenArray, closing: tuple[int, ...]) -> TokenArray:
    """Tokens that end with an answer, and what ends its message, of which the answer may hold the first token."""
    rest = closing[1:] if closing and len(tokens) and tokens[-1] == closing[0] else closing
    return np.concatenate([tokens, np.asarray(rest, np.int32)]).astype(np.int32)


def message_id(namespace: str, tokens: TokenArray, context: tuple[str, ...] = ()) -> str:
    """Names a message by its tokens and the messages after which it was encoded; equal for equal ones.

    A namespace is one model's, one adapter's and one tenant's, so no id is ever valid in two of them.
    """
    digest = blake2b(len(context).to_bytes(8, "little"), digest_size=12)
    for part in (namespace.encode(), *(name.encode() for name in context)):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return f"msg_{digest.hexdigest()}"
