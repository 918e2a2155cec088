"""Right answers by kind of question, with two controls: states zeroed, and attention blind to the dialogue.

Each dialogue holds one question, at its end. The dense network reads dialogue, question and expected answer in one
pass: the answer is right word for word when each of its tokens, and its end, is the first choice after those before
it, which is when greedy decoding writes it. Its value is right when the tokens of the value are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.lessons import Exam
from hybrid_cache.models.training.tokenizer import Codec

ROWS = 16  # in a batch
NEVER = Random(0)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of right answers over `num` dialogues: word for word, of the value, of the value under each control."""

    kind: str
    num: int
    whole: float
    value: float
    zeroed: float
    blind: float


Before = Callable[[net.Batch], None]  # is called with each batch before the network reads it


def score(
    network: net.Network, codec: Codec, exam: Exam, kind: str, seed: int, num: int, before: Before = lambda batch: None
) -> Score:
    """Of `num` fresh dialogues; the same seed gives the same ones."""
    rng = Random(f"evaluation {seed} {kind}")
    rows = sorted((rw.row(codec, exam(kind, rng), NEVER, {}) for _ in range(num)), key=len)
    whole, value = _marks(network, rows, before)
    _, zeroed = _marks(network, [under(row, forgets=True) for row in rows], before)
    _, blind = _marks(network, [under(row, blind=True) for row in rows], before)
    return Score(kind, num, *(float(marks.double().mean()) for marks in (whole, value, zeroed, blind)))


def joined(scores: Sequence[Score]) -> Score:
    """Of one kind, over several seeds of as many dialogues each."""
    means = (sum(getattr(s, name) for s in scores) / len(scores) for name in ("whole", "value", "zeroed", "blind"))
    return Score(scores[0].kind, sum(s.num for s in scores), *means)


def table(scores: Sequence[Score]) -> str:
    lines = ["| kind | word for word | value | states zeroed | attention blind |", "|---|---:|---:|---:|---:|"]
    for s in scores:
        shares = (f"{100 * share:.1f}" for share in (s.whole, s.value, s.zeroed, s.blind))
        lines.append(f"| {s.kind} | {' | '.join(shares)} |")
    return "\n".join(lines)


def under(row: rw.TrainingRow, *, forgets: bool = False, blind: bool = False) -> rw.TrainingRow:
    """The row with its questions under a control."""
    return replace(row, branches=[replace(b, forgets=forgets, blind=blind) for b in row.branches])


@torch.no_grad()
def _marks(network: net.Network, rows: Sequence[rw.TrainingRow], before: Before) -> tuple[Tensor, Tensor]:
    """Whether each answer is right word for word, and in its value; [rows] bool each."""
    found = []
    for start in range(0, len(rows), ROWS):
        batch, targets = rw.collate(list(rows[start : start + ROWS]))
        before(batch)
        hidden = network.hidden(batch).flatten(0, 1).index_select(0, targets.position)
        wrong = network.logits(hidden).argmax(-1) != targets.token
        is_value = targets.weight == rw.VALUE_WEIGHT
        found.append(torch.stack([_right(wrong, targets), _right(wrong & is_value, targets)]))
    whole, value = torch.cat(found, dim=1)
    return whole, value


def _right(wrong: Tensor, targets: rw.Targets) -> Tensor:
    """By branch, whether none of its tokens is wrong; wrong [targets] bool."""
    right = torch.ones(len(targets.kinds), dtype=torch.bool)
    right[targets.branch[wrong]] = False
    return right
