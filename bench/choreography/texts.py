"""Texts for the workflows: real ones where a folder holds them, otherwise generated dialogues.

    GSM8K       questions and four models' own answers to each (Cobbe et al. 2021): example_model_solutions*
    Who&When    logs of several agents (Zhang et al. 2025): who_and_when*
    RAGPulse    which passages a service retrieved together, in which order, and their lengths: 0_trace*, 2_passages*

Texts are cut to the length asked for; those that are shorter go on with the next one of the same source.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TypeVar

from hybrid_cache.bench.traces.records import read_records
from hybrid_cache.models.training.dialogues import KINDS, scenario

FILES = ("example_model_solutions*", "who_and_when*", "0_trace*")
GENERATED = "generated dialogues"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
HOT = 10  # passages: requests that hold none of the most used ones are left out
PASSAGES = 24  # of the synthetic retrieval
FEWEST_TURNS = 8
CALCULATOR = re.compile(r"<<[^>]*>>")

T = TypeVar("T")

Found = tuple[tuple[int, int], ...]  # (passage, tokens) in the order of a prompt


@dataclass(frozen=True, slots=True)
class Texts:
    """Where texts come from. Each text is a stream of sentences that does not end."""

    note: str
    question: Callable[[int], Iterator[str]]  # of a task
    answer: Callable[[int, int], Iterator[str]]  # to a task, by whom
    turn: Callable[[int], Iterator[str]]  # of a debate
    passage: Callable[[int], Iterator[str]]
    retrievals: Callable[[int, int], Sequence[Found]]  # how many, mean tokens of a passage


class Writer:
    """Texts of a length in tokens."""

    def __init__(self, texts: Texts, num_tokens: Callable[[str], int]) -> None:
        self.texts = texts
        self._num_tokens = num_tokens

    def question(self, task: int, most: int) -> str:
        return self.cut(self.texts.question(task), most)

    def answer(self, task: int, who: int, most: int) -> str:
        return self.cut(self.texts.answer(task, who), most)

    def turn(self, number: int, most: int) -> str:
        return self.cut(self.texts.turn(number), most)

    def passage(self, name: int, most: int) -> str:
        return self.cut(self.texts.passage(name), most)

    def retrievals(self, number: int, tokens: int) -> Sequence[Found]:
        return self.texts.retrievals(number, tokens)

    def cut(self, sentences: Iterator[str], most: int) -> str:
        """The longest beginning of whole words, at least one, that has at most `most` tokens."""
        words: list[str] = []
        while self._num_tokens(" ".join(words)) <= most:
            words += next(sentences).split()
        taken = bisect_right(range(1, len(words)), most, key=lambda n: self._num_tokens(" ".join(words[:n])))
        return " ".join(words[: max(1, taken)])


# Generated


def generated(seed: int) -> Texts:
    def talk(*place: object) -> Iterator[str]:
        rng = Random(" ".join(map(str, (seed, *place))))
        while True:
            about = scenario(rng.choice(KINDS), rng)
            for _ in range(4):
                yield about.tell(rng)

    return Texts(
        GENERATED,
        question=lambda task: talk("question", task),
        answer=lambda task, who: talk("answer", task, who),
        turn=lambda number: talk("turn", number),
        passage=lambda name: talk("passage", name),
        retrievals=lambda number, tokens: drawn(number, tokens, Random(f"{seed} retrieval")),
    )


def drawn(number: int, tokens: int, rng: Random) -> list[Found]:
    """Three to six passages for each request; the n-th is drawn as often as 1 / n."""
    lengths = [max(8, round(tokens * rng.uniform(0.5, 1.5))) for _ in range(PASSAGES)]
    weights, found = [1 / (n + 1) for n in range(PASSAGES)], []
    for _ in range(number):
        wanted, chosen = rng.randint(3, 6), list[int]()
        while len(chosen) < wanted:
            (name,) = rng.choices(range(PASSAGES), weights)
            chosen += [name] if name not in chosen else []
        found.append(tuple((name, lengths[name]) for name in chosen))
    return found


# Real


def texts_from(folder: Path, seed: int) -> Texts:
    """Texts of the files below a folder; what is not there is generated."""
    texts, rng, notes = generated(seed), Random(f"{seed} data"), list[str]()
    for pattern, use in zip(FILES, (use_solutions, use_logs, use_trace), strict=True):
        file = min(folder.rglob(pattern), default=None)
        if file is not None:
            texts = use(texts, file, rng)
            notes.append(texts.note)
    return replace(texts, note="; ".join(notes) or GENERATED)


def use_solutions(texts: Texts, file: Path, rng: Random) -> Texts:
    """Tasks of GSM8K; four solvers, more are those four on other tasks."""
    tasks = list(read_records(file))
    rng.shuffle(tasks)

    def answer(task: int, who: int) -> Iterator[str]:
        solver, first = SOLVERS[who % len(SOLVERS)], task + who // len(SOLVERS)
        return (CALCULATOR.sub("", record.record(solver).text("solution")) for record in around(tasks, first))

    return replace(
        texts,
        note="GSM8K: questions, and answers of four models",
        question=lambda task: (record.text("question") for record in around(tasks, task)),
        answer=answer,
        passage=lambda name: (record.text("ground_truth") for record in around(tasks, 7 * name)),
    )


def use_logs(texts: Texts, file: Path, rng: Random) -> Texts:
    logs = [log.records("history") for log in read_records(file)]
    said = [entry.text("content") for entry in rng.choice([log for log in logs if len(log) >= FEWEST_TURNS])]
    said = [text for text in said if text.strip()]
    return replace(texts, note="Who&When: turns of one log", turn=lambda number: around(said, number))


def use_trace(texts: Texts, file: Path, rng: Random) -> Texts:
    """Requests in order of time that hold one of the passages used most."""
    (table,) = file.parent.glob("2_passages*")
    lengths = {record.integer("passage_id"): record.integer("token_length") for record in read_records(table)}
    records = sorted(read_records(file), key=lambda record: record.time_in_text("timestamp"))
    asked = [tuple(record.record("hash_ids").integers("passages_ids").tolist()) for record in records]
    hot = {name for name, _ in Counter(name for names in asked for name in names).most_common(HOT)}
    asked = [names for names in asked if hot & set(names)]
    start = rng.randrange(len(asked))

    def retrievals(number: int, tokens: int) -> list[Found]:
        chosen = list(islice(around(asked, start), number))
        mean = fmean(lengths[name] for names in chosen for name in names)
        sizes = {name: max(8, round(tokens * lengths[name] / mean)) for names in chosen for name in names}
        return [tuple((name, sizes[name]) for name in names) for names in chosen]

    note = f"RAGPulse: requests that hold one of the {HOT} passages used most, lengths scaled"
    return replace(texts, note=note, retrievals=retrievals)


def around(entries: Sequence[T], start: int) -> Iterator[T]:
    """All entries from one on, again and again."""
    return (entries[i % len(entries)] for i in count(start))
