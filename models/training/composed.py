r"""Reading messages that were encoded before: what reuse costs in accuracy, by kind of question.

    python -m hybrid_cache.models.training.composed MODEL_DIR [--adapter DIR] [--seeds 3] [--each 100] [--json FILE]
        [--talk-before 0] [--talk-after 0]

A reader gets keys and values of stored messages, and a recurrent state that is composed of what each message does to
it, in the order of the reader: `h <- P h + S` in every Mamba-2 layer. In the network this is a choice of masks only,
so that gradients go the same way. The first tokens of a message, its *seam*, may be recomputed where it now stands.

    row        _  m m m m m m m  m m m m m   c c c m m  c c m m   q q a a      _ padding that nobody reads
               |  seam  stored   seam stored  \______/  \_____/
    trunk: what the reader reads, in order    heads: what the stored tokens were encoded after; the reader skips it

Every dialogue holds one question, at its end. It is right when the greedy answer is the expected one word for word.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models import adapters
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.dialogues import KINDS, NAMES, SMALL_TALK, THINGS, Dialogue, Turn, examined
from hybrid_cache.models.training.tokenizer import PAD, Codec

Encoded = Literal["in place", "alone", "in context", "in order"]
State = Literal["ordered", "last", "mean", "zero"]
CONV_PAST = rw.CONV_PAST
MOST_CONTEXT = 4  # messages
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a message was encoded after, how many of its tokens are recomputed, and what state the reader starts from.

    `seam` counts tokens at the start of a message, `tail` tokens at its end.
    "in place" is re-encoding. "in context" is after a few other messages, "in order" after those before it in the
    original order of the dialogue, which the reader may not keep. A state is composed in the order of the
    reader, that of the last message only, the mean of all, or zero, which is the control.
    """

    encoded: Encoded = "in place"
    seam: int = 0
    state: State = "ordered"
    tail: int = 0

    @property
    def name(self) -> str:
        seam = f", seam {self.seam}" if self.seam else ""
        tail = f", tail {self.tail}" if self.tail else ""
        return f"{self.encoded}{seam}{tail}" + ("" if self.state == "ordered" else f", state {self.state}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A message, and the tokens that it was encoded after; None is in place, after all before it in the row."""

    tokens: tuple[int, ...]
    context: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ReuseRow:
    """Messages in the order of the reader, and questions that attach to their tokens."""

    messages: tuple[Stored, ...]
    branches: tuple[rw.Branch, ...]
    seam: int = 0
    state: State = "ordered"

    def __len__(self) -> int:
        return (
            1
            + sum(len(m.tokens) + len(self.head(m)) for m in self.messages)
            + sum(len(b.tokens) for b in self.branches)
        )

    def recomputed(self, message: Stored) -> int:
        """How many of its tokens are computed where it stands."""
        return len(message.tokens) if message.context is None else min(self.seam, len(message.tokens))

    def head(self, message: Stored) -> tuple[int, ...]:
        """What its stored tokens were encoded after: the context, and the tokens that the seam replaces."""
        seam = self.recomputed(message)
        return () if seam == len(message.tokens) else ((message.context or ()) + message.tokens[:seam])


class _Canvas:
    """Masks and tokens of a batch while its rows are laid out."""

    def __init__(self, height: int, length: int) -> None:
        self.length, self.none = length, height * length
        self.tokens = np.full((height, length), PAD)
        self.scanned = np.zeros((height, length, length), bool)
        self.attended = np.zeros_like(self.scanned)
        self.scanned[:, range(length), range(length)] = self.attended[:, range(length), range(length)] = True
        self.gain: np.ndarray | None = None
        self.anchor, self.root = np.zeros((height, length), int), np.zeros((height, length), int)
        self.torn: list[int] = []
        self.past: list[list[int]] = []

    def read(self, r: int, start: int, stop: int, first: int, last: int) -> None:
        """Tokens from `start` read all from `first` to before `last`, and then each other."""
        for mask in (self.scanned, self.attended):
            mask[r, start:stop, first:last] = True
            mask[r, start:stop, start:stop] |= np.tri(stop - start, dtype=bool)

    def tear(self, r: int, start: int, stop: int, before: Sequence[int]) -> None:
        """The tokens before `start` are not those packed there, but `before`, oldest first."""
        flat = r * self.length
        line = [*[self.none] * CONV_PAST, *(flat + i for i in before)][-CONV_PAST:]
        line += range(flat + start, flat + min(start + CONV_PAST, stop))
        self.torn += line[CONV_PAST:]
        self.past += [line[i : i + CONV_PAST] for i in range(len(line) - CONV_PAST)]

    def batch(self) -> net.Batch:
        return net.Batch(
            torch.from_numpy(self.tokens),
            torch.from_numpy(self.scanned),
            torch.from_numpy(self.attended),
            torch.from_numpy(self.anchor),
            torch.from_numpy(self.root),
            torch.tensor(self.torn, dtype=torch.long),
            torch.tensor(self.past, dtype=torch.long).view(-1, CONV_PAST),
            None if self.gain is None else torch.from_numpy(self.gain),
        )


def _lay_messages(canvas: _Canvas, r: int, row: ReuseRow) -> int:
    """-> the first free position. Padding at 0 gives the first message a token before it."""
    start, end = 1, 1 + sum(len(m.tokens) for m in row.messages)
    for message in row.messages:
        stop, kept = start + len(message.tokens), start + row.recomputed(message)
        canvas.tokens[r, start:stop] = message.tokens
        canvas.read(r, start, kept, 1, start)
        if start <= CONV_PAST and kept > start:
            canvas.tear(r, start, kept, range(1, start))
        if kept < stop:
            head = row.head(message)
            first, end = end, end + len(head)
            canvas.tokens[r, first:end] = head
            canvas.read(r, first, end, first, first)
            canvas.tear(r, first, end, ())
            # Its last token is where the stored ones go on: the decay along the trunk, counted back from there.
            canvas.anchor[r, first:end], canvas.root[r, first:end] = kept - 1, end - 1
            canvas.read(r, kept, stop, first, end)
            canvas.tear(r, kept, stop, range(first, end))
        start = stop
    return end


def _lay_branch(canvas: _Canvas, r: int, row: ReuseRow, branch: rw.Branch, start: int) -> None:
    stop, upto = start + len(branch.tokens), 1 + branch.attach
    canvas.tokens[r, start:stop] = branch.tokens
    canvas.read(r, start, stop, 1, upto)
    canvas.attended[r, start:stop, 1:upto] = not branch.blind
    canvas.anchor[r, start:stop], canvas.root[r, start:stop] = upto - 1, start - 1
    window: Sequence[int] = range(max(1, upto - CONV_PAST), upto)
    match row.state:
        case "ordered":
            pass
        case "last":
            canvas.scanned[r, start:stop, 1 : upto - len(row.messages[-1].tokens)] = False
        case "zero":
            canvas.scanned[r, start:stop, 1:upto] = False
            window = ()
        case "mean":
            _share(canvas, r, row, start, stop)
    canvas.tear(r, start, stop, window)


def _share(canvas: _Canvas, r: int, row: ReuseRow, start: int, stop: int) -> None:
    """Each of n messages, encoded alone, ends where the reader starts, and counts 1/n."""
    assert all(m.context == () for m in row.messages)
    if canvas.gain is None:
        canvas.gain = np.ones(canvas.scanned.shape, np.float32)
    first, end = 1, 1 + sum(len(m.tokens) for m in row.messages)
    canvas.gain[r, start:stop, 1:end] = 1 / len(row.messages)
    for message in row.messages:
        last = first + len(message.tokens)
        canvas.anchor[r, first:last], canvas.root[r, first:last] = end - 1, last - 1
        first = last


def collate(rows: Sequence[ReuseRow]) -> tuple[net.Batch, rw.Targets]:
    """Pad rows to one length."""
    length = max(map(len, rows))
    canvas = _Canvas(len(rows), length + -length % 8)
    position: list[int] = []
    token: list[int] = []
    weight: list[float] = []
    owner: list[int] = []
    kinds: list[str] = []
    for r, row in enumerate(rows):
        end = _lay_messages(canvas, r, row)
        for b in row.branches:
            _lay_branch(canvas, r, row, b, end)
            end += len(b.tokens)
            last, answer = r * canvas.length + end - 1, len(b.tokens) - b.prompt
            position += range(last - answer, last)
            token += b.tokens[b.prompt :]
            weight += b.weights
            owner += [len(kinds)] * answer
            kinds.append(b.kind)
    targets = rw.Targets(
        torch.tensor(position, dtype=torch.long),
        torch.tensor(token, dtype=torch.long),
        torch.tensor(weight),
        torch.tensor(owner, dtype=torch.long),
        kinds,
    )
    return canvas.batch(), targets


def _last_place(said: list[str], ask: str) -> str | None:
    (about,) = set(re.findall(r"\w+", ask)) & {*THINGS, *NAMES}
    found = [s for s in said if re.search(rf"\b{about}\b", s)]
    return str(re.findall(r"\w+", found[-1].replace(" now.", ""))[-1])


def _held(said: list[str], ask: str) -> str | None:
    """None where there would be fewer than 0 or more than 6 in the box, or changes before there is a first number."""
    number: int | None = None
    for sentence in said:
        if found := re.search(r"\d+", sentence):
            if re.search(r"\b(have|has)\b", sentence):
                number = int(found[0]) if number is None else 99
            elif number is not None:
                number += -int(found[0]) if re.search(r"\b(take|takes|remove)\b", sentence) else int(found[0])
            if number is None or not 0 <= number <= 6:
                return None
    return None if number is None else str(number)


def _floor(said: list[str], ask: str) -> str | None:
    """None where the lift would leave the floors 1 to 6, be sent to where it is, or move before it is anywhere."""
    floor: int | None = None
    for sentence in said:
        if place := re.search(r"floor (\d)", sentence):
            if floor == int(place[1]) or (floor is not None and re.search(r"\b(is|starts) on\b", sentence)):
                return None
            floor = int(place[1])
        elif step := re.search(r"(?:(up|down) )?(\d) floors?(?: (up|down))?", sentence):
            if floor is None:
                return None
            floor += int(step[2]) * (1 if "up" in step.groups() else -1)
            if not 1 <= floor <= 6:
                return None
    return None if floor is None else str(floor)


TRUTH: dict[str, Callable[[list[str], str], str | None]] = {"last": _last_place, "count": _held, "order": _floor}


def truth(kind: str, turns: Sequence[Turn], ask: str, value: str) -> str | None:
    """The value after these turns, or None where they make no sense; a code does not depend on the order."""
    said = [s + "." for t in turns if t.role == "user" for s in t.text.rstrip(".").split(". ")]
    return TRUTH[kind](said, ask) if kind in TRUTH else value


def reordered(dialogue: Dialogue, rng: Random, tries: int = 200) -> list[int] | None:
    """Another order of the turns in which the dialogue makes sense; None if none was found.

    The system turn stays first, and an acknowledgement stays behind what it acknowledges.
    """
    question = dialogue.questions[0]
    units: list[list[int]] = []
    for i, turn in enumerate(dialogue.turns):
        if turn.role == "assistant":
            units[-1].append(i)
        else:
            units.append([i])
    fixed = [units.pop(0)] if dialogue.turns[0].role == "system" else []
    for _ in range(tries):
        order = [i for unit in (*fixed, *rng.sample(units, len(units))) for i in unit]
        turns = [dialogue.turns[i] for i in order]
        if order != sorted(order) and truth(question.kind, turns, question.ask, question.value) is not None:
            return order
    return None


@dataclass(frozen=True, slots=True)
class Case:
    """A dialogue in its original order, and the order in which the reader reads it."""

    dialogue: Dialogue
    order: tuple[int, ...]
    others: tuple[Turn, ...]  # of a dialogue that the reader does not read

    @property
    def read(self) -> Dialogue:
        """As the reader reads it, with the answer that is right then."""
        turns = tuple(self.dialogue.turns[i] for i in self.order)
        q = self.dialogue.questions[0]
        value = truth(q.kind, turns, q.ask, q.value)
        assert value is not None
        return Dialogue(turns, (replace(q, answer=q.answer.replace(q.value, value), value=value),))


def context_of(rng: Random, turns: Sequence[Turn], most: int = MOST_CONTEXT) -> list[Turn]:
    """1 to `most` of the turns, in any order."""
    return rng.sample(list(turns), rng.randint(1, min(most, len(turns))))


def stored(codec: Codec, context: Sequence[Turn] | None, turn: Turn) -> Stored:
    def tokens(turns: Sequence[Turn]) -> tuple[int, ...]:
        return tuple(t for turn in turns for t in codec.turn(turn.role, turn.text))

    return Stored(tokens([turn]), None if context is None else tokens(context))


def parted(message: Stored, tail: int) -> list[Stored]:
    """A message and its last tokens, which are computed where it stands."""
    if not tail or message.context is None:
        return [message]
    start, end = message.tokens[:-tail], message.tokens[-tail:]
    return [Stored(start, message.context), Stored(end)] if start else [Stored(end)]


def row_of(codec: Codec, given: Case, reuse: Reuse, rng: Random) -> ReuseRow:
    turns, read = given.dialogue.turns, given.read

    def context(i: int) -> Sequence[Turn] | None:
        match reuse.encoded:
            case "in place":
                return None
            case "alone":
                return ()
            case "in order":
                return turns[:i]
            case "in context":
                return context_of(rng, [*turns[:i], *turns[i + 1 :], *given.others])

    assert not reuse.tail or reuse.state in ("ordered", "zero")  # the others count messages
    messages = tuple(m for i in given.order for m in parted(stored(codec, context(i), turns[i]), reuse.tail))
    length = sum(len(m.tokens) for m in messages)
    branch = rw.branch(codec, read.questions[0], length, blind=False)
    return ReuseRow(messages, (branch,), reuse.seam, reuse.state)


ORIGINAL_ORDER = (
    Reuse(),
    Reuse(state="zero"),
    Reuse("alone"),
    Reuse("alone", seam=8),
    Reuse("alone", seam=16),
    Reuse("alone", seam=32),
    Reuse("alone", tail=8),
    Reuse("alone", tail=16),
    Reuse("alone", state="last"),
    Reuse("alone", state="mean"),
    Reuse("alone", state="zero"),
    Reuse("in context"),
    Reuse("in context", seam=8),
    Reuse("in context", seam=16),
    Reuse("in context", state="zero"),
)
NEW_ORDER = (
    Reuse(),
    Reuse("alone"),
    Reuse("in order"),
    Reuse("in order", seam=8),
    Reuse("in order", state="zero"),
)


@dataclass(frozen=True, slots=True)
class Score:
    """Share of `num` dialogues answered right, read in the original order or in a new one."""

    kind: str
    seed: int
    anew: bool  # in a new order
    reuse: Reuse
    num: int
    right: float


def cases(kind: str, seed: int, num: int, anew: bool) -> list[Case]:
    """The dialogues of `evaluate` for this seed; for a new order, the first that make sense in one."""
    rng, mixed = Random(f"evaluation {seed} {kind}"), Random(f"composed {seed} {kind}")
    found: list[Case] = []
    while len(found) < num:
        dialogue = examined(kind, rng)
        order = reordered(dialogue, mixed) if anew else list(range(len(dialogue.turns)))
        if order is not None:
            found.append(Case(dialogue, tuple(order), examined(mixed.choice(KINDS), mixed).turns))
    return found


def talkative(case: Case, before: int, after: int, rng: Random) -> Case:
    """With `before` and `after` sentences of small talk around each message of the user."""

    def padded(turn: Turn) -> Turn:
        if turn.role != "user":
            return turn
        around = [rng.choice(SMALL_TALK) for _ in range(before + after)]
        return Turn(turn.role, " ".join([*around[:before], turn.text, *around[before:]]))

    return replace(case, dialogue=replace(case.dialogue, turns=tuple(map(padded, case.dialogue.turns))))


def batched(rows: Sequence[ReuseRow], budget: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, at most `budget` tokens together with padding."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


@torch.no_grad()
def hits(network: net.Network, rows: Sequence[ReuseRow]) -> list[bool]:
    """For each row whether greedy decoding writes all of its answers."""
    marks = [True] * len(rows)
    for chosen in batched(rows, BATCH_TOKENS):
        batch, targets = collate([rows[i] for i in chosen])
        hidden = network.hidden(batch).flatten(0, 1).index_select(0, targets.position)
        wrong = network.logits(hidden).argmax(-1) != targets.token
        for r in (targets.position[wrong] // batch.tokens.shape[1]).tolist():
            marks[chosen[r]] = False
    return marks


def score(
    network: net.Network,
    codec: Codec,
    kind: str,
    seed: int,
    each: int,
    anew: bool,
    reuse: Reuse,
    talk: tuple[int, int] = (0, 0),
) -> Score:
    """talk: sentences of small talk before and after what each message says"""
    rng, talking = Random(f"context {seed} {kind}"), Random(f"small talk {seed} {kind}")
    asked = [talkative(case, *talk, talking) for case in cases(kind, seed, each, anew)]
    marks = hits(network, [row_of(codec, case, reuse, rng) for case in asked])
    return Score(kind, seed, anew, reuse, len(marks), sum(marks) / len(marks))


def evaluate(
    network: net.Network,
    codec: Codec,
    seeds: Sequence[int],
    each: int,
    original_order: Sequence[Reuse] = ORIGINAL_ORDER,
    new_order: Sequence[Reuse] = NEW_ORDER,
    on_score: Callable[[Score], None] = lambda _: None,
    talk: tuple[int, int] = (0, 0),
) -> list[Score]:
    scores = []
    for is_anew, reuses in ((False, original_order), (True, new_order)):
        for reuse in reuses:
            for kind in KINDS:
                for seed in seeds:
                    scores.append(score(network, codec, kind, seed, each, is_anew, reuse, talk))
                    on_score(scores[-1])
    return scores


@torch.no_grad()
def adapted(folder: Path, adapter: str | Path, dtype: torch.dtype = torch.bfloat16) -> net.Network:
    """The network with an adapter merged, in fp32 on weights rounded to a dtype, by default as they are served.

    Raises ModelError if the adapter does not fit.
    """
    network, changes = net.load(folder), adapters.load(adapter)
    if changes.config.invocation:
        raise UnsupportedModel(f"adapter {adapter} is activated by a prompt, and cannot be merged")
    weights = dict(network.named_parameters())
    for name in changes.weights:
        if name not in weights:
            raise ModelError(f"adapter {adapter}: {folder} has no weight {name}")
        weights[name].copy_(changes.merged(name, weights[name]).to(dtype))
    return network


def means(scores: Sequence[Score]) -> dict[tuple[bool, Reuse, str], float]:
    """Over the seeds, in percent."""
    found: dict[tuple[bool, Reuse, str], list[float]] = defaultdict(list)
    for s in scores:
        found[s.anew, s.reuse, s.kind].append(100 * s.right)
    return {key: sum(values) / len(values) for key, values in found.items()}


def table(scores: Sequence[Score]) -> str:
    """A line for each way of reuse: percent right by kind, over the seeds."""
    lines = ["| order | encoded | " + " | ".join(KINDS) + " |", "|---|---|" + "---:|" * len(KINDS)]
    mean = means(scores)
    for anew, reuse in dict.fromkeys((s.anew, s.reuse) for s in scores):
        cells = " | ".join(f"{mean[anew, reuse, kind]:.1f}" for kind in KINDS)
        lines.append(f"| {'new' if anew else 'as told'} | {reuse.name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", help="a folder in PEFT's layout, or the name of one that ships")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=601, help="take others once these have been looked at")
    parser.add_argument("--each", type=int, default=100, help="dialogues for each kind and seed")
    parser.add_argument("--talk-before", type=int, default=0, help="sentences of small talk at the start of messages")
    parser.add_argument("--talk-after", type=int, default=0, help="the same at their end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    network = adapted(given.model, given.adapter) if given.adapter else net.load(given.model)
    talk, codec = (given.talk_before, given.talk_after), Codec.load(given.model)
    scores = evaluate(network, codec, seeds, given.each, on_score=lambda s: print(s, flush=True), talk=talk)
    print(table(scores))
    if given.json:
        given.json.write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
