"""What the engine's own work takes in a step while many tasks are paused: real time, nothing is simulated but the pass.

Some requests decode all the time and now and then one comes. Each paused task has a context of 256 tokens in the cache.
Three times: with room for all of them; with memory for a quarter, so that each newcomer asks what may go; and the same
where nothing may go, because all will be back soon.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles

import numpy as np

from hybrid_cache.bench.agents.machine import Clock, SimulatedModel, SimulatedWorker, machine_named
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.scheduling.learned import WEIGHT, Learned
from hybrid_cache.tokens import Prompt

ROOMS = ("all", "quarter", "spared")
CONTEXT = 4 * TILE
DECODING = 32
STEPS = 2_000
EVERY = 10  # steps between two newcomers


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a step's bookkeeping."""

    paused: int
    room: str  # for "all" of the paused contexts, a "quarter", or a quarter that is "spared"
    median_ms: float
    p99_ms: float
    with_newcomer_ms: float  # median of steps in which one comes


def measure(paused: Sequence[int], seed: int = 0) -> list[StepTime]:
    return [_measure(number, room, seed) for number in paused for room in ROOMS]


def _measure(paused: int, room: str, seed: int) -> StepTime:
    machine, clock, rng = machine_named("jamba-mini"), Clock(), np.random.default_rng(seed)
    geometry = Geometry.of(machine.spec, 1 << 50)
    task_bytes = geometry.stride_bytes(Kind.SLOT) * 2 + geometry.stride_bytes(Kind.PAGE) * (CONTEXT // TILE + 2)
    running_bytes = task_bytes * 8 * DECODING
    budget = running_bytes + paused * task_bytes // (1 if room == "all" else 4)
    config = EngineConfig(budget, max_waiting=1 << 20, max_running=256, verify=False)
    machine = replace(machine, base_s=1e-6)  # pauses are to stay short

    def worker(model: object, memory: object, spare: object) -> SimulatedWorker:
        return SimulatedWorker(machine, clock, memory)  # type: ignore[arg-type]

    order = Learned(math.inf if room == "spared" else WEIGHT)
    engine = Engine(SimulatedModel(machine), config, worker=worker, clock=clock, order=order)

    def ask(name: str, max_tokens: int) -> None:
        tokens = rng.integers(2, 1 << 30, CONTEXT + 10, dtype=np.int32)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        engine.submit(Request(name, Prompt(tokens), sampling, session=name, kind="k"))

    for number in range(paused):
        ask(f"paused {number}", 1)
        engine.run_until_idle()
        engine.pause(f"paused {number}", "tool", 3000.0)
    for number in range(DECODING):
        ask(f"decodes {number}", 10 * STEPS)
    while engine.stats().waiting:
        engine.step()
    times, newcomers = list[float](), list[float]()
    for step in range(STEPS):
        if step % EVERY == 0:
            ask(f"new {step}", 2)
        start = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - start
        times.append(seconds * 1e3)
        if step % EVERY == 0:
            newcomers.append(seconds * 1e3)
    return StepTime(paused, room, median(times), quantiles(times, n=100)[-1], median(newcomers))
