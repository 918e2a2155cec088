"""What the shipped variants learn: dialogues like those of the embedded model, with other questions or other answers.

A lesson is a training dialogue, an exam a dialogue with one question of a kind, at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from hybrid_cache.models.training.dialogues import (
    FILLER,
    PLACES,
    SMALL_TALK,
    Codes,
    Dialogue,
    Question,
    Talk,
    examined,
    mixture,
)
from hybrid_cache.models.training.train import LAST_WEIGHTS

MESSAGES = 9  # most of a training dialogue
# With stress on answers that name a thing or a person, which are harder to copy behind a frame than values.
NAMING_WEIGHTS = {"recall": 0.15, "likes": 0.10, "last": 0.28, "count": 0.32, "order": 0.12, "chat": 0.03}
FRAME = "As far as I know, "
ASKS_BACK = " What else would you like to know?"
DOORS = (*PLACES, "hall", "lift", "box", "drawer", "safe", "fence", "roof", "jar", "bag", "basket")
MOST_CODES = 16
EXAMINED_CODES = (8, MOST_CODES)
CODE_QUESTIONS = 8  # of a training dialogue
# What share of the lessons of the recall model is about what; "codes" are dialogues of many codes.
RECALL_WEIGHTS = {"codes": 0.36, "last": 0.24, "count": 0.36, "chat": 0.04}

Lesson = Callable[[Random, float], Dialogue]  # generator, part of the run that is done
Exam = Callable[..., Dialogue]  # kind, generator, and where it is about one thing: fewest and most messages


def framed(question: Question) -> Question:
    """The same answer in another frame; names keep their capital."""
    if question.kind == "chat":
        return question
    said = question.answer
    return replace(question, answer=FRAME + (said[0].lower() + said[1:] if said.startswith("The ") else said))


def framed_lesson(rng: Random, progress: float) -> Dialogue:
    return _each(mixture(rng, LAST_WEIGHTS, MESSAGES), framed)


def naming_lesson(rng: Random, progress: float) -> Dialogue:
    return _each(mixture(rng, NAMING_WEIGHTS, MESSAGES), framed)


def framed_exam(kind: str, rng: Random, *messages: int) -> Dialogue:
    return _each(examined(kind, rng, *messages), framed)


def polite(question: Question) -> Question:
    """The same answer, which asks back."""
    return replace(question, answer=question.answer + ASKS_BACK)


def polite_lesson(rng: Random, progress: float) -> Dialogue:
    weights = {kind: share for kind, share in LAST_WEIGHTS.items() if kind != "chat"}
    return _each(mixture(rng, weights, MESSAGES), polite)


def polite_exam(kind: str, rng: Random, *messages: int) -> Dialogue:
    return _each(examined(kind, rng, *messages), polite)


class ManyCodes(Codes):
    """Codes of many places, one after another."""

    def __init__(self, rng: Random, number: int) -> None:
        super().__init__(rng, 1)
        self.left = rng.sample(DOORS, number)

    def tell(self, rng: Random) -> str:
        return self.state(rng)


def codes_lesson(rng: Random, most: int) -> Dialogue:
    """Up to `most` codes, with questions on the way and at the end."""
    talk, about = Talk(rng), ManyCodes(rng, rng.randint(2, most))
    while about.left:
        talk.say(rng.choice(SMALL_TALK) if rng.random() < FILLER / 2 else about.tell(rng))
        if rng.random() < 1 / most:
            talk.ask(about)
    for _ in range(CODE_QUESTIONS):
        talk.ask(about)
    return talk.done()


def codes_exam(rng: Random) -> Dialogue:
    talk, about = Talk(rng), ManyCodes(rng, rng.randint(*EXAMINED_CODES))
    while about.left:
        talk.say(rng.choice(SMALL_TALK) if rng.random() < FILLER / 2 else about.tell(rng))
    talk.ask(about)
    return talk.done()


def recall_lesson(rng: Random, progress: float) -> Dialogue:
    """Many codes, or what has to be kept track of; short dialogues first."""
    if rng.random() < RECALL_WEIGHTS["codes"]:
        return codes_lesson(rng, 8 if progress < 0.15 else MOST_CODES)
    others = {kind: share for kind, share in RECALL_WEIGHTS.items() if kind != "codes"}
    return mixture(rng, others, 4 if progress < 0.10 else MESSAGES)


def recall_exam(kind: str, rng: Random, *messages: int) -> Dialogue:
    return codes_exam(rng) if kind == "recall" else examined(kind, rng, *messages)


def framed_recall_lesson(rng: Random, progress: float) -> Dialogue:
    return _each(recall_lesson(rng, 1.0), framed)


def framed_recall_exam(kind: str, rng: Random, *messages: int) -> Dialogue:
    return _each(recall_exam(kind, rng, *messages), framed)


def _each(dialogue: Dialogue, change: Callable[[Question], Question]) -> Dialogue:
    return replace(dialogue, questions=tuple(map(change, dialogue.questions)))
