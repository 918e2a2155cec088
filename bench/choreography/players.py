"""Contenders that play the same scripts: re-encoding, the prefix cache, and messages that are moved or composed."""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from hybrid_cache.bench.choreography.models import Subject
from hybrid_cache.bench.choreography.workflows import Ask, Script
from hybrid_cache.choreography.arrangement import Composition, Encoding, Fidelity, Order, Positions, Style
from hybrid_cache.choreography.book import Message
from hybrid_cache.choreography.commands import Clear, Compose
from hybrid_cache.choreography.plan import Action, Plan
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.scheduler import Step
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams, TokenChooser
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.work import Command
from hybrid_cache.workflow import Call, Workflow

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Contender:
    """`style` None: whole prompts, as any client sends them."""

    name: str
    style: Style | None
    prefix_cache: bool = True

    @property
    def is_exact(self) -> bool:
        return self.style is None or (self.style.fidelity is Fidelity.EXACT and self.style.order is Order.GIVEN)


NO_CACHE = Contender("no cache", None, prefix_cache=False)
PREFIX_CACHE = Contender("prefix cache", None)
EXACT = Contender("exact", Style())
ANY_ORDER = Contender("exact any order", Style(order=Order.ANY))


def moved(fidelity: Fidelity, seams: Sequence[int], compositions: Sequence[Composition]) -> list[Contender]:
    """Contenders that move messages: encoded where they first occur, or in isolation."""
    found = []
    for encoding in (Encoding.IN_PLACE, Encoding.ALONE):
        name, style = str(fidelity) + " alone" * (encoding is Encoding.ALONE), Style(fidelity, encoding=encoding)
        found += [Contender(name + (f" seam {seam}" if seam else ""), replace(style, seam=seam)) for seam in seams]
        others = [how for how in compositions if how is not Composition.ORDERED]
        found += [Contender(f"{name} {how}", replace(style, composition=how)) for how in others]
    if fidelity is Fidelity.RELOCATED:
        found.append(Contender(f"{fidelity} alone leftmost", replace(style, positions=Positions.LEFTMOST)))
    return found


class Prompter(Worker):
    """Forces tokens: a request whose seed is n gets the n-th line. The logits are computed as usual.

    first_s  when each seed's first token came
    logits   of each token, by seed, where `watches`
    forgets  the states of a prompt are zeroed after its messages: the control
    """

    def __init__(self, model: HybridModel, memory: CacheMemory, spare_slot: Callable[[], int | None]) -> None:
        super().__init__(model, memory, spare_slot)
        self.lines: Mapping[int, Sequence[int]] = {}
        self.watches = self.forgets = False
        self.logits_of = defaultdict[int, list[Tensor]](list)
        self.first_s: dict[int, float] = {}
        self.clock: Clock = time.perf_counter

    def do(self, command: Command) -> None:
        super().do(command)
        if self.forgets and isinstance(command, Compose):
            super().do(Clear(command.slot))

    def pick(self, logits: Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
        places = [chooser.counts.total() for chooser in choosers]
        tokens = super().pick(logits, choosers)
        for i, (chooser, place, row) in enumerate(zip(choosers, places, logits, strict=True)):
            seed = -1 if chooser.params.seed is None else chooser.params.seed
            if not place:
                self.first_s[seed] = self.clock()
            if self.watches:
                self.logits_of[seed].append(row.clone())
            if (line := self.lines.get(seed)) is not None:
                tokens[i] = line[place]
        return tokens


class PromptedEngine(Engine):
    """An engine with a prompter.

    first_s  seconds from a request's arrival to its first token, by seed
    stored   tokens of messages that were computed for the store, in addition to those of prompts
    """

    def __init__(self, subject: Subject, config: EngineConfig, clock: Clock = time.perf_counter) -> None:
        super().__init__(subject.model, config, worker=Prompter)
        assert isinstance(self.worker, Prompter)
        self.prompter = self.worker
        self.prompter.clock = clock
        self.stored = 0
        self.watch = self._count
        self._came_s: dict[int, float] = {}

    @property
    def first_s(self) -> dict[int, float]:
        return {seed: now - self._came_s[seed] for seed, now in self.prompter.first_s.items()}

    def submit(self, request: Request) -> None:
        self._came_s[seed_of(request)] = self.prompter.clock()
        super().submit(request)

    def _count(self, step: Step) -> None:
        prefills = [(c.prefill, c.end - c.start) for c in step.chunks if c.sequence is None]
        self.stored += sum(length for prefill, length in prefills if prefill.program is not None)


def seed_of(request: Request) -> int:
    return -1 if request.sampling.seed is None else request.sampling.seed


# Playing


@dataclass(frozen=True, slots=True)
class Reply:
    """Of one call: seconds from when it was made, prompt tokens by what became of them, log-probabilities."""

    first_s: float
    tokens: Mapping[Action, int]
    scores: tuple[object, ...]


@dataclass(slots=True)
class Performance:
    """Of one script, from an empty cache. FLOPs are those of everything but decoding, while somebody waits."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0  # of the rounds, one after the other
    flops: float = 0.0
    idle_flops: float = 0.0  # of generated tokens that go into the prefix cache between rounds
    bytes: int = 0  # kept at the end
    stored: int = 0  # tokens computed only for the store

    @property
    def tokens(self) -> Counter[Action]:
        return sum((Counter(reply.tokens) for reply in self.replies), Counter[Action]())


@dataclass(frozen=True, slots=True)
class TokenizedScript:
    """A script in tokens."""

    pieces: tuple[TokenArray, ...]
    lines: Mapping[int, tuple[int, ...]]  # what is to be said for each piece that is an answer
    opening: TokenArray


def tokenized(script: Script, subject: Subject) -> TokenizedScript:
    renderer = subject.renderer
    opening, closing = renderer.opening("assistant"), renderer.closing
    pieces = tuple(renderer.message(piece.role, piece.text) for piece in script.pieces)
    answers = [ask.answer for asks in script.rounds for ask in asks]
    lines = {i: tuple(pieces[i][len(opening) : len(pieces[i]) - len(closing)].tolist()) for i in answers}
    return TokenizedScript(pieces, lines, opening)


def sampling_of(line: Sequence[int], number: int, top: int | None) -> SamplingParams:
    """Greedy, as long as the line, whatever is said."""
    return SamplingParams(temperature=0.0, max_tokens=len(line), min_tokens=len(line), seed=number, logprobs=top)


class PromptPlayer:
    """Sends whole prompts."""

    def __init__(self, script: Script, tokens: TokenizedScript, engine: PromptedEngine, top: int | None) -> None:
        self._script, self._tokens, self._engine, self._top = script, tokens, engine, top

    def play(self, asks: Sequence[Ask]) -> list[Reply]:
        engine, requests = self._engine, {str(ask.answer): self._request(ask) for ask in asks}
        tokens, scores = dict[str, dict[Action, int]](), defaultdict[str, list[object]](list)
        for request in requests.values():
            engine.submit(request)
        while not engine.idle:
            for name, output in engine.step():
                if isinstance(output, PromptOutput):
                    reused, total = output.cached_tokens, len(requests[name].prompt.tokens)
                    tokens[name] = {Action.REUSED: reused, Action.COMPUTED: total - reused}
                elif isinstance(output, TokenOutput) and output.logprob is not None:
                    scores[name].append(output.logprob)
        return [Reply(engine.first_s[seed_of(r)], tokens[n], tuple(scores[n])) for n, r in requests.items()]

    def _request(self, ask: Ask) -> Request:
        pieces = [self._tokens.pieces[i] for i in ask.reads]
        ends = np.cumsum([len(tokens) for tokens in pieces]).tolist()
        roles = [self._script.pieces[i].role for i in ask.reads]
        boundaries = tuple(Boundary(end, role=role) for end, role in zip(ends, roles, strict=True))
        prompt = Prompt(np.concatenate([*pieces, self._tokens.opening]), boundaries)
        sampling = sampling_of(self._tokens.lines[ask.answer], ask.answer, self._top)
        return Request(str(ask.answer), prompt, sampling)


class WorkflowPlayer:
    """Makes calls on a `Workflow`.

    Encoded in place, a piece is stored where it was first read, and an answer where it was given. Encoded alone, both
    are stored as messages of their own.
    """

    def __init__(
        self,
        script: Script,
        tokens: TokenizedScript,
        subject: Subject,
        engine: PromptedEngine,
        style: Style,
        top: int | None,
    ) -> None:
        self._script, self._tokens, self._top = script, tokens, top
        self._engine, self._workflow = engine, Workflow(engine, subject.renderer, style=style)
        self._alone = style.encoding is Encoding.ALONE
        self._messages: dict[int, Message] = {}

    def play(self, asks: Sequence[Ask]) -> list[Reply]:
        answers = self._workflow.parallel([self._call(ask) for ask in asks])
        for ask, answer in zip(asks, answers, strict=True):
            if not self._alone:
                self._messages[ask.answer] = answer.message
        firsts = [self._engine.first_s[ask.answer] for ask in asks]
        return [Reply(s, tokens_of(a.plan), a.logprobs) for s, a in zip(firsts, answers, strict=True)]

    def _call(self, ask: Ask) -> Call:
        reads = list[Message]()
        for i in ask.reads:
            if i not in self._messages:
                piece, before = self._script.pieces[i], () if self._alone else reads
                self._messages[i] = self._workflow.message(piece.text, before, piece.role)
            reads.append(self._messages[i])
        keep = ask.answer in self._script.read and not self._alone
        sampling = sampling_of(self._tokens.lines[ask.answer], ask.answer, self._top)
        return Call(reads, sampling=sampling, keep=keep)


def tokens_of(plan: Plan) -> dict[Action, int]:
    return {action: plan.tokens(action) for action in Action}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Garbage is collected before and after, not meanwhile."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class EnginePair:
    """The engines that contenders for one subject play on, one with a cache and one without."""

    def __init__(self, subject: Subject, budget_bytes: int, clock: Clock) -> None:
        self.subject = subject
        self._clock = clock
        self._engines = {
            cached: PromptedEngine(subject, EngineConfig(budget_bytes=budget_bytes, prefix_cache=cached), clock)
            for cached in (True, False)
        }

    def perform(
        self, script: Script, tokens: TokenizedScript, contender: Contender, top: int | None = None
    ) -> Performance:
        """Plays a script once, from an empty cache. Between rounds the engine does its idle work."""
        engine, shown = self._engines[contender.prefix_cache], Performance()
        engine.cache.drop()
        engine.prompter.lines, engine.stored = tokens.lines, 0
        player: PromptPlayer | WorkflowPlayer
        if contender.style is None:
            player = PromptPlayer(script, tokens, engine, top)
        else:
            player = WorkflowPlayer(script, tokens, self.subject, engine, contender.style, top)
        for asks in script.rounds:
            flops = engine.stats().flops_computed
            with undisturbed():
                start = self._clock()
                shown.replies += player.play(asks)
                shown.seconds += self._clock() - start
            waited = engine.stats().flops_computed
            engine.run_until_idle()
            shown.flops += waited - flops
            shown.idle_flops += engine.stats().flops_computed - waited
        kept = engine.stats().cache
        shown.bytes = kept.kv_bytes + kept.checkpoint_bytes + kept.prompt_end_bytes + kept.message_bytes
        shown.stored = engine.stored
        return shown
