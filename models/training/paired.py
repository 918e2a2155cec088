"""Dialogues for comparing models that share a base: what the sender may have, and an answer that can be checked."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np

from hybrid_cache.models.tools.pairs import Example
from hybrid_cache.models.training.dialogues import KINDS, examined
from hybrid_cache.models.training.lessons import Exam
from hybrid_cache.models.training.tokenizer import IM_END, Codec
from hybrid_cache.models.training.variants import RECIPES

MESSAGES = (6, 9)  # fill a tile, and are no longer than what the models were trained on
LEARNED = 0.9  # of the answers are right


def dialogues(folder: Path, num: int, seed: int, own: Path | None = None) -> Iterator[Example]:
    """All kinds of question that the receiver was taught, in turn, with answers as it gives them.

    folder: whose tokenizer is used, of the embedded model's kind   own: of the receiver; None: the embedded model
    The shared context is all messages but the question.
    """
    codec, choose = Codec.load(folder), Random(f"paired {seed}")
    kinds, exam = exam_of(own or folder)
    for number in range(num):
        yield dialogue(codec, kinds[number % len(kinds)], choose, exam)


def dialogue(codec: Codec, kind: str, rng: Random, exam: Exam = examined) -> Example:
    """One with a question of a kind."""
    said, opening = exam(kind, rng, *MESSAGES), codec.opening("assistant")
    question = said.questions[0]
    context = [token for turn in said.turns for token in codec.turn(turn.role, turn.text)]
    answer = codec.turn("assistant", question.answer)[len(opening) :]
    answer = answer[: answer.index(IM_END) + 1]
    tokens = np.array([*context, *codec.turn("user", question.ask), *opening, *answer], np.int32)
    return Example(tokens, len(context), len(answer), kind)


def exam_of(folder: Path) -> tuple[tuple[str, ...], Exam]:
    """Kinds of question that a shipped variant has learned and what makes a dialogue, by its `scores.json`; else those
    of the embedded model.
    """
    path = folder / "scores.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    recipe = RECIPES.get(scores.get("name", ""))
    if recipe is None:
        return KINDS, examined
    return tuple(kind for kind in recipe.kinds if scores["exam"]["kinds"][kind]["whole"] >= LEARNED), recipe.exam
