"""Synthetic traffic with the shapes that LLM servers report, to compare cache policies without any file.

chat         people talk: few system prompts, conversations that grow, sometimes a turn that is regenerated or edited
agent        programs act: long shared instructions, tool results, old results deleted from the middle of the prompt
few-shot     one question after a long template of examples; templates take turns
retrieval    a question after a few passages, some of which everybody asks about
tree-search  many continuations of one path, all at once; most are dropped, the rest go on
mixed        all of these on one server

Nothing here was recorded. A token is a random number below `VOCABULARY`, so texts share exactly what they are meant
to share. Answers are known, since the next prompt of a session repeats them. All draws come from `random.Random`,
seeded with strings, and times are rounded to the microsecond: one seed makes one trace, on any machine. Each session
has a generator of its own, so a larger `scale` makes the same sessions and then more of them.

The traces are open loop: when the next prompt of a session comes does not depend on the server that is measured. The
gap is the time to write the answer, at `ANSWER_TOKENS_PER_S`, and then to read it and reply, or to run a tool.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice, repeat, takewhile
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np

from hybrid_cache.bench.traces.trace import Mark, PageNames, Tokens, Trace, TraceMessage, TraceRequest, template_of
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE

VOCABULARY = 50_000
CONTEXT = 32_768  # a session ends before its prompt would be longer
ANSWER_TOKENS_PER_S = 50.0
WORDS_PER_TOKEN = 0.75
READ_WORDS_PER_S = 375 / 60
TYPED_WORDS_PER_S = 90 / 60
MOST_TYPED_WORDS = 200  # the rest of a longer message was pasted

T = TypeVar("T")


def even(rate: float) -> Iterator[float]:
    """Times 1/rate apart, the first at 0."""
    _check_positive("rate", rate)
    return (i / rate for i in count())


def poisson(rng: random.Random, rate: float) -> Iterator[float]:
    """Times of independent visitors, `rate` a second in the mean."""
    _check_positive("rate", rate)
    return accumulate(rng.expovariate(rate) for _ in repeat(None))


def gamma_bursts(rng: random.Random, rate: float, cv: float) -> Iterator[float]:
    """Times whose gaps follow a Gamma distribution with mean 1/rate and standard deviation cv/rate.

    cv 1 is the law of `poisson`; above, visitors come in bursts with long pauses between them, which is what BurstGPT
    measured (Wang et al. 2024, arXiv 2401.17644).
    """
    _check_positive("rate", rate)
    _check_positive("cv", cv)
    return accumulate(rng.gammavariate(cv**-2, cv**2 / rate) for _ in repeat(None))


@dataclass(frozen=True, slots=True)
class Uniform:
    """A whole number from low to high."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A whole number near the median, sometimes many times larger; moved into [low, high]."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return min(max(round(self.median * rng.lognormvariate(0, self.sigma)), self.low), self.high)


Length = Uniform | Lognormal


Messages = tuple[TraceMessage, ...]


class DraftRequest(NamedTuple):
    """A request before its pages have names."""

    arrival_s: float
    session: str
    prompt: Messages
    answer: Tokens
    finish: Finish = Finish.STOP
    tools: bool = False


class Start(NamedTuple):
    """A session begins."""

    rng: random.Random  # everything that happens in this session is drawn from here
    session: str
    at_s: float


def text(rng: random.Random, num_tokens: int) -> Tokens:
    raw = np.frombuffer(rng.randbytes(4 * num_tokens), "<u4")
    return (raw % VOCABULARY).astype(np.int32)


def popular(rng: random.Random, things: Sequence[T]) -> T:
    """One of them by Zipf's law: the k-th is drawn in proportion to 1/k."""
    return rng.choices(things, cum_weights=_zipf(len(things)))[0]


class Workload(ABC):
    """Something that makes a `Trace`; its fields are the parameters, and `Trace.note` repeats them."""

    name: ClassVar[str]

    @abstractmethod
    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        """All requests, each session in its own order."""

    def trace(self, *, seed: int = 0, scale: float = 1.0, page_tokens: int = TILE) -> Trace:
        """`scale` times as many sessions as usual, at the same rate, so over a longer time. Raises ConfigError."""
        _check_positive("scale", scale)
        if page_tokens < TILE or page_tokens % TILE:
            raise ConfigError(f"page_tokens {page_tokens} is not a multiple of {TILE}")
        names = PageNames(page_tokens)
        drafts = sorted(self.drafts(seed, scale), key=lambda draft: draft.arrival_s)
        note = f"synthetic in every respect: text, lengths, sharing and times; seed {seed}, scale {scale:g}, {self!r}"
        return Trace(self.name, page_tokens, tuple(_request(draft, names) for draft in drafts), note)


@dataclass(frozen=True)
class Sessions(Workload):
    """A workload of independent sessions that start as `arrivals` says."""

    sessions: int
    rate: float  # sessions a second

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        return poisson(rng, self.rate)

    def _starts(self, seed: int, scale: float) -> Iterator[Start]:
        times = self.arrivals(random.Random(f"{seed} {self.name} arrivals"))
        for i, at_s in enumerate(islice(times, max(1, round(self.sessions * scale)))):
            session = f"{self.name}-{i}"
            yield Start(random.Random(f"{seed} {session}"), session, at_s)

    def _shared(self, seed: int) -> random.Random:
        """For what sessions have in common."""
        return random.Random(f"{seed} {self.name} shared")


@dataclass(frozen=True)
class Chat(Sessions):
    """People in a chat window.

    Messages are short and answers are longer: LMSYS-Chat-1M has 69.5 tokens a message, 214.5 an answer and 2.0 turns
    in the mean (Zheng et al. 2023, arXiv 2309.11998). Marconi's traces keep only its conversations of ten turns and
    more (Pan et al. 2024, arXiv 2411.19379). This one lies between: a third leave after one turn, the others stay for
    a geometric number. As in Marconi's traces the next message is typed at 90 words a minute; here the answer is read
    first, and each pause has a pace of its own.

    With probability `revises` the user does not go on. Half of the time they ask for the last answer once more, else
    they rewrite a message of their own; the conversation goes on from there.
    """

    name = "chat"
    sessions: int = 170
    rate: float = 0.25
    burstiness: float = 2.0  # `cv` of gamma_bursts
    systems: int = 6
    system: Length = Uniform(100, 2_000)
    user: Length = Lognormal(60, 1.3, 2, 4_000)
    answer: Length = Lognormal(250, 0.9, 5, 2_000)
    leaves_at_once: float = 1 / 3
    mean_turns: float = 5.0
    most_turns: int = 40
    revises: float = 0.08
    pace_sigma: float = 0.8

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        return gamma_bursts(rng, self.rate, self.burstiness)

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        shared = self._shared(seed)
        systems = [TraceMessage("system", text(shared, self.system.draw(shared))) for _ in range(self.systems)]
        for start in self._starts(seed, scale):
            yield from self._session(start, popular(start.rng, systems))

    def _session(self, start: Start, system: TraceMessage) -> Iterator[DraftRequest]:
        rng, session, now = start
        turns = self._turns(rng)
        prompt: Messages = (system, self._question(rng))
        while turns > 0 and _length(prompt) <= CONTEXT:
            answer = text(rng, self.answer.draw(rng))
            yield DraftRequest(now, session, prompt, answer)
            if rng.random() < self.revises:
                prompt = self._revised(rng, prompt)
            else:
                prompt, turns = (*prompt, TraceMessage("assistant", answer), self._question(rng)), turns - 1
            now += _writing_s(answer) + _reading_s(rng, self.pace_sigma, answer, prompt[-1].tokens)

    def _turns(self, rng: random.Random) -> int:
        if rng.random() < self.leaves_at_once:
            return 1
        more = (self.mean_turns - 1) / (1 - self.leaves_at_once)  # turns after the first, of those who stay
        return next(n for n in count(2) if n >= self.most_turns or rng.random() * more < 1)

    def _question(self, rng: random.Random) -> TraceMessage:
        return TraceMessage("user", text(rng, self.user.draw(rng)))

    def _revised(self, rng: random.Random, prompt: Messages) -> Messages:
        if rng.random() < 0.5:
            return prompt
        edited = rng.choice([i for i, message in enumerate(prompt) if message.role == "user"])
        return (*prompt[:edited], self._question(rng))


@dataclass(frozen=True)
class Agent(Sessions):
    """Programs that solve a task with tools, in the manner of SWE-agent (Yang et al. 2024, arXiv 2405.15793).

    Long instructions and tool descriptions, of which there are few; a task; then turns of an action and what the tool
    returned. Session i starts at i / rate and a tool takes a Poisson number of seconds, as in Marconi's SWE-Bench
    traces, whose rates are 0.25 to 10 sessions a second and whose means are 5 to 10 s. InferCept reports 3 to 28 tool
    calls in the mean, by task (Abhyankar et al. 2024, arXiv 2402.01869); programming takes more than most.

    `collapse` is the rule of those traces: from the sixth turn on, only the last `kept` observations stay. Each prompt
    then lacks one that the prompt before it had, and differs from it from there on:

        system task a0 o0 a1 o1 a2 o2 a3 o3 a4 o4         5 complete turns
        system task a0 a1 o1 a2 o2 a3 o3 a4 o4 a5 o5      6: o0 has gone
        system task a0 a1 a2 o2 a3 o3 a4 o4 a5 o5 a6 o6   7: o1 has gone

    Without it the prompt only grows, and `CONTEXT` ends the longest sessions early.
    """

    name = "agent"
    sessions: int = 26
    rate: float = 0.25
    systems: int = 3
    system: Length = Uniform(4_000, 8_000)
    task: Length = Uniform(500, 3_000)
    turns: Length = Lognormal(21, 0.35, 10, 50)
    action: Length = Uniform(100, 400)
    observation: Length = Lognormal(450, 0.8, 300, 3_000)
    tool_s: float = 7.5
    collapse: bool = True
    kept: int = 5

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        return even(self.rate)

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        shared = self._shared(seed)
        systems = [TraceMessage("system", text(shared, self.system.draw(shared))) for _ in range(self.systems)]
        for start in self._starts(seed, scale):
            yield from self._session(start, popular(start.rng, systems))

    def _session(self, start: Start, system: TraceMessage) -> Iterator[DraftRequest]:
        rng, session, now = start
        task = TraceMessage("user", text(rng, self.task.draw(rng)))
        done: list[tuple[TraceMessage, TraceMessage]] = []
        for left in reversed(range(self.turns.draw(rng))):
            prompt = (system, task, *self._history(done))
            if _length(prompt) > CONTEXT:
                return
            action, observation = text(rng, self.action.draw(rng)), text(rng, self.observation.draw(rng))
            yield DraftRequest(now, session, prompt, action, Finish.TOOL_CALL if left else Finish.STOP, tools=True)
            done.append((TraceMessage("assistant", action), TraceMessage("tool", observation)))
            num_seconds = sum(1 for _ in takewhile(lambda time: time <= 1, poisson(rng, self.tool_s)))
            now += _writing_s(action) + num_seconds

    def _history(self, done: Sequence[tuple[TraceMessage, TraceMessage]]) -> Iterator[TraceMessage]:
        first_kept = len(done) - self.kept if self.collapse else 0
        for i, (action, observation) in enumerate(done):
            yield action
            if i >= first_kept:
                yield observation


@dataclass(frozen=True)
class FewShot(Sessions):
    """One question after a template of instructions and examples, as evaluations and classifiers send them.

    Every request is a session of its own. Templates are drawn by Zipf's law, so some are always warm and others come
    back after many requests to different ones. Prompts are much longer than answers and mostly shared, as in the study
    of Preble (Srivatsa et al. 2024, arXiv 2407.00023).
    """

    name = "few-shot"
    sessions: int = 1_000
    rate: float = 4.0
    tasks: int = 15
    template: Length = Uniform(1_000, 3_000)
    question: Length = Uniform(50, 200)
    answer: Length = Lognormal(15, 0.8, 1, 100)

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        shared = self._shared(seed)
        templates = [TraceMessage("system", text(shared, self.template.draw(shared))) for _ in range(self.tasks)]
        for rng, session, now in self._starts(seed, scale):
            question = TraceMessage("user", text(rng, self.question.draw(rng)))
            yield DraftRequest(now, session, (popular(rng, templates), question), text(rng, self.answer.draw(rng)))


@dataclass(frozen=True)
class Retrieval(Sessions):
    """A question about passages that a search found, the best first.

    Passages are drawn by Zipf's law. The most popular 3 % of 2,000 get 57 % of the draws; RAGCache measured that 3 %
    of the documents get 60 % of the requests (Jin et al. 2024, arXiv 2404.12457). Prompts share only the passages that
    come first and in the same order, so most hits end after the system prompt or a passage or two. With probability
    `goes_on` an answer is followed by another question about the same passages.
    """

    name = "retrieval"
    sessions: int = 700
    rate: float = 2.0
    library: int = 2_000
    system: int = 300
    passage: Length = Uniform(200, 500)
    passages: Length = Uniform(3, 6)
    question: Length = Uniform(15, 80)
    answer: Length = Lognormal(120, 0.7, 5, 800)
    goes_on: float = 0.25
    pace_sigma: float = 0.8

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        shared = self._shared(seed)
        system = TraceMessage("system", text(shared, self.system))
        library = [TraceMessage("tool", text(shared, self.passage.draw(shared))) for _ in range(self.library)]
        weights = _zipf(self.library)
        for start in self._starts(seed, scale):
            found: dict[int, TraceMessage] = {}
            wanted = self.passages.draw(start.rng)
            while len(found) < wanted:
                i = start.rng.choices(range(self.library), cum_weights=weights)[0]
                found.setdefault(i, library[i])
            yield from self._session(start, (system, *found.values()))

    def _session(self, start: Start, passages: Messages) -> Iterator[DraftRequest]:
        rng, session, now = start
        prompt = (*passages, self._question(rng))
        while _length(prompt) <= CONTEXT:
            answer = text(rng, self.answer.draw(rng))
            yield DraftRequest(now, session, prompt, answer)
            if rng.random() >= self.goes_on:
                return
            prompt = (*prompt, TraceMessage("assistant", answer), self._question(rng))
            now += _writing_s(answer) + _reading_s(rng, self.pace_sigma, answer, prompt[-1].tokens)

    def _question(self, rng: random.Random) -> TraceMessage:
        return TraceMessage("user", text(rng, self.question.draw(rng)))


@dataclass(frozen=True)
class TreeSearch(Sessions):
    """Breadth-first search over thoughts: `branching` continuations of every path, the best `kept` of all go on.

    The numbers are those of Tree of Thoughts on the Game of 24, three steps and the five best states (Yao et al. 2023,
    arXiv 2305.10601). A level goes out at one instant, each path `branching` times over, so requests of one session
    overlap and repeat each other exactly. Who is best is drawn at random; scoring sends no requests.
    """

    name = "tree-search"
    sessions: int = 18
    rate: float = 0.2
    methods: int = 3
    method: Length = Uniform(500, 1_500)  # instructions and worked examples
    problem: Length = Uniform(100, 400)
    thought: Length = Uniform(40, 200)
    depth: int = 3
    branching: int = 5
    kept: int = 5
    scoring_s: float = 1.0

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        shared = self._shared(seed)
        methods = [TraceMessage("system", text(shared, self.method.draw(shared))) for _ in range(self.methods)]
        for start in self._starts(seed, scale):
            yield from self._session(start, popular(start.rng, methods))

    def _session(self, start: Start, method: TraceMessage) -> Iterator[DraftRequest]:
        rng, session, now = start
        paths: list[Messages] = [(method, TraceMessage("user", text(rng, self.problem.draw(rng))))]
        for _ in range(self.depth):
            level = [
                DraftRequest(now, session, path, text(rng, self.thought.draw(rng)))
                for path in paths
                for _ in range(self.branching)
            ]
            yield from level
            now += max(_writing_s(draft.answer) for draft in level) + self.scoring_s
            best = rng.sample(level, min(self.kept, len(level)))
            paths = [(*draft.prompt, TraceMessage("assistant", draft.answer)) for draft in best]


@dataclass(frozen=True)
class Mixed(Workload):
    """All workloads on one server: `share` of the sessions of each, their starts spread over the same `span_s`."""

    name = "mixed"
    parts: tuple[Sessions, ...] = (Chat(), Agent(), FewShot(), Retrieval(), TreeSearch())
    share: float = 0.3
    span_s: float = 900.0

    def drafts(self, seed: int, scale: float) -> Iterator[DraftRequest]:
        for part in self.parts:
            stretched = replace(part, rate=part.sessions * self.share / self.span_s)
            yield from stretched.drafts(seed, scale * self.share)


WORKLOADS: dict[str, Callable[..., Trace]] = {
    workload.name: workload.trace for workload in (Chat(), Agent(), FewShot(), Retrieval(), TreeSearch(), Mixed())
}


def make_workload(name: str, *, seed: int = 0, scale: float = 1.0, page_tokens: int = TILE) -> Trace:
    """The workload of that name with its usual parameters; for others call `trace` of its class.

    Raises ConfigError for an unknown name.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}, choose from {', '.join(WORKLOADS)}")
    return WORKLOADS[name](seed=seed, scale=scale, page_tokens=page_tokens)


def _request(draft: DraftRequest, names: PageNames) -> TraceRequest:
    tokens = np.concatenate([message.tokens for message in draft.prompt])
    known = np.concatenate([tokens, draft.answer])
    _, whole = names.of(tokens)
    pages, _ = names.of(known)
    ends = accumulate(len(message.tokens) for message in draft.prompt)
    marks = tuple(Mark(end, message.role) for end, message in zip(ends, draft.prompt, strict=True))
    return TraceRequest(
        arrival_s=round(draft.arrival_s, 6),
        session=draft.session,
        pages=pages,
        num_prompt_tokens=len(tokens),
        num_output_tokens=len(draft.answer),
        num_known_tokens=len(known),
        whole=whole,
        marks=marks,
        tokens=tokens,
        finish=draft.finish,
        tools=draft.tools,
        template=template_of(tokens, marks),
    )


def _length(prompt: Messages) -> int:
    return sum(len(message.tokens) for message in prompt)


def _writing_s(answer: Tokens) -> float:
    return len(answer) / ANSWER_TOKENS_PER_S


def _reading_s(rng: random.Random, sigma: float, answer: Tokens, reply: Tokens) -> float:
    """A person reads the answer and types the reply, at a pace of their own; a minute for 250 tokens and 60."""
    read = len(answer) * WORDS_PER_TOKEN / READ_WORDS_PER_S
    typed = min(len(reply) * WORDS_PER_TOKEN, MOST_TYPED_WORDS) / TYPED_WORDS_PER_S
    return rng.lognormvariate(0, sigma) * (read + typed)


def _zipf(num: int) -> list[float]:
    return list(accumulate(1 / k for k in range(1, num + 1)))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} {value} is not a number above 0")
