"""Bounds on prompts: how long they may be, and how many boundaries in them are kept."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.errors import ContextTooLong
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt

MAX_BOUNDARIES = 64
FIRST_BOUNDARIES = 16  # when there are more, this many from the front are kept, the rest from the end


def check_length(num_tokens: int, max_tokens: int) -> None:
    """Raises ContextTooLong."""
    if num_tokens > max_tokens:
        raise ContextTooLong(
            f"the messages are {num_tokens} tokens, this model's context leaves room for {max_tokens}",
            param="messages",
        )


def prompt_of_tokens(tokens: Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """A prompt of raw tokens, with a boundary after each run of special tokens other than BOS."""
    ids = np.asarray(tokens, dtype=np.int32)
    closing = np.isin(ids, [i for i in tokenizer.special_ids if i != tokenizer.bos_id])
    ends = np.flatnonzero(closing & ~np.append(closing[1:], False)) + 1
    return limited(Prompt(ids, tuple(Boundary(int(e)) for e in ends)))


def limited(prompt: Prompt) -> Prompt:
    """With at most `MAX_BOUNDARIES`: all marked ones before others, and of those the first and the most recent."""
    boundaries = prompt.boundaries
    if len(boundaries) <= MAX_BOUNDARIES:
        return prompt
    marked = [b for b in boundaries if b.kind is BoundaryKind.EXPLICIT][-MAX_BOUNDARIES:]
    # A tile has room for one checkpoint.
    plain = list({b.position // TILE: b for b in boundaries if b.kind is not BoundaryKind.EXPLICIT}.values())
    room = MAX_BOUNDARIES - len(marked)
    if len(plain) > room:
        first = min(FIRST_BOUNDARIES, room)
        plain = plain[:first] + plain[len(plain) - (room - first) :]
    return replace(prompt, boundaries=tuple(sorted([*marked, *plain], key=lambda b: b.position)))
