"""The engine's synchronous core: schedule, have the work done, publish, choose tokens; one step at a time.

Nothing is published before the pass that fills it has completed. `async_engine` runs this on a thread.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.choreography.compiler import Compiler, Traits, key_of
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine.intake import OWN, Intake
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.engine.scheduler import Scheduler, Step
from hybrid_cache.engine.sequence import Phase, Sequence, grid_floor
from hybrid_cache.engine.tally import Tally
from hybrid_cache.errors import HybridCacheError, Overloaded, RequestError
from hybrid_cache.request import FailedOutput, FinishReason, Output, Request, TokenOutput
from hybrid_cache.sampling import TokenLogprob
from hybrid_cache.stats import EngineStats
from hybrid_cache.work import Command, OutOfDeviceMemory, PassFailed

if TYPE_CHECKING:
    from torch import Tensor

MOST_FAILURES = 3  # requests given up with no step between that passed; then a prompt of our own shows who is at fault

logger = logging.getLogger("hybrid_cache")

Outputs = list[tuple[str, Output | FailedOutput]]  # (request id, output), in the order in which they arose


class Engine:
    """Requests in, outputs out, one step at a time. Not thread-safe.

    It hands tensors from the worker back to the worker, and looks at none.

    watch: called with each step before its work is done
    """

    def __init__(
        self,
        model: HybridModel,
        config: EngineConfig,
        *,
        worker: Callable[[HybridModel, CacheMemory, Callable[[], int | None]], Worker] = Worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """worker: makes the worker, see `device.worker.Worker`
        clock: seconds, by which the cache measures how long things have not been used
        """
        self.model = model
        self.watch: Callable[[Step], None] = lambda step: None
        self._config = config
        self._cost = model.prefill_cost
        self._commands: list[Command] = []  # decided, and carried out before the next pass
        spec, budget_bytes = model.cache_spec, config.budget_bytes
        policy = make_policy(config.policy, spec, self._cost, budget_bytes)
        emit = self._commands.append
        self.cache = Books(spec, self._cost, budget_bytes, policy, emit=emit, clock=clock, verify=config.verify)
        memory = CacheMemory(spec, budget_bytes, str(model.device), verify=config.verify)
        self.worker = worker(model, memory, self.cache.scratch_slot)
        traits = Traits(model.fidelities, model.commutes, model.packs, recurrent=spec.slot_bytes > 0)
        self._compiler = Compiler(self.cache, self._cost, traits)
        self._stage = Stage(self.cache, self._compiler, emit)
        self._scheduler = Scheduler(self.cache, self._cost, config, self._compiler, self._stage)
        limits = model.fingerprint, model.vocab_size, model.max_length
        self._intake = Intake(*limits, config, self.cache, self._compiler, self._scheduler)
        self._open: dict[str, int] = {}  # request id -> choices that have not finished
        self._tally = Tally()
        self._failures = 0  # requests given up since a step passed

    @property
    def has_work(self) -> bool:
        """True while a step would do something, canonical passes included."""
        return self._scheduler.has_work

    @property
    def idle(self) -> bool:
        """True while no request waits for an answer."""
        return self._scheduler.idle

    @property
    def longest_sequence(self) -> int:
        """Tokens that the model's context and an empty cache both hold."""
        return self._intake.longest_sequence

    def check_request(self, request: Request) -> None:
        """Raises RequestError, ContextTooLong or BadSampling for a request that can never be served."""
        self._intake.check(request)

    def plan(self, request: Request) -> Plan:
        """What would be done for an arranged request if it came now. Changes nothing.

        Raises RequestError for one that can never be served, or is not arranged.
        """
        return self._intake.plan(request)

    def is_stored(self, message: str, seam: int = 0) -> bool:
        """Whether rows and effect of the message with an id are in the cache for use at another position."""
        return self._compiler.is_stored(key_of(message, seam))

    def effects(self, message: str, seam: int = 0) -> "list[tuple[Tensor, Tensor]] | None":
        """Copies of (P, S) of a stored message for each state of the model, in the order of its layers.

        P as its `Transition` writes it down, S [*state_shape], both float32. None if it is not stored.
        """
        stored = self.cache.messages.get(key_of(message, seam))
        if stored is None:
            return None
        self.settle()
        return self.worker.composer.effects(stored.slot, stored.extra)

    @property
    def has_room(self) -> bool:
        """False while the waiting queue is full."""
        return self._scheduler.num_waiting < self._config.max_waiting

    def submit(self, request: Request) -> None:
        """Queues a request, whose id must not be that of an open one.

        Raises RequestError if it can never be served, Overloaded when the queue is full.
        """
        self._intake.check(request)
        if self.is_open(request.id):
            raise RequestError(f"request id {request.id!r} is in use", param="id")
        if not self.has_room:
            raise Overloaded(f"{self._scheduler.num_waiting} requests wait, limit {self._config.max_waiting}")
        self._open[request.id] = request.n
        # The first choice computes the prompt; the others fork from its end.
        self._scheduler.add(self._intake.sequence(request, 0))

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request; what it has published stays. Unknown ids are ignored."""
        for sequence in [s for s in self._scheduler.sequences() if s.request.id == request_id]:
            self._scheduler.finish(sequence)
        self._open.pop(request_id, None)

    def is_open(self, request_id: str) -> bool:
        """True from `submit` until the last choice has finished or the request was aborted."""
        return request_id in self._open

    def step(self) -> Outputs:
        """Runs one step -> the outputs that arose from it."""
        step = self._scheduler.schedule()
        if step.empty:
            self.settle()
            return []
        self._tally.steps += 1
        self.watch(step)
        started_s = time.perf_counter()
        outputs: Outputs = []
        try:
            hidden = self._run(step)
            if hidden is None:
                return []
            self._end(step, hidden, outputs)
        except (PassFailed, OutOfDeviceMemory) as error:
            if isinstance(error, OutOfDeviceMemory) and error.lost:
                raise
            return outputs + self._fail(step, error)
        self._failures = 0
        self._scheduler.passed(step)
        if self._scheduler.pace.bounds:
            flops = sum(self._cost.flops(chunk.start, chunk.end) for chunk in step.chunks)
            self._scheduler.pace.note(time.perf_counter() - started_s, flops, decodes=bool(step.decodes))
        return [output for output in outputs if output[0] != OWN]

    def _fail(self, step: Step, error: HybridCacheError) -> Outputs:
        """Takes back a step that failed; gives up the request at fault once it is known."""
        self._tally.failures += 1
        logger.error("a step failed: %s", error, exc_info=error)
        request_id = self._scheduler.failed(step)
        self.worker.free_memory()
        if request_id is None:
            return []
        if request_id == OWN:
            logger.critical("%d requests in a row failed, and so does a prompt of our own", self._failures)
            raise error
        self._failures += 1
        outputs = self._give_up(request_id, str(error))
        if self._failures >= MOST_FAILURES:
            self._open[OWN] = 1
            self._scheduler.add_alone(self._intake.own())
        return outputs

    def _give_up(self, request_id: str, why: str) -> Outputs:
        logger.error("request %s is given up: %s", request_id, why)
        self.abort(request_id)
        return [(request_id, FailedOutput(why))]

    def _run(self, step: Step) -> Hidden | None:
        """None where the device ran out of memory: then the step is taken back, and smaller ones follow."""
        work = step.work(tuple(self._commands))
        self._commands.clear()
        self.cache.pool.check_unpublished(Kind.SLOT, work.written_slots())
        try:
            return self.worker.run(work)
        except OutOfDeviceMemory as error:
            if not self._scheduler.out_of_memory(step, error.lost):
                raise
        self.worker.free_memory()  # now that nothing holds the tensors of the step
        return None

    def settle(self) -> None:
        """Carries out what was decided since the last pass."""
        self._run(Step())

    def check(self) -> None:
        """Proves that books and memory are in order. Raises PublishedBytesChanged."""
        self.settle()
        self.worker.memory.check(self.cache.check())

    def run_until_idle(self) -> Outputs:
        """Steps until all requests are answered and all canonical passes are done -> all outputs."""
        outputs: Outputs = []
        while self.has_work:
            outputs += self.step()
        return outputs

    def stats(self) -> EngineStats:
        graphs = self.worker.graphs
        return self._tally.stats(self._scheduler, graphs.num_replays if graphs else 0, self.cache.stats())

    @property
    def fallbacks(self) -> dict[str, str]:
        """What runs in a slower way than it could on this device, and why."""
        graphs = self.worker.graphs
        return {"cuda graphs": graphs.reason} if graphs and graphs.reason else {}

    # After the forward pass

    def _end(self, step: Step, hidden: Hidden, outputs: Outputs) -> None:
        """Publishes, moves sequences on, chooses tokens; adds what arises to `outputs`, also where it fails."""
        outputs += self._announce(step.resumed)
        ready: list[tuple[Sequence, Tensor]] = []  # sequences whose next token can be chosen, with its hidden row
        num_rows = 0
        for chunk, rows in zip(step.chunks, hidden.chunks, strict=True):
            num_rows += chunk.rows.num_wanted
            outputs += self._end_chunk(chunk, rows, num_rows - 1, ready)
        ready += self._end_decodes(step.decodes, hidden.decodes)
        for sequence, row in zip(step.resumed, hidden.kept, strict=True):
            ready += self._begin_decode(sequence, row)
        outputs += self._end_unanswered(ready)
        if ready := [each for each in ready if each[0].phase is Phase.DECODE]:
            self._choose(ready, outputs)

    def _announce(self, sequences: Iterable[Sequence]) -> Outputs:
        """The PromptOutput of sequences that are about to give their first token."""
        outputs: Outputs = []
        for sequence in sequences:
            if sequence.announced or sequence.index > 0:
                continue
            sequence.announced = True
            lease, program = sequence.prefill.lease, sequence.prefill.program
            assert lease is not None
            plan = program.plan if program else self._intake.exact_plan(sequence.request, lease.length)
            outputs.append((sequence.request.id, self._tally.prompt(sequence, plan, self._cost)))
        return outputs

    def _end_chunk(
        self, chunk: Chunk, rows: "Tensor", last_row: int, ready: "list[tuple[Sequence, Tensor]]"
    ) -> Outputs:
        """Publishes what a chunk has written and, at the end of the prompt, starts decoding.

        rows: those that the chunk wanted   last_row: the last of them, among the rows of the whole pass
        """
        prefill, sequence = chunk.prefill, chunk.sequence
        assert prefill.lease is not None
        prefill.computed = chunk.end
        self.cache.publish(prefill.lease, grid_floor(chunk.end))
        self._tally.flops_computed += self._cost.flops(chunk.start, chunk.end)
        if prefill.program is not None:
            prefill.computed = self._stage.advance(prefill.program, prefill.lease, prefill.computed)
        if sequence is None and prefill.program is not None:
            if prefill.done:
                self._scheduler.messages.end(prefill)
            return []
        if sequence is None:
            self._tally.commit_tokens += chunk.end - chunk.start
            if prefill.done:
                self._scheduler.canonical.end(prefill)
            return []
        self._tally.computed_tokens += chunk.end - chunk.start
        if sequence.request.sampling.prompt_logprobs is not None:
            new, tokens = sequence.unscored(chunk.start, chunk.end)
            sequence.prompt_logprobs += self.worker.score(rows[new], tokens, sequence.request.sampling.prompt_logprobs)
        if not prefill.done:
            return []
        if prefill.publish:
            self.cache.publish_end(prefill.lease, last_row)
        outputs = self._announce([sequence])
        ready += self._begin_decode(sequence, rows[-1])
        return outputs

    def _begin_decode(self, sequence: Sequence, hidden: "Tensor") -> "list[tuple[Sequence, Tensor]]":
        """The prompt is in the state -> the sequence and its forks, which choose their next token from `hidden`."""
        sequence.phase = Phase.DECODE
        self._watch_answer(sequence)
        started = [] if sequence.generated else [(sequence, hidden)]
        if sequence.index == 0 and not sequence.forked:
            started += [(s, hidden) for s in self._fork(sequence)]
            sequence.forked = True
        return started

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The other choices of a request, on copies of the state -> those that found room; the rest wait."""
        forks = []
        for index in range(1, first.request.n):
            sequence = self._intake.sequence(first.request, index)
            sequence.arrival = first.arrival
            assert first.prefill.lease is not None
            room = self._scheduler.has_room
            lease = self.cache.fork(first.prefill.lease, len(first.prefill.tokens)) if room else None
            if lease is None:
                self._scheduler.add(sequence)
                continue
            sequence.prefill.lease, sequence.prefill.computed = lease, len(first.prefill.tokens)
            if first.prefill.program is not None:
                sequence.prefill.program = first.prefill.program.fork()
            sequence.fed = len(first.prefill.tokens)
            self._scheduler.adopt(sequence)
            forks.append(sequence)
        return forks

    def _end_decodes(self, decodes: tuple[Sequence, ...], hidden: "Tensor") -> "list[tuple[Sequence, Tensor]]":
        """Moves each decoding sequence on by the token it was fed -> those with a new token to choose."""
        ready = []
        for sequence, row in zip(decodes, hidden, strict=True):
            if sequence.replaying:
                self._tally.replayed_tokens += 1
            else:
                ready.append((sequence, row))
            sequence.fed += 1
            self._watch_answer(sequence)
        return ready

    def _end_unanswered(self, ready: "list[tuple[Sequence, Tensor]]") -> Outputs:
        """Ends the sequences that want no token."""
        outputs: Outputs = []
        for sequence, _ in ready:
            if sequence.request.sampling.max_tokens == 0:
                outputs.append((sequence.request.id, TokenOutput(sequence.index, None, finish=FinishReason.LENGTH)))
                self._finish(sequence)
        return outputs

    def _choose(self, ready: "list[tuple[Sequence, Tensor]]", outputs: Outputs) -> None:
        """Chooses the next token of each sequence from its hidden row."""
        choosers = [sequence.chooser for sequence, _ in ready]
        chosen = self.worker.choose([r for _, r in ready], choosers, [s.request.sampling.logprobs for s, _ in ready])
        for (sequence, _), (token, logprob) in zip(ready, chosen, strict=True):
            if sequence.phase is Phase.DECODE:  # else its request was given up
                outputs += self._append(sequence, token, logprob)

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Outputs:
        """Adds a chosen token to its sequence, and ends the sequence when it is the last one."""
        sequence.generated.append(token)
        sequence.chooser.note(token)
        self._tally.generated_tokens += 1
        try:
            finish = sequence.finish_reason(self.model.max_length)
        except Exception as error:  # of a stopper, which is the caller's
            logger.exception("a stopper failed")
            return self._give_up(sequence.request.id, f"{type(error).__name__}: {error}")
        if finish is not None:
            self._scheduler.messages.keep_answer(sequence)
            self._finish(sequence)
            self._scheduler.canonical.add_turn(sequence)
        return [(sequence.request.id, TokenOutput(sequence.index, token, logprob, finish))]

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._open[sequence.request.id] -= 1
        if self._open[sequence.request.id] == 0:
            del self._open[sequence.request.id]

    def _watch_answer(self, sequence: Sequence) -> None:
        prefill = sequence.prefill
        if prefill.program is not None and prefill.lease is not None and sequence.request.n == 1:
            self._stage.before_decode(prefill.program, prefill.lease, sequence.fed)
