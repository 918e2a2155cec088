"""A conversation put together: pieces of it, and what ends in them, to one prompt and its arrangement."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Part, Style
from hybrid_cache.choreography.book import Message
from hybrid_cache.tokens import Boundary, Prompt, TokenArray


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a conversation: those of a message that may be reused, or others."""

    tokens: TokenArray
    boundaries: tuple[Boundary, ...] = ()  # in this piece, their positions counted from its first token
    message: Message | None = None

    def standing_for(self, message: Message) -> "Piece":
        """The tokens of `message` instead of these, with boundaries at the same distance from its end."""
        more = len(message.tokens) - len(self.tokens)
        moved = tuple(replace(b, position=b.position + more) for b in self.boundaries)
        return Piece(message.tokens, moved, message)


def joined(pieces: Sequence[Piece]) -> Prompt:
    """The prompt that the pieces make up."""
    starts = accumulate((len(piece.tokens) for piece in pieces), initial=0)
    boundaries = [
        replace(b, position=start + b.position)
        for start, piece in zip(starts, pieces, strict=False)
        for b in piece.boundaries
    ]
    return Prompt(np.concatenate([piece.tokens for piece in pieces]), tuple(boundaries))


def arranged(
    pieces: Sequence[Piece], opening: Piece, style: Style, closing: tuple[int, ...] | None
) -> tuple[Prompt, Arrangement]:
    """The prompt of `pieces` and the opening of an answer, and how its messages may be reused.

    opening  may have no tokens
    closing  as in `Arrangement`
    """
    prompt = joined([*pieces, opening])
    parts = [_part(piece, pieces[:i]) for i, piece in enumerate(pieces)]
    if len(opening.tokens):
        parts.append(Part(len(opening.tokens)))
    arrangement = Arrangement(
        tuple(parts),
        style.fidelity,
        style.seam,
        style.composition,
        style.positions,
        style.order,
        closing=closing,
        answer_start=len(prompt.tokens) - len(opening.tokens),
        context=tuple(piece.message.id for piece in pieces if piece.message),
    )
    return prompt, arrangement


def context_of(before: Sequence[Piece]) -> tuple[str, ...]:
    """The ids of the messages in `before`; none if some piece is no message."""
    ids = tuple(piece.message.id for piece in before if piece.message)
    return ids if len(ids) == len(before) else ()


def _part(piece: Piece, before: Sequence[Piece]) -> Part:
    """A message with a context is stored only where it follows that context."""
    message = piece.message
    if message is None:
        return Part(len(piece.tokens))
    encoding = Encoding.IN_PLACE if message.context else Encoding.ALONE
    keep = context_of(before) == message.context
    return Part(len(message.tokens), message.id, encoding, keep, message.role)
