"""The engine's synchronous core: schedule, have the work done, publish, choose tokens; one step at a time.

Nothing is published before the pass that fills it has completed. `async_engine` runs this on a thread.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.choreography.compiler import Compiler, Traits, key_of
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel, go_on
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine.family import Family
from hybrid_cache.engine.identity import identity_of
from hybrid_cache.engine.intake import OWN, Intake
from hybrid_cache.engine.interruptions import Interruptions
from hybrid_cache.engine.listener import Listener
from hybrid_cache.engine.outcomes import Outcomes, Outputs
from hybrid_cache.engine.scheduler import Scheduler, Step
from hybrid_cache.engine.sequence import Sequence as Running
from hybrid_cache.engine.turns import Gap
from hybrid_cache.errors import ConfigError, HybridCacheError, Overloaded, RequestError
from hybrid_cache.namespaces import fingerprint_in, lane_in, namespace_of
from hybrid_cache.profile import Profile
from hybrid_cache.request import Request
from hybrid_cache.scheduling.base import Order
from hybrid_cache.scheduling.registry import make_order
from hybrid_cache.stats import EngineStats
from hybrid_cache.storage.store import Store
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import Command, OutOfDeviceMemory, PassFailed

if TYPE_CHECKING:
    from torch import Tensor

DISK_WAIT_S = 0.002  # for a load, with nothing else to do; other threads are heard between two waits
DISK_LOOK_S = 0.05  # between two looks at what the disk has done, with nothing else to do
FLUSH_S = 3.0  # for what waits to be written, at the end
MOST_TOOL_S = 86_400  # that a caller may announce
MOST_FAILURES = 3  # requests given up with no step between that passed; then a prompt of our own shows who is at fault

logger = logging.getLogger("hybrid_cache")


class Engine:
    """Requests in, outputs out, one step at a time. Not thread-safe.

    watch: called with each step before its work is done
    between_layers: called between the layers of a pass with prompts in it, on a CPU. It may submit requests,
        call `pause` and `end_task` for those that have ended, and `step_between`, and do nothing else to the engine
    """

    def __init__(
        self,
        model: HybridModel,
        config: EngineConfig,
        *,
        worker: Callable[[HybridModel, CacheMemory, Callable[[], int | None]], Worker] = Worker,
        clock: Callable[[], float] = time.monotonic,
        order: Order | None = None,
        variants: Mapping[str, HybridModel] = MappingProxyType({}),
    ) -> None:
        """worker: makes the worker, see `device.worker.Worker`
        clock: seconds, by which everything here is timed   order: in place of the one that the config names
        variants: other models of the same shape, by the names that requests use for them

        Raises ConfigError for a variant of another shape.
        """
        self.model = model
        self.watch: Callable[[Step], None] = lambda step: None
        self.between_layers: Callable[[], None] = go_on
        self._config = config
        self._clock = clock
        self._cost = model.prefill_cost
        self._commands: list[Command] = []  # decided, and carried out before the next pass
        spec, budget_bytes = model.cache_spec, config.budget_bytes
        policy = make_policy(config.policy, spec, self._cost, budget_bytes)
        emit = self._commands.append
        host_bytes, verify = config.host_bytes, config.verify
        books = spec, self._cost, budget_bytes, policy
        self.cache = Books(*books, emit=emit, host_bytes=host_bytes, clock=clock, verify=verify)
        self._store = None if config.disk is None else Store(config.disk, config.disk_bytes)
        self._disk = None if self._store is None else self.cache.add_disk(self._store, config.disk_bytes)
        device = str(model.device)
        memory = CacheMemory(spec, budget_bytes, device, host_bytes=host_bytes, disk=self._store, verify=verify)
        self.worker = worker(model, memory, self.cache.scratch_slot)
        traits = Traits(model.fidelities, model.commutes, model.packs, recurrent=spec.slot_bytes > 0)
        self._compiler = Compiler(self.cache, self._cost, traits)
        self._stage = Stage(self.cache, self._compiler, emit)
        self._scheduler = Scheduler(
            *(self.cache, self._cost, config, order or make_order(config.order), self._compiler, self._stage, clock),
            self._disk,
        )
        self._family = Family(model)
        limits = self._family, model.vocab_size, model.max_length
        self._intake = Intake(*limits, config, self.cache, self._compiler, self._scheduler, clock)
        self._outcomes = Outcomes(model, self.cache, self.worker, self._stage, self._scheduler, self._intake)
        self._interruptions = Interruptions(self._scheduler, self._intake)
        self._serve_from_disk(model)
        for name, variant in variants.items():
            self.add_variant(name, variant)
        self._failures = 0  # requests given up since a step passed
        self._gap: Gap | None = None  # while a pass is under way
        self._between_s = 0.0  # of it that steps between its layers took

    def listen(self, listener: Listener) -> None:
        """From now on somebody hears what becomes of requests."""
        self._outcomes.listener = self._scheduler.canonical.listener = listener

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests may use; the empty one is the engine's own model's."""
        return self._family.names

    def fingerprint(self, model: str) -> str:
        """Of a variant by its name; of the engine's own model for the empty one. Raises RequestError for any other."""
        return self._family.fingerprint(model)

    def add_variant(self, name: str, model: HybridModel, profiles: Iterable[Profile] = ()) -> None:
        """Runs another model beside the others, which requests name. Its entries in the cache are its own.

        profiles: of it and others; those of models that are not here are left out
        Raises ConfigError for a name that is taken, a model of another shape, or a profile of another one.
        """
        self._family.add(name, model)
        self.worker.add(model)
        self._scheduler.senders.update(self._family.models)
        self._serve_from_disk(model)
        here = {each.fingerprint for each in self._family.models.values()}
        try:
            for profile in profiles:
                if {profile.sender, profile.receiver} <= here:
                    self.add_profile(profile)
        except ConfigError:
            self.remove_variant(name)
            raise

    def _serve_from_disk(self, model: HybridModel) -> None:
        if self._disk is None:
            return
        if model.fidelities:
            self.worker.learn_effects(model.fingerprint)
        self._disk.serve(model.fingerprint, identity_of(model))

    @property
    def disk_identities(self) -> list[str]:
        """Of the models that are served from the disk."""
        return [] if self._disk is None else self._disk.identities

    def add_profile(self, profile: Profile) -> None:
        """Lets requests that allow a loss use entries of one model for another, as was measured.

        Raises ConfigError for a profile of models that are not here.
        """
        self._scheduler.senders.learn(profile)

    def remove_variant(self, name: str) -> None:
        """Forgets a variant, and what is cached of it. Raises RequestError if there is none, or it is in use."""
        fingerprint = self._family.fingerprint(name)
        num_open = sum(s.request.model == name or s.prefill.model == fingerprint for s in self.sequences())
        num_open += sum(message.model == fingerprint for message in self._scheduler.messages)
        if num_open:
            raise RequestError(f"{name!r} is in use by {num_open} requests", param="model", code="model_in_use")
        if not self._family.remove(name):  # another name of the same model stays
            return self._scheduler.senders.update(self._family.models)

        lanes = self._scheduler.senders.lanes(fingerprint)

        def is_its(namespace: str) -> bool:
            return fingerprint_in(namespace) == fingerprint or lane_in(namespace) in lanes

        self.forget_turns(is_its)
        self._scheduler.twins.forget()
        Inventory(self.cache, is_its).drop_all()
        self.settle()
        self.worker.remove(fingerprint)
        self._scheduler.senders.update(self._family.models)

    def sequences(self) -> tuple[Running, ...]:
        """Those that wait, run, or are interrupted."""
        return *self._scheduler.sequences(), *self._interruptions.sequences()

    @property
    def has_work(self) -> bool:
        """True while a step would do something, canonical passes included."""
        return self._scheduler.has_work or self.forgets_in_s <= 0

    @property
    def idle(self) -> bool:
        """True while no request waits for an answer."""
        return self._scheduler.idle

    @property
    def forgets_in_s(self) -> float:
        """Seconds until a step gives up a request that is paused, or forgets a turn; infinite if there is none."""
        pauses = self._scheduler.tasks.pauses
        return min(self._interruptions.next_forgotten_s, pauses.next_forgotten_s) - self._clock()

    @property
    def looks_in_s(self) -> float:
        """Seconds until a step may have something to do that nobody asks for; infinite if nothing is to be expected."""
        busy = self._disk is not None and self._disk.has_work
        return min(self.forgets_in_s, DISK_LOOK_S if busy else math.inf)

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

    def cached_tokens(self, request: Request) -> int:
        """Tokens of a prompt that would not be computed if it came now."""
        return self._intake.num_cached(request)

    def is_stored(self, message: str, seam: int = 0, *, namespace: str = "", model: str = "") -> bool:
        """Whether rows and effect of the message with an id are in the cache for use at another position.

        namespace, model: as in `Request`
        """
        return self._compiler.is_stored(self._key_of(message, seam, namespace, model))

    def effects(
        self, message: str, seam: int = 0, *, namespace: str = "", model: str = ""
    ) -> "list[tuple[Tensor, Tensor]] | None":
        """Copies of (P, S) of a stored message for each state of the model, in the order of its layers.

        P as its `Transition` writes it down, S [*state_shape], both float32. None if it is not stored.
        namespace, model: as in `Request`
        """
        stored = self.cache.messages.get(self._key_of(message, seam, namespace, model))
        if stored is None:
            return None
        self.settle()
        return self.worker.composer.effects(self.fingerprint(model), stored.slot, stored.extra)

    def _key_of(self, message: str, seam: int, namespace: str, model: str) -> str:
        return key_of(namespace_of(namespace, self.fingerprint(model)), message, seam)

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
        self._scheduler.tasks.pauses.begins(request.id)
        self._scheduler.endings.begins(request.id)
        self._outcomes.open[request.id] = request.n
        # The first choice computes the prompt; the others fork from its end.
        self._scheduler.add(self._intake.sequence(request, 0))

    def commit(self, namespace: str, prompt: Prompt, session: str = "", model: str = "") -> None:
        """Has the beginning of a prompt that is still to come computed, when nobody waits for an answer.

        namespace, session, model: as in `Request`   The oldest of too many is forgotten. Raises as `check_request`.
        """
        self._intake.commit(namespace, prompt, session, model)

    def pause(self, request_id: str, tool: str = "", seconds: float | None = None) -> None:
        """The turn of a request ends in a tool call, or did: what its task has in the cache may be kept meanwhile.

        An open request is stopped, and holds nothing until `resume`; it is given up after an hour. Of one that has
        ended, the next request that goes on from it belongs to the same task.
        tool: its name   seconds: how long it takes, if that is known

        Raises RequestError for a request that is not known or cannot be continued, and for a time out of bounds.
        """
        if seconds is not None and not 0 <= seconds <= MOST_TOOL_S:
            raise RequestError(f"a tool time of {seconds} s, must be in [0, {MOST_TOOL_S}]", param="seconds")
        if self.is_open(request_id) and request_id not in self._interruptions:
            self._interruptions.begin(request_id)
        else:
            self._outcomes.listener.called(request_id, tool, seconds)
        self._scheduler.endings.called(request_id)
        known = self._scheduler.tasks.pauses.called(request_id, tool, seconds)
        if not (known or request_id in self._interruptions):
            raise RequestError(f"request {request_id!r} is not known", param="id")

    def resume(self, request_id: str, tokens: Sequence[int]) -> None:
        """Continues a request that was paused while it was open: its prompt is all tokens so far, and these.

        Raises RequestError if it is not paused, ContextTooLong where it does not fit any more: then it still is.
        """
        self._scheduler.add(self._interruptions.end(request_id, tokens))

    def end_task(self, request_id: str) -> None:
        """The answer to a request that has ended was the last of its task. Unknown ids are ignored."""
        self._scheduler.tasks.pauses.over(request_id)

    def left(self, request_id: str) -> None:
        """The client of a request that has ended has closed its connection. Unknown ids are ignored."""
        self._scheduler.endings.left(request_id)

    def forget_turns(self, may: Callable[[str], bool]) -> None:
        """Turns that are still to be computed for the cache never are. may: whether those of a namespace are meant"""
        self._scheduler.canonical.forget(may)

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request; what it has published stays. Unknown ids are ignored."""
        self._interruptions.abort(request_id)
        self._outcomes.abort(request_id)

    def is_open(self, request_id: str) -> bool:
        """True from `submit` until the last choice has finished or the request was aborted."""
        return request_id in self._outcomes.open

    def step(self) -> Outputs:
        """Runs one step -> the outputs that arose from it."""
        if self.forgets_in_s <= 0:
            self._scheduler.tasks.look()
        forgotten = self._interruptions.forgotten(self._clock())
        for request_id, _ in forgotten:
            self._outcomes.abort(request_id)
        step = self._scheduler.schedule()
        if step.empty:
            self.settle()
            if self._store is not None and not self.idle:  # what somebody waits for comes from the disk
                self._store.wait(DISK_WAIT_S)
            return [*forgotten]
        self._outcomes.tally.steps += 1
        self.watch(step)
        started_s, self._between_s = self._clock(), 0.0
        outputs: Outputs = [*forgotten]
        try:
            hidden = self._run(step)
            if hidden is None:
                return outputs
            self._outcomes.end(step, hidden, outputs)
        except (PassFailed, OutOfDeviceMemory) as error:
            if isinstance(error, OutOfDeviceMemory) and error.lost:
                raise
            return outputs + self._fail(step, error)
        self._failures = 0
        self._scheduler.passed(step)
        flops = sum(chunk.flops for chunk in step.chunks)
        self._scheduler.pace.note(self._clock() - started_s - self._between_s, flops, len(step.decodes))
        return [output for output in outputs if output[0] != OWN]

    def step_between(self) -> Outputs:
        """From `between_layers`: computes short prompts that came since the pass began -> the outputs that arose.

        They get the bits that they would get alone, as always; the sequences of the pass are not touched.
        """
        gap, started_s, outputs = self._gap, self._clock(), Outputs()
        if gap is None or (step := self._scheduler.schedule_between(gap)).empty:
            return outputs
        self._gap = None
        self._outcomes.tally.steps += 1
        self.watch(step)
        try:
            self._outcomes.end(step, self._work(step), outputs)
            self._gap = gap
        except (PassFailed, OutOfDeviceMemory) as error:
            if isinstance(error, OutOfDeviceMemory) and error.lost:
                raise  # which takes back all of the pass, too
            self._outcomes.tally.failures += 1
            logger.error("a step between layers failed, of requests %s: %s", step.request_ids, error, exc_info=error)
            self._scheduler.take_back(step, gap)
        self._work(Step())  # what is kept of its hidden rows: the pass overwrites them
        self._between_s += self._clock() - started_s
        return outputs

    def _fail(self, step: Step, error: HybridCacheError) -> Outputs:
        """Takes back a step that failed; gives up the request at fault once it is known."""
        self._outcomes.tally.failures += 1
        logger.error("a step failed, of requests %s: %s", step.request_ids, error, exc_info=error)
        request_id = self._scheduler.failed(step)
        self.worker.free_memory()
        if request_id is None:
            return []
        if request_id == OWN:
            logger.critical("%d requests in a row failed, and so does a prompt of our own", self._failures)
            raise error
        self._failures += 1
        outputs = self._outcomes.give_up(request_id, str(error))
        if self._failures >= MOST_FAILURES:
            self._outcomes.open[OWN] = 1
            self._scheduler.add_alone(self._intake.own())
        return outputs

    def _run(self, step: Step) -> Hidden | None:
        """None where the device ran out of memory: then the step is taken back, and smaller ones follow."""
        self._gap = self._scheduler.gap(step)
        try:
            return self._work(step, self.between_layers if self._gap else go_on)
        except OutOfDeviceMemory as error:
            if not self._scheduler.out_of_memory(step, error.lost):
                raise
        finally:
            self._gap = None
        self.worker.free_memory()  # now that nothing holds the tensors of the step
        return None

    def _work(self, step: Step, pause: Callable[[], None] = go_on) -> Hidden:
        work = step.work(tuple(self._commands))
        self._commands.clear()
        self.cache.pool.check_unpublished(Kind.SLOT, work.written_slots())
        return self.worker.run(work, pause)

    def settle(self) -> None:
        """Carries out what was decided since the last pass."""
        self._run(Step())

    @property
    def ends_in_s(self) -> float:
        """Seconds that `close` may take."""
        return 0.0 if self._store is None else 2 * FLUSH_S

    def flush(self, within_s: float) -> bool:
        """Has the disk tier written what waits -> whether all is there. For an engine without requests."""
        until_s = time.monotonic() + within_s
        while self._disk is not None and self._store is not None and self._disk.has_work:
            if time.monotonic() > until_s:
                return False
            self._disk.look(idle=True)
            self.settle()
            self._store.wait(DISK_LOOK_S)
        return True

    def close(self, within_s: float = FLUSH_S) -> None:
        """Writes what waits for the disk tier and lets go of its folder; no step may follow."""
        if self._store is not None:
            self.flush(within_s)
            if self._disk is not None:
                self._disk.knowledge.write()
            self._store.close(within_s)

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
        num_replays = sum(graphs.num_replays for graphs in self.worker.graphs.values())
        return self._outcomes.tally.stats(self._scheduler, num_replays, self.cache.stats())

    @property
    def fallbacks(self) -> dict[str, str]:
        """What runs in a slower way than it could on this device, and why."""
        reason = next((graphs.reason for graphs in self.worker.graphs.values() if graphs.reason), "")
        return {"cuda graphs": reason} if reason else {}
