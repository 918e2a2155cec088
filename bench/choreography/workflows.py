"""Workflows of several agents as scripts: who reads which messages in which order, and what each answers.

Answers are part of a script. A contender computes them token by token, but the tokens are forced, so that all
contenders read and write the same tokens. A workflow reads and writes only messages, here called pieces:

    pieces   system text, task, instruction, proposal, vote, ...
    rounds   asks that run side by side; the answer to each is a piece that later rounds may read

The workflows are those of Prompt Choreography (Bai and Eisner 2025, arXiv 2512.23049), and retrieval.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from hybrid_cache.bench.choreography.texts import Writer

SHORT = 16  # tokens of a vote


@dataclass(frozen=True, slots=True)
class Piece:
    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A call that reads pieces in this order, and gives the piece `answer`."""

    reads: tuple[int, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Script:
    name: str
    pieces: tuple[Piece, ...]
    rounds: tuple[tuple[Ask, ...], ...]

    @property
    def num_calls(self) -> int:
        return sum(len(asks) for asks in self.rounds)

    @property
    def read(self) -> frozenset[int]:
        """Pieces that some ask reads."""
        return frozenset(i for asks in self.rounds for ask in asks for i in ask.reads)


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each there are; messages and answers in tokens."""

    branches: int = 4
    voters: int = 16
    agents: int = 3
    rounds: int = 2
    requests: int = 12
    message_tokens: int = 128
    answer_tokens: int = 16


class Draft:
    """A script in the making."""

    def __init__(self, name: str, writer: Writer, size: Size, rng: Random) -> None:
        self.writer, self.size, self.rng = writer, size, rng
        self._name = name
        self._pieces: list[Piece] = []
        self._rounds: list[tuple[Ask, ...]] = []

    def says(self, role: str, text: str) -> int:
        """A new piece."""
        self._pieces.append(Piece(role, text))
        return len(self._pieces) - 1

    def round(self, asks: Iterable[tuple[Sequence[int], str]]) -> list[int]:
        """Asks that run side by side, each what it reads and the text of its answer -> the answers."""
        made = [Ask(tuple(reads), self.says("assistant", text)) for reads, text in asks]
        self._rounds.append(tuple(made))
        return [ask.answer for ask in made]

    def shuffled(self, pieces: Sequence[int]) -> list[int]:
        return self.rng.sample(pieces, len(pieces))

    def question(self, number: int = 0) -> int:
        return self.says("user", self.writer.question(number, self.size.message_tokens))

    def answer(self, who: int, number: int = 0) -> str:
        return self.writer.answer(number, who, self.size.answer_tokens)

    def done(self) -> Script:
        return Script(self._name, tuple(self._pieces), tuple(self._rounds))


def tree_of_thought(draft: Draft) -> None:
    """Solvers propose, voters read all proposals, each in an order of its own, and the winner is carried out."""
    size, task = draft.size, [draft.says("system", "You solve a task together with others."), draft.question()]
    proposals = draft.round(
        (
            [*task, draft.says("user", f"Propose solution number {i + 1}.")],
            draft.writer.answer(0, i, size.message_tokens),
        )
        for i in range(size.branches)
    )
    vote = draft.says("user", "Which of these solutions is the best one? Say why in a few words.")
    draft.round(
        ([*task, *draft.shuffled(proposals), vote], draft.writer.answer(1, i, min(SHORT, size.answer_tokens)))
        for i in range(size.voters)
    )
    write = draft.says("user", "This solution has won. Write it out in full.")
    draft.round([([*task, draft.rng.choice(proposals), write], draft.answer(0))])


def iterative_debate(draft: Draft) -> None:
    """Speakers with instructions of their own take turns; each reads all that was said so far."""
    size, question = draft.size, draft.question()
    roles = [
        draft.says("system", f"You are speaker {i + 1} of a debate. Keep to your side.") for i in range(size.agents)
    ]
    speak, said = draft.says("user", "It is your turn to speak."), list[int]()
    for turn in range(size.agents * size.rounds):
        speech = draft.writer.turn(turn, size.message_tokens)
        said += draft.round([([roles[turn % size.agents], question, *said, speak], speech)])


def parallel_debate(draft: Draft) -> None:
    """All agents answer at once; in later rounds each reads its own answer, then the others' in its own order."""
    size, task = draft.size, [draft.says("system", "Several agents discuss a task."), draft.question()]
    again = draft.says("user", "Using what the others say, answer again.")
    known = [list(task) for _ in range(size.agents)]
    for number in range(size.rounds):
        texts = [draft.writer.answer(number, i, size.message_tokens) for i in range(size.agents)]
        answers = draft.round(zip(known, texts, strict=True))
        known = [
            [*before, own, *draft.shuffled([a for a in answers if a != own]), again]
            for before, own in zip(known, answers, strict=True)
        ]


def branch_solve_merge(draft: Draft) -> None:
    """A plan, a solver for each of its parts, and two mergers that read the parts in different orders."""
    size, task = draft.size, [draft.says("system", "You work on one task in parts."), draft.question()]
    divide = draft.says("user", "Divide this task into parts.")
    (plan,) = draft.round([([*task, divide], draft.answer(0))])
    parts = draft.round(
        ([*task, plan, draft.says("user", f"Solve part {i + 1}.")], draft.writer.answer(0, i, size.message_tokens))
        for i in range(size.branches)
    )
    merge = draft.says("user", "Merge these parts into one solution.")
    draft.round(([*task, *order, merge], draft.answer(1)) for order in (draft.shuffled(parts), draft.shuffled(parts)))


def two_questions(draft: Draft) -> None:
    """Each pair of questions is asked in both orders."""
    system = draft.says("system", "You answer questions.")
    questions = [draft.question(i) for i in range(draft.size.branches)]
    both = draft.says("user", "Answer both questions.")
    for shift in range(1, len(questions)):
        pairs = list(zip(questions, questions[shift:] + questions[:shift], strict=True))
        draft.round(([system, *pair, both], draft.answer(i)) for i, pair in enumerate(pairs))


def retrieval(draft: Draft) -> None:
    """Requests that come one after the other, with passages that come back in other company and order."""
    system = draft.says("system", draft.writer.passage(-1, draft.size.message_tokens))
    passages: dict[int, int] = {}
    for number, found in enumerate(draft.writer.retrievals(draft.size.requests, draft.size.message_tokens)):
        for name, num_tokens in found:
            if name not in passages:
                passages[name] = draft.says("user", draft.writer.passage(name, num_tokens))
        question = draft.says("user", draft.writer.question(number, max(8, draft.size.message_tokens // 4)))
        draft.round([([system, *(passages[name] for name, _ in found), question], draft.answer(number))])


WORKFLOWS: Mapping[str, Callable[[Draft], None]] = {
    "tree of thought": tree_of_thought,
    "iterative debate": iterative_debate,
    "parallel debate": parallel_debate,
    "branch-solve-merge": branch_solve_merge,
    "two questions": two_questions,
    "retrieval": retrieval,
}
REORDERING = ("tree of thought", "parallel debate", "branch-solve-merge", "two questions", "retrieval")


def make_script(name: str, writer: Writer, size: Size, seed: int) -> Script:
    """The same seed always gives the same script."""
    draft = Draft(name, writer, size, Random(f"{name} {seed}"))
    WORKFLOWS[name](draft)
    return draft.done()
