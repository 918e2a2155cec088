"""Agents, each a model of its own, that read one context one after the other: how many pipelines a server completes.

The engine's own books, scheduler and policy, on a machine where time is simulated from measured rates: a pipeline has a
new context, and each agent is asked with it, with what the agents before it have answered, and a question.
Pipelines arrive at random (Poisson); one is in time if it takes no longer than so many times what it takes alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from random import Random

import numpy as np
import torch

from hybrid_cache.bench.agents.machine import GENERATED, Clock, Machine, SimulatedModel, SimulatedWorker
from hybrid_cache.bench.common.random_model import MID_GRANITE
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.senders import offer
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models import registry
from hybrid_cache.models.config import Config
from hybrid_cache.models.loading import shape_ops
from hybrid_cache.models.tools.plans import group
from hybrid_cache.models.weights import ShapesOnly
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.request import CacheMode, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.spec import LayerSpec, PrefillCost
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.transfer import Transfer, projected, upper
from hybrid_cache.work import Work

TOKEN_S = 1 / 605  # prefill of the 152 M model on one core, see bench/RESULTS.md
STEP_S, ROW_S, BYTES_PER_S = 0.010, 0.0022, 8e9
WRITES = 5.38 / 4.4  # what write halves take, of what their FLOPs say: all layers' were measured, see bench/RESULTS.md
STEPS = 6  # of a bisection from what is served without sharing to twice as much for each agent: to 5 % with eight
IN_TIME = 0.9  # part of the pipelines
LOSS = 0.01
ONE = SamplingParams(temperature=0, max_tokens=1)


@dataclass(frozen=True, slots=True)
class Load:
    """What each pipeline is."""

    num_agents: int
    num_context: int = 4096
    num_question: int = 64
    num_answer: int = 16
    num_pipelines: int = 24
    budget_bytes: int = 4 << 30
    slo: float = 3.0  # times what a pipeline takes alone, where nothing is shared
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Sharing:
    """What agents have of the first one's entries."""

    name: str
    transfer: Transfer | None = None  # how they make theirs; None: not at all
    first: int | None = None  # the layer from which their weights differ; None: all do
    twice: bool = False  # the first one writes for them in its own prefill, once it knows that they read it
    cached: bool = True  # anything is


def ways(*, few: bool, seed: int) -> tuple[Sharing, ...]:
    """All contenders, or those that tell most. DroidSpeak's group costs about what projecting everything does."""
    num = len(_layers()[1])
    states = [index for index, layer in enumerate(_layers()[1]) if "attention" not in layer.kind]
    everything, nothing = projected(num, range(num)), upper(num, num)
    own = Sharing("exact caches, each its own")
    made = Sharing("project all", everything)
    double = Sharing("double writing of all", everything, twice=True)
    taken = Sharing("take all", nothing)
    if few:
        return own, made, double, taken
    return (
        own,
        Sharing("recompute all", cached=False),
        Sharing("exact bands, other weights in the top half", first=num // 2),
        made,
        Sharing("project states", projected(num, states)),
        Sharing("project a random half", projected(num, Random(seed).sample(range(num), num // 2))),
        Sharing("project one layer", projected(num, [num // 3])),
        Sharing("recompute 6-10, DroidSpeak's way", group(num, 6, 10)),
        double,
        taken,
    )


class _Agent(SimulatedModel):
    """One model of several of a shape."""

    def __init__(self, machine: Machine, layers: tuple[LayerSpec, ...], name: str, chain: tuple[str, ...]) -> None:
        super().__init__(machine)
        self.fingerprint, self.chain, self.layers = name, chain, layers

    @property
    def ops(self) -> Ops:
        return shape_ops()


class _Worker(SimulatedWorker):
    """Where entries are made from another model's, less time passes."""

    layers: tuple[LayerSpec, ...] = ()

    def _pass_s(self, work: Work) -> float:
        spared = 0.0
        for rows in work.chunks:
            end = rows.start + -(-len(rows.tokens) // TILE) * TILE
            if rows.transfer is not None:
                spared += offer("", "", self.layers, rows.transfer).spares.flops(rows.start, end)
        return super()._pass_s(work) - spared


@cache
def _layers() -> tuple[Machine, tuple[LayerSpec, ...]]:
    """The 152 M model on one core, its costs in seconds."""
    weights, config = ShapesOnly(torch.bfloat16), Config(MID_GRANITE)
    model = registry.find(MID_GRANITE["model_type"])(config, weights, shape_ops(), torch.bfloat16)
    scale = TOKEN_S / model.prefill_cost.flops(0, 2048) * 2048
    layers = tuple(
        replace(each, cost=each.cost.part(scale), write_cost=each.write_cost.part(scale * WRITES))
        for each in model.layers
    )
    cost: PrefillCost = model.prefill_cost.part(scale)
    rates = cost.per_token, cost.per_token_per_position
    return Machine("152m", model.cache_spec, STEP_S, ROW_S, *rates, BYTES_PER_S, 1024), layers


class Pipelines:
    """Runs pipelines on one server."""

    def __init__(self, load: Load, sharing: Sharing) -> None:
        transfer, first = sharing.transfer, sharing.first
        self._load = load
        self._clock = Clock()
        machine, layers = _layers()
        chains = [
            tuple(f"{l}" if first is not None and l <= first else f"{agent} {l}" for l in range(len(layers) + 1))
            for agent in range(load.num_agents)
        ]
        base, *others = (_Agent(machine, layers, f"agent{i}", chain) for i, chain in enumerate(chains))
        config = EngineConfig(
            load.budget_bytes,
            max_running=32,
            max_waiting=1 << 12,
            max_tiles=16,
            max_tiles_beside_decode=4,
            double_writing=sharing.twice,
            verify=False,
        )

        self._mode = CacheMode.IMPLICIT if sharing.cached else CacheMode.OFF

        def worker(model: object, memory: object, spare: object) -> _Worker:
            made = _Worker(machine, self._clock, memory)  # type: ignore[arg-type]
            made.layers = layers
            made.models = {}
            return made

        variants = {model.fingerprint: model for model in others}
        self._engine = Engine(base, config, worker=worker, clock=self._clock, variants=variants)
        self._names = ["", *variants]
        self._max_loss = None if transfer is None else LOSS
        if transfer is not None:
            for name in variants:
                plan = Plan(transfer, LOSS, 1.0, 0.5, 0)
                self._engine.add_profile(Profile(base.fingerprint, name, len(layers), "", (plan,)))

    def run(self, rate: float) -> Iterator[float]:
        """Seconds that each pipeline takes from its arrival, as they end; rate: pipelines a second"""
        self._ask_for_lanes()
        rng, load = np.random.default_rng(self._load.seed), self._load
        due = list(self._clock.now + np.cumsum(rng.exponential(1 / rate, load.num_pipelines)))
        arrived, prompts, stage, ended = dict[int, float](), dict[int, TokenArray](), dict[int, int](), 0
        while ended < load.num_pipelines:
            while len(arrived) < len(due) and due[len(arrived)] <= self._clock.now:
                number = len(arrived)
                arrived[number], stage[number] = due[number], 0
                prompts[number] = rng.integers(2, 1 << 20, load.num_context).astype(np.int32)
                prompts[number] = self._ask(number, 0, prompts[number], rng)
            if not self._engine.has_work:
                self._clock.now = max(self._clock.now, due[len(arrived)])
                continue
            for name, output in self._engine.step():
                if isinstance(output, TokenOutput) and output.finish is not None:
                    number = int(name.partition(" ")[0])
                    stage[number] += 1
                    if stage[number] == load.num_agents:
                        ended += 1
                        yield self._clock.now - arrived[number]
                        continue
                    answered = np.full(load.num_answer, GENERATED, np.int32)
                    prompts[number] = self._ask(number, stage[number], np.concatenate([prompts[number], answered]), rng)

    def _ask_for_lanes(self) -> None:
        """A server keeps what others read once such entries were asked for."""
        for name in self._names[1:]:
            prompt = Prompt(np.arange(2, 9, dtype=np.int32))
            self._engine.submit(Request(name, prompt, ONE, model=name, max_loss=self._max_loss))
        self._engine.run_until_idle()

    def _ask(self, number: int, agent: int, read: TokenArray, rng: np.random.Generator) -> TokenArray:
        prompt = np.concatenate([read, rng.integers(2, 1 << 20, self._load.num_question).astype(np.int32)])
        places = tuple(map(Boundary, (self._load.num_context, len(read))))
        sampling = SamplingParams(temperature=0, max_tokens=self._load.num_answer)
        max_loss = self._max_loss if agent else None
        name = f"{number} {agent}"
        self._engine.submit(
            Request(
                name,
                Prompt(prompt, places),
                sampling,
                cache_mode=self._mode,
                model=self._names[agent],
                max_loss=max_loss,
            )
        )
        return prompt


def alone_s(load: Load) -> float:
    """What a pipeline takes on an idle server where nothing is shared."""
    return next(Pipelines(replace(load, num_pipelines=1), Sharing("")).run(1.0))


def in_time(load: Load, sharing: Sharing, rate: float, most_s: float) -> bool:
    """Whether enough pipelines take at most so long. Ends once too many do not."""
    allowed = int((1 - IN_TIME) * load.num_pipelines)
    late = (seconds for seconds in Pipelines(load, sharing).run(rate) if seconds > most_s)
    return len(list(islice(late, allowed + 1))) <= allowed


def throughput(load: Load, sharing: Sharing, most_s: float, low: float, high: float, steps: int = STEPS) -> float:
    """The highest rate, in pipelines a second, at which they are in time."""
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if in_time(load, sharing, middle, most_s) else (low, middle)
    return low


def compare(load: Load, ways: Sequence[Sharing], done: Callable[[], None]) -> Iterator[tuple[str, float]]:
    """Each way's throughput. The first is the least."""
    first, *others = ways
    most_s = load.slo * alone_s(load)
    idle = load.slo / most_s  # one pipeline after the other, without sharing
    least = throughput(load, first, most_s, idle / 4, 2 * idle, STEPS + 1)
    yield first.name, least
    done()
    for sharing in others:
        yield sharing.name, throughput(load, sharing, most_s, least * 0.9, least * 2 * load.num_agents)
        done()
