"""What reuse costs in answers: generated dialogues that end with one question, through the engine itself.

The messages of a dialogue are stored in one of three ways, and then a reader reads them all, in their
original order or in a new one for which the truth is known:

    alone       each by itself
    in context  each after one to four other messages, of its own dialogue or another
    as told     each after those before it, in the original order

An answer is right when it is the expected one word for word. `same` is the share of answers that are those after
encoding everything again, and `kl` the divergence KL(again || reused) in nats: of the first token, and summed
along the answer up to where the two part. The control sets the recurrent states to zero behind the messages: a kind
that it does not hurt says nothing about states.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

import torch
from torch import Tensor

from hybrid_cache.bench.choreography.models import Subject
from hybrid_cache.bench.choreography.players import PromptedEngine
from hybrid_cache.choreography.arrangement import Composition, Fidelity, Style
from hybrid_cache.choreography.book import Message
from hybrid_cache.config import EngineConfig
from hybrid_cache.models.training.composed import Case, cases, context_of
from hybrid_cache.models.training.dialogues import Turn
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.workflow import Call, Workflow

MOST_NEW = 24
TOGETHER = 16  # dialogues in the cache at a time


@dataclass(frozen=True, slots=True)
class Reading:
    """How messages are stored, and how a reader reads them; `stored` "" encodes everything again."""

    stored: str
    seam: int = 0
    composition: Composition = Composition.ORDERED
    zeroed: bool = False

    @property
    def name(self) -> str:
        how = "" if self.composition is Composition.ORDERED else f", {self.composition}"
        seam = f", seam {self.seam}" if self.seam else ""
        return (self.stored or "encoded again") + how + seam + (", states zeroed" if self.zeroed else "")

    @property
    def style(self) -> Style:
        return Style(Fidelity.COMPOSED, self.seam, self.composition) if self.stored else Style()


@dataclass(frozen=True, slots=True)
class Score:
    """Of one kind, seed and reading: shares and means over `num` dialogues."""

    kind: str
    seed: int
    anew: bool  # in a new order
    reading: str
    num: int
    right: float
    same: float
    kl_first: float
    kl: float
    computed: float  # share of prompt tokens


def readings(seams: Sequence[int], compositions: Sequence[Composition], *, anew: bool) -> list[Reading]:
    """What everything is compared with, then its control, then all combinations and their controls."""
    found = [Reading(""), Reading("as told", zeroed=True)]
    for stored in ("alone", "as told" if anew else "in context"):
        found += [Reading(stored, seam) for seam in seams]
        found += [Reading(stored, composition=how) for how in compositions if how is not Composition.ORDERED]
        found += [Reading(stored, zeroed=True)] if stored != "as told" else []
    return found


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. logits [tokens, V]; computed: share of the prompt's tokens."""

    tokens: tuple[int, ...]
    right: bool
    logits: Tensor
    computed: float


class Examiner:
    """Asks one engine about dialogues."""

    def __init__(self, subject: Subject, budget_bytes: int) -> None:
        self._subject = subject
        self._engine = PromptedEngine(subject, EngineConfig(budget_bytes=budget_bytes))
        self._engine.prompter.watches = True

    def scores(
        self, kind: str, seed: int, each: int, readings: Sequence[Reading], *, anew: bool, on_score: Callable[[], None]
    ) -> Iterator[Score]:
        """One for each reading. The first reading is what the others are compared with."""
        asked = cases(kind, seed, each, anew)
        against: list[Said] = []
        for reading in readings if asked else ():
            rng, said = Random(f"context {seed} {kind}"), list[Said]()
            for first in range(0, len(asked), TOGETHER):
                self._engine.cache.drop()
                said += self._answers(asked[first : first + TOGETHER], reading, rng)
            against = against or said
            pairs = list(zip(said, against, strict=True))
            apart = [divergences(ours, theirs) for ours, theirs in pairs]
            yield Score(
                *(kind, seed, anew, reading.name, len(asked)),
                right=fmean(one.right for one in said),
                same=fmean(ours.tokens == theirs.tokens for ours, theirs in pairs),
                kl_first=fmean(kl[0] for kl in apart),
                kl=fmean(map(sum, apart)),
                computed=fmean(one.computed for one in said),
            )
            on_score()

    def _answers(self, asked: Sequence[Case], reading: Reading, rng: Random) -> Iterator[Said]:
        engine, renderer = self._engine, self._subject.renderer
        workflow = Workflow(engine, renderer, style=reading.style)
        stop, calls = renderer.closing[:1], list[Call]()
        for number, case in enumerate(asked):
            messages = self._messages(workflow, case, reading, rng)
            sampling = SamplingParams(temperature=0.0, max_tokens=MOST_NEW, seed=number, stop_token_ids=stop)
            calls.append(Call([*messages, case.read.questions[0].ask], sampling=sampling, keep=False))
        engine.prompter.logits_of.clear()
        engine.prompter.forgets = reading.zeroed
        answers = workflow.parallel(calls)
        engine.prompter.forgets = False
        for number, (case, answer) in enumerate(zip(asked, answers, strict=True)):
            right = answer.text == case.read.questions[0].answer and answer.tokens[-1:] == stop
            computed = answer.plan.computed / answer.plan.num_tokens
            yield Said(answer.tokens, right, torch.stack(engine.prompter.logits_of[number]), computed)

    def _messages(self, workflow: Workflow, case: Case, reading: Reading, rng: Random) -> list[Message]:
        """The messages in the order of the reader, stored as the reading says."""
        turns = case.dialogue.turns
        if reading.stored == "as told":
            stored = chain(workflow, turns)
            workflow.encode_all([turns[-1].text], stored[:-1], turns[-1].role)
            return [stored[i] for i in case.order]
        messages = []
        for i in case.order:
            others = [turn for j, turn in enumerate(turns) if j != i] + list(case.others)
            before = chain(workflow, context_of(rng, others)) if reading.stored == "in context" else []
            if before:
                messages += workflow.encode_all([turns[i].text], before, turns[i].role)
            else:
                messages.append(workflow.message(turns[i].text, role=turns[i].role))
        return messages


def chain(workflow: Workflow, turns: Sequence[Turn]) -> list[Message]:
    """Messages, each encoded after those before it."""
    messages: list[Message] = []
    for turn in turns:
        messages.append(workflow.message(turn.text, messages, turn.role))
    return messages


def divergences(said: Said, against: Said) -> list[float]:
    """KL(against || said) of each token, up to the first one in which they differ."""
    parted = [ours != theirs for ours, theirs in zip(said.tokens, against.tokens, strict=False)]
    length = parted.index(True) + 1 if True in parted else len(parted)
    p, q = (torch.log_softmax(one.logits[:length].double(), dim=-1) for one in (against, said))
    return [float(kl) for kl in (p.exp() * (p - q)).sum(-1)]
