"""Dialogues for comparing models that share a base: what the sender may have, and an answer that can be checked."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np

from hybrid_cache.models.tools.pairs import Example
from hybrid_cache.models.training.dialogues import KINDS, examined
from hybrid_cache.models.training.tokenizer import IM_END, Codec

MESSAGES = (6, 14)


def dialogues(folder: Path, num: int, seed: int) -> Iterator[Example]:
    """All kinds of question in turn. folder: whose tokenizer is used, of the embedded model's kind

    The shared context is all messages but the question.
    """
    codec, choose = Codec.load(folder), Random(f"paired {seed}")
    for number in range(num):
        yield dialogue(codec, KINDS[number % len(KINDS)], choose)


def dialogue(codec: Codec, kind: str, rng: Random) -> Example:
    """One with a question of a kind."""
    said, opening = examined(kind, rng, *MESSAGES), codec.opening("assistant")
    question = said.questions[0]
    context = [token for turn in said.turns for token in codec.turn(turn.role, turn.text)]
    answer = codec.turn("assistant", question.answer)[len(opening) :]
    answer = answer[: answer.index(IM_END) + 1]
    tokens = np.array([*context, *codec.turn("user", question.ask), *opening, *answer], np.int32)
    return Example(tokens, len(context), len(answer), kind)
