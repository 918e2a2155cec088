"""A busy engine: random requests arrive, are answered in batches, or are aborted."""

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from hybrid_cache.bench.exactness.asked import Asked, traits
from hybrid_cache.bench.exactness.mix import NO_VARIANTS, Mix, Phase, salt_of
from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.bench.exactness.rows import BusyWatcher, Ledger, watched_engine
from hybrid_cache.bench.exactness.tree import Given
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import HybridCacheError, RequestError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import FailedOutput, Output, PromptOutput
from hybrid_cache.scheduling.registry import ORDERS
from hybrid_cache.tokens import Prompt

PATIENCE = 10  # steps without an output for each token of the longest sequence, before an engine counts as stuck


class Stuck(Exception):
    """An engine has work and makes no progress."""


class Clock:
    """Moves on with the steps of an engine, so that a run can be repeated."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Traffic:
    """One busy engine, and the requests that arrive, are answered, or are aborted."""

    def __init__(
        self,
        model: HybridModel,
        phase: Phase,
        ledger: Ledger,
        report: Report,
        rng: random.Random,
        variants: Mapping[str, HybridModel] = NO_VARIANTS,
    ) -> None:
        self.watcher = BusyWatcher(ledger, report)
        self.mix = Mix(model, phase, rng, variants)
        self.given = Given()
        self._clock, self._phase, self._rng, self._report = Clock(), phase, rng, report
        self._turns = random.Random(report.seed)  # what is told of turns to come
        self._ends = random.Random(2)  # how turns end
        self.engine = watched_engine(model, _config(model, phase, rng), self.watcher, self._clock, variants)
        self.engine.between_layers = self._between_layers
        self._to_come = 0  # requests of this round
        self._asked: dict[str, Asked] = {}
        self._aborts: dict[str, int] = {}  # steps that are left to requests which will be aborted
        self._silent_steps = 0

    def round(self, num_requests: int) -> list[Asked]:
        """Submits `num_requests` new requests -> them, when all are done."""
        self._asked, self._aborts = {}, {}
        self._to_come = num_requests
        while self._to_come:
            self._submit()
            self._pause(self._rng.choice(self._phase.arrivals))
        while not self.engine.idle:
            self._step()
        if self._rng.random() < 0.6:  # else finished turns wait, and the next request comes when they have begun
            while self.engine.has_work:
                self._step()
            self._check_idle()
        self.engine.check()
        return list(self._asked.values())

    def close(self) -> None:
        """Adds what the engine has counted to the report. Turns that were not computed again never are."""
        stats, mixed = self.engine.stats(), self._report.mixed
        self._report.prompt_tokens += stats.prompt_tokens
        self._report.cached_tokens += stats.cached_tokens
        mixed["evictions"] += stats.cache.num_evictions
        mixed["preemptions"] += stats.num_preemptions
        mixed["pages from the second tier"] += stats.cache.host_loads
        mixed["tasks resumed"] += stats.pauses.num_resumed
        mixed["messages stored"] += stats.cache.admissions.get("message", 0)
        self._report.received_tokens += self.watcher.origins.received_tokens
        mixed["compactions"] += stats.cache.compactions
        mixed["digests compared"] += self.engine.worker.memory.digests.num_compared

    def _submit(self) -> None:
        if self._rng.random() < 0.02:
            self._report.mixed["dropped caches"] += 1
            self.engine.cache.drop(self._rng.choice((None, *self.mix.namespaces.values())))
        self._submit_next()
        self._abort()

    def _submit_next(self) -> None:
        rng, asked, mixed = self._rng, self.mix.next(), self._report.mixed
        request = asked.request
        self._to_come -= 1
        mixed.update(["requests", *traits(asked)])
        if request.arrangement is not None and rng.random() < 0.1:
            mixed["plans asked for"] += 1
            self.engine.plan(request)
        self._asked[request.id] = asked
        self.engine.submit(replace(request, commits=self._turns.random() < 0.6))
        if rng.random() < 0.15:
            self._aborts[request.id] = rng.choice((0, 1, 1, 2, 3, 5, 10, 25))

    def _between_layers(self) -> None:
        """Some requests come while a pass is under way."""
        if self._to_come and self._rng.random() < 0.4:
            steps = self.engine.stats().steps
            self._submit_next()
            self._hear(self.engine.step_between())
            self._report.mixed["steps between layers"] += self.engine.stats().steps - steps

    def _pause(self, steps: int) -> None:
        if steps < 0:
            while not self.engine.idle:
                self._step()
            steps = self._rng.choice((1, 1, 2, 3))
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        self._clock.now += self._rng.choice((0.01, 0.1, 1.0))
        outputs = self.engine.step()
        self._hear(outputs)
        self._silent_steps = 0 if outputs or self.engine.idle else self._silent_steps + 1
        if self._silent_steps > PATIENCE * self._phase.most_tokens:
            raise Stuck(f"no output of {self._silent_steps} steps: {self.engine.stats()}")
        self._abort()

    def _hear(self, outputs: Outputs) -> None:
        for name, output in outputs:
            if isinstance(output, FailedOutput):
                raise HybridCacheError(f"{name} failed: {output.why}")
            self._take(self._asked[name], output)

    def _take(self, asked: Asked, output: Output) -> None:
        if isinstance(output, PromptOutput):
            asked.reported = output
            return
        asked.choices.setdefault(output.index, []).append(output)
        if output.index == 0 and output.finish is not None:
            self.mix.heard(asked)
            self._end_turn(asked.request.id)
            if self._turns.random() < 0.4:
                self._expect(asked)

    def _end_turn(self, request_id: str) -> None:
        """In a tool call, soon or late to be answered; as the last of its task; or nobody says."""
        end = self._ends.choice(("call", "call", "last", ""))
        if end == "last":
            self.engine.end_task(request_id)
        elif end:
            with suppress(RequestError):  # those that nobody could go on from are not known
                self.engine.pause(request_id, "tool", self._ends.choice((None, 0.5, 3600.0)))

    def _expect(self, asked: Asked) -> None:
        """The next prompt is told of: as it was, or with another beginning of the answer."""
        prompt = asked.request.prompt
        said = [output.token for output in asked.choices[0] if output.token is not None]
        cut = self._turns.choice((0, 0, 3)) if len(prompt.tokens) > 3 else 0
        tokens = np.concatenate([prompt.tokens[: len(prompt.tokens) - cut], np.asarray(said, np.int32)])
        if len(tokens) <= self.engine.longest_sequence:
            self._report.mixed["turns told of"] += 1
            self.given.text(self.mix.namespaces[salt_of(asked.request)], tokens)
            prompt = Prompt(tokens, prompt.boundaries if not cut else ())
            self.engine.commit(asked.request.namespace, prompt, model=asked.request.model)

    def _abort(self) -> None:
        for name, left in list(self._aborts.items()):
            self._aborts[name] = left - 1
            if left > 0:
                continue
            del self._aborts[name]
            if self.engine.is_open(name):
                self.engine.abort(name)
                asked = self._asked[name]
                asked.aborted = True
                when = (
                    "while it is answered"
                    if asked.reported
                    else "in its prompt"
                    if self._has_begun(name)
                    else "at once"
                )
                self._report.mixed[f"aborted {when}"] += 1

    def _has_begun(self, name: str) -> bool:
        return name in self.watcher.prompts

    def _check_idle(self) -> None:
        """Raises AssertionError if something is still in use though nothing runs."""
        spare = Kind.SLOT if self.engine.model.device.type == "cuda" else None  # for recorded launches
        allowed = 0 if spare is None else _geometry(self.engine.model).stride_bytes(spare)
        working = self.engine.stats().cache.working_bytes
        assert working <= allowed, f"{working} bytes are in use though nothing runs"


def _geometry(model: HybridModel) -> Geometry:
    return Geometry.of(model.cache_spec, 1 << 50)


def room(model: HybridModel, tokens: int, sequences: int) -> int:
    """Bytes that `sequences` sequences of `tokens` tokens take at the same time."""
    geometry = _geometry(model)
    pages = -(-tokens // TILE) + 1
    return sequences * (pages * geometry.stride_bytes(Kind.PAGE) + 2 * geometry.stride_bytes(Kind.SLOT))


def _config(model: HybridModel, phase: Phase, rng: random.Random) -> EngineConfig:
    """A busy engine for a phase."""
    if not phase.budgets:
        geometry, pages = _geometry(model), -(-phase.most_tokens // TILE)
        tight = 2 * geometry.stride_bytes(Kind.SLOT) + pages * geometry.stride_bytes(Kind.PAGE)
        return EngineConfig(budget_bytes=tight, verify=True)
    others = random.Random()
    others.setstate(rng.getstate())  # drawn apart: what a seed mixes stays the same
    tier = room(model, phase.most_tokens, others.choice(phase.budgets))
    return EngineConfig(
        budget_bytes=room(model, phase.most_tokens, rng.choice(phase.budgets)),
        host_bytes=others.choice((0, tier, 4 * tier)),
        order=others.choice((*ORDERS, "learned")),
        max_running=rng.choice((2, 4, 12, 32)),
        max_tiles=rng.choice((1, 2, 3, 7, 16)),
        max_tiles_beside_decode=rng.choice((1, 2, 4)),
        policy=rng.choice(phase.policies),
        verify=True,
    )
