"""Agents that nobody recorded, each kind with a system prompt and tools of its own.

Tokens: system prompt and tools of the kind, the task, then in each turn the answer and what the tool returns; nothing
is edited. Calls: geometric, so a session is as likely to end after its first turn as after its fifth. Times: log-normal
with the median and the `sigma` of the tool; a share `stuck` of them is stretched by a Pareto factor of shape 1.1, whose
variance is infinite: a test suite that hangs, a page that does not load, a customer who went for lunch.

    kind       system   turns   tools (median s, sigma, stuck)
    coding      9,000      25   read_file .02 .5, search .3 .8, edit_file .05 .5, run_tests 12 1.2 .05
    research    3,000      10   web_search .8 .6, fetch_page 1.5 1 .1, python .5 1.2 .02
    support     6,000       8   lookup .1 .4, update .3 .5 .02, a person 25 .9 .1
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_cache.bench.agents.maker import MAX_PAUSE_S, SessionMaker
from hybrid_cache.bench.agents.workload import Turn
from hybrid_cache.bench.traces.workloads import Lognormal

NUM_SESSIONS = 1_000
STUCK_SHAPE = 1.1
ANSWER = Lognormal(120, 0.8, 8, 4_000)


@dataclass(frozen=True, slots=True)
class Tool:
    name: str  # empty: a person
    weight: float  # of its calls, next to those of the kind's other tools
    result: Lognormal  # tokens
    median_s: float
    sigma: float
    stuck: float = 0.0

    def draw_s(self, rng: random.Random) -> float:
        seconds = self.median_s * rng.lognormvariate(0, self.sigma)
        if rng.random() < self.stuck:
            seconds *= rng.paretovariate(STUCK_SHAPE)
        return min(seconds, MAX_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    system_tokens: int
    mean_turns: float
    task: Lognormal  # tokens
    tools: tuple[Tool, ...]

    def turns(self, rng: random.Random) -> Iterator[Turn]:
        prompt, kept, weights = self.system_tokens + self.task.draw(rng), 0, [tool.weight for tool in self.tools]
        while True:
            output, tool = ANSWER.draw(rng), rng.choices(self.tools, weights)[0]
            if rng.random() < 1 / self.mean_turns:
                yield Turn(prompt, kept, output, "", None)
                return
            yield Turn(prompt, kept, output, tool.name, tool.draw_s(rng))
            kept = prompt + output
            prompt = kept + tool.result.draw(rng)


KINDS = (
    Kind(
        "coding",
        9_000,
        25,
        Lognormal(300, 1.0, 20, 8_000),
        (
            Tool("read_file", 4, Lognormal(800, 1.0, 20, 8_000), 0.02, 0.5),
            Tool("search", 2, Lognormal(400, 0.8, 10, 4_000), 0.3, 0.8),
            Tool("edit_file", 2, Lognormal(80, 0.5, 10, 1_000), 0.05, 0.5),
            Tool("run_tests", 2, Lognormal(600, 1.2, 20, 8_000), 12, 1.2, stuck=0.05),
        ),
    ),
    Kind(
        "research",
        3_000,
        10,
        Lognormal(80, 0.8, 10, 2_000),
        (
            Tool("web_search", 3, Lognormal(1_200, 0.5, 50, 6_000), 0.8, 0.6),
            Tool("fetch_page", 3, Lognormal(3_000, 0.9, 50, 16_000), 1.5, 1.0, stuck=0.1),
            Tool("python", 1, Lognormal(150, 1.0, 5, 4_000), 0.5, 1.2, stuck=0.02),
        ),
    ),
    Kind(
        "support",
        6_000,
        8,
        Lognormal(50, 0.7, 5, 1_000),
        (
            Tool("lookup", 3, Lognormal(300, 0.7, 20, 3_000), 0.1, 0.4),
            Tool("update", 1, Lognormal(80, 0.4, 10, 500), 0.3, 0.5, stuck=0.02),
            Tool("", 4, Lognormal(50, 0.7, 3, 1_000), 25, 0.9, stuck=0.1),
        ),
    ),
)


def make_sessions(maker: SessionMaker, seed: int) -> list[str]:
    """Adds NUM_SESSIONS sessions, of all kinds alike; returns notes."""
    for i in range(NUM_SESSIONS):
        rng = random.Random(f"synthetic agents {seed} {i}")
        kind = rng.choice(KINDS)
        maker.add(kind.name, kind.turns(rng), kind.system_tokens)
    return [f"synthetic in every respect: kinds, lengths, tools and times; seed {seed}"]
