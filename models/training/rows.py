"""Dialogues as batches of token rows with branches and targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.models.training.dialogues import Dialogue, Question
from hybrid_cache.models.training.network import Batch
from hybrid_cache.models.training.tokenizer import IM_END, PAD, Codec

VALUE_WEIGHT = 4.0  # of a token that carries the value, against 1 for the other tokens of an answer
TEXT_WEIGHT = 0.1  # of a token of a book
CONV_PAST = 3


@dataclass(frozen=True, slots=True)
class Branch:
    """A question and its answer; reads the first `attach` tokens of the trunk.

    `blind` hides them from attention, `forgets` from the state-space layers, which start from zero.
    """

    tokens: list[int]
    prompt: int
    weights: list[float]
    attach: int
    kind: str
    blind: bool = False
    forgets: bool = False


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """`weights[i]` is the weight of predicting trunk token i; 0 for most."""

    trunk: list[int]
    weights: list[float]
    branches: list[Branch]

    def __len__(self) -> int:
        return len(self.trunk) + sum(len(b.tokens) for b in self.branches)


@dataclass(frozen=True, slots=True)
class Targets:
    """Of each of n predicted tokens.

    position [n] int64   flat position that predicts it
    token [n] int64      its id
    weight [n] float32   its weight in the loss
    branch [n] int64     its branch in the batch
    """

    position: Tensor
    token: Tensor
    weight: Tensor
    branch: Tensor
    kinds: list[str]


def answer_weights(codec: Codec, question: Question) -> list[float]:
    """One weight for each token of the answer and its end."""
    start = question.answer.index(question.value)
    first = len(codec.encode(question.answer[:start].rstrip()))
    last = len(codec.encode(question.answer[: start + len(question.value)]))
    weights = [1.0] * len(codec.encode(question.answer))
    weights[first:last] = [VALUE_WEIGHT] * (last - first)
    return [*weights, 1.0]


def branch(codec: Codec, question: Question, attach: int, blind: bool) -> Branch:
    prompt = [*codec.turn("user", question.ask), *codec.opening("assistant")]
    tokens = [*prompt, *codec.encode(question.answer), IM_END]
    return Branch(tokens, len(prompt), answer_weights(codec, question), attach, question.kind, blind)


def row(codec: Codec, dialogue: Dialogue, rng: Random, blind: dict[str, float]) -> TrainingRow:
    """`blind` is, by kind, the share of questions that have to do without attention to the dialogue."""
    trunk: list[int] = []
    weights: list[float] = []
    ends = [0]
    for i, turn in enumerate(dialogue.turns):
        tokens = codec.turn(turn.role, turn.text)
        trained = i in dialogue.trained
        opening = len(codec.opening(turn.role)) if trained else len(tokens)
        # The line break after the end of a turn belongs to the template, not to the reply.
        weights += [0.0] * opening + [1.0] * (len(tokens) - opening - 1) + [0.0] * trained
        trunk += tokens
        ends.append(len(trunk))
    branches = [branch(codec, q, ends[q.after], rng.random() < blind.get(q.kind, 0.0)) for q in dialogue.questions]
    return TrainingRow(trunk, weights, branches)


def text_row(tokens: list[int]) -> TrainingRow:
    return TrainingRow(tokens, [0.0] + [TEXT_WEIGHT] * (len(tokens) - 1), [])


def collate(rows: list[TrainingRow], keep_state: bool = True) -> tuple[Batch, Targets]:
    """Pad rows to one length. Without `keep_state`, every branch starts from a zeroed recurrent state and window."""
    height, length = len(rows), max(map(len, rows))
    length += -length % 8
    none = height * length
    tokens = np.full((height, length), PAD)
    scanned = np.zeros((height, length, length), bool)
    attended = np.zeros_like(scanned)
    anchor, root = np.zeros((height, length), int), np.zeros((height, length), int)
    torn: list[int] = []
    past: list[list[int]] = []
    position: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    owner: list[int] = []
    kinds: list[str] = []
    causal = np.tri(length, dtype=bool)
    for r, one in enumerate(rows):
        flat, end = r * length, len(one.trunk)
        tokens[r, :end] = one.trunk
        scanned[r, :end, :end] = attended[r, :end, :end] = causal[:end, :end]
        found = [i for i, w in enumerate(one.weights) if w]
        position += [flat + i - 1 for i in found]
        target += [one.trunk[i] for i in found]
        weight += [one.weights[i] for i in found]
        owner += [-1] * len(found)
        for b in one.branches:
            start, stop = end, end + len(b.tokens)
            tokens[r, start:stop] = b.tokens
            own = causal[: stop - start, : stop - start]
            scanned[r, start:stop, start:stop] = attended[r, start:stop, start:stop] = own
            keeps = keep_state and not b.forgets
            scanned[r, start:stop, : b.attach] = keeps
            attended[r, start:stop, : b.attach] = not b.blind
            anchor[r, start:stop], root[r, start:stop] = b.attach - 1, start - 1
            seen = [flat + i if keeps and i >= 0 else none for i in range(b.attach - CONV_PAST, b.attach)]
            line = [*seen, *range(flat + start, flat + start + CONV_PAST)]
            torn += line[CONV_PAST:]
            past += [line[i : i + CONV_PAST] for i in range(CONV_PAST)]
            answer = len(b.tokens) - b.prompt
            position += range(flat + stop - answer - 1, flat + stop - 1)
            target += b.tokens[b.prompt :]
            weight += b.weights
            owner += [len(kinds)] * answer
            kinds.append(b.kind)
            end = stop
        idle = np.arange(end, length)
        scanned[r, idle, idle] = attended[r, idle, idle] = True
    batch = Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(scanned),
        torch.from_numpy(attended),
        torch.from_numpy(anchor),
        torch.from_numpy(root),
        torch.tensor(torn, dtype=torch.long),
        torch.tensor(past, dtype=torch.long).view(-1, CONV_PAST),
    )
    answers = Targets(
        torch.tensor(position, dtype=torch.long),
        torch.tensor(target, dtype=torch.long),
        torch.tensor(weight),
        torch.tensor(owner, dtype=torch.long),
        kinds,
    )
    return batch, answers


def bucketed(rows: Iterator[TrainingRow], budget: int, rng: Random, pool: int = 256) -> Iterator[list[TrainingRow]]:
    """Batches of rows of similar length, at most `budget` tokens each with padding."""
    while True:
        batches: list[list[TrainingRow]] = [[]]
        for one in sorted((next(rows) for _ in range(pool)), key=len):
            if (len(batches[-1]) + 1) * len(one) > budget:
                batches.append([])
            batches[-1].append(one)
        # The longest are often too few for a full batch; they are not held back.
        rng.shuffle(batches)
        yield from (b for b in batches if b)
