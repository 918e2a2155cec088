"""The server's engine, scheduler and cache on a simulated clock, with agents who ask, wait for tools and ask again."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hybrid_cache.bench.agents.machine import GENERATED, Clock, Machine, SimulatedModel, SimulatedWorker
from hybrid_cache.bench.agents.outcome import Outcome, Served, SessionResult
from hybrid_cache.bench.agents.workload import AgentSession, Turn
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray

ORACLE = "-oracle"  # ends the name of an order that is told how long tools take
EVENTS_BEFORE_PROGRESS = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """One server, and who comes when."""

    machine: Machine
    memory_bytes: int
    order: str
    cache_policy: str = "learned"
    prefix_cache: bool = True
    seed: int = 0
    host_bytes: int = 0  # of a second tier

    @property
    def served(self) -> Served:
        return Served(self.machine.name, self.order, self.memory_bytes, self.host_bytes, self.prefix_cache, self.seed)


@dataclass(slots=True, eq=False)
class _Client:
    session: AgentSession
    arrival_s: float
    name: str
    rng: np.random.Generator
    tokens: TokenArray
    turn: int = 0
    asked_s: float = 0.0
    begun_s: float = 0.0  # its first token
    answering: bool = False
    first_token_s: float = 0.0
    longest_wait_s: float = 0.0
    state_at: int = 0  # where its last prompt left a state

    @property
    def now(self) -> Turn:
        return self.session.turns[self.turn]


@dataclass(slots=True)
class Simulation:
    """Runs once. on_done: called with the number of sessions that have ended"""

    setting: Setting
    arrivals: list[tuple[float, AgentSession]]
    on_done: Callable[[int], None] = lambda number: None
    clock: Clock = field(default_factory=Clock)
    engine: Engine = field(init=False)
    worker: SimulatedWorker = field(init=False)
    _events: list[tuple[float, int, _Client]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _open: dict[str, _Client] = field(default_factory=dict)
    _done: list[SessionResult] = field(default_factory=list)
    _first_tokens: list[float] = field(default_factory=list)
    _waited_s: float = 0.0
    _decoded_s: float = 0.0
    _prompt_tokens: int = 0
    _new_tokens: int = 0
    _returns: int = 0
    _resident: int = 0
    _byte_s: float = 0.0

    def __post_init__(self) -> None:
        s = self.setting
        machine = s.machine
        tiles = max(machine.chunk_tokens // TILE, 1)
        beside = tiles if (least := machine.chunk_tokens_beside_decode) is None else max(least // TILE, 1)
        config = EngineConfig(
            budget_bytes=s.memory_bytes,
            max_running=machine.max_running,
            max_waiting=len(self.arrivals) + 1,
            policy=s.cache_policy,
            order=s.order,
            host_bytes=s.host_bytes,
            prefix_cache=s.prefix_cache,
            max_tiles=tiles,
            max_tiles_beside_decode=beside,
            max_step_ms=None if machine.max_step_s is None else machine.max_step_s * 1e3,
            verify=False,
        )

        def worker(model: object, memory: object, spare: object) -> SimulatedWorker:
            self.worker = SimulatedWorker(machine, self.clock, memory)  # type: ignore[arg-type]
            return self.worker

        self.engine = Engine(SimulatedModel(machine), config, worker=worker, clock=self.clock)

    def run(self) -> Outcome:
        """Until the last session has ended."""
        shared: dict[str, TokenArray] = {}
        for number, (arrival_s, session) in enumerate(self.arrivals):
            rng = np.random.default_rng([self.setting.seed, number])
            if session.shared_tokens and session.kind not in shared:
                kind_rng = np.random.default_rng([self.setting.seed, 1 << 31, len(shared)])
                shared[session.kind] = _tokens(kind_rng, session.shared_tokens)
            start = shared.get(session.kind, np.zeros(0, np.int32))[: session.turns[0].prompt_tokens]
            client = _Client(session, arrival_s, f"session {number}", rng, start)
            self._asks(client, arrival_s)
        steps, engine = 0, self.engine
        while True:
            while self._events and self._events[0][0] <= self.clock.now:
                self._ask(heapq.heappop(self._events)[2])
            if not engine.has_work:
                if not self._events:
                    break
                self.clock.now = self._events[0][0]
                continue
            before = self.clock.now
            outputs = engine.step()
            self._byte_s += (self.clock.now - before) * engine.cache.fixed_bytes
            steps += 1
            for request_id, output in outputs:
                if isinstance(output, TokenOutput):
                    self._take(request_id, output)
        return self._result(steps)

    def _asks(self, client: _Client, time_s: float) -> None:
        """A client will ask at that time."""
        heapq.heappush(self._events, (time_s + self.setting.machine.request_s, next(self._numbers), client))

    def _ask(self, client: _Client) -> None:
        turn, engine = client.now, self.engine
        kept = client.tokens[: turn.kept_tokens if client.turn else len(client.tokens)]
        client.tokens = np.concatenate([kept, _tokens(client.rng, turn.prompt_tokens - len(kept))])
        self._prompt_tokens += turn.prompt_tokens
        self._new_tokens += turn.prompt_tokens - turn.kept_tokens
        request_id = str(next(self._numbers))
        role = "tool" if client.turn and client.session.turns[client.turn - 1].tool else "user"
        request = Request(
            request_id,
            Prompt(client.tokens, (Boundary(len(client.tokens), role=role),)),
            SamplingParams(temperature=0, max_tokens=turn.num_steps or turn.output_tokens),
            session=client.name,
            kind=client.session.kind,
        )
        if client.turn and turn.kept_tokens >= client.state_at > 0:
            self._returns += 1
            self._resident += engine.cached_tokens(request) >= client.state_at
        client.state_at = turn.prompt_tokens // TILE * TILE
        client.asked_s, client.answering = self.clock.now - self.setting.machine.request_s, False
        self._open[request_id] = client
        engine.submit(request)

    def _take(self, request_id: str, output: TokenOutput) -> None:
        client = self._open[request_id]
        if not client.answering:
            client.answering = True
            client.begun_s = self.clock.now
            waited = self.clock.now - client.asked_s
            self._waited_s += waited
            client.longest_wait_s = max(client.longest_wait_s, waited)
            if client.turn:
                self._first_tokens.append(waited)
            else:
                client.first_token_s = waited
        if output.finish is not None:
            del self._open[request_id]
            self._decoded_s += self.clock.now - client.begun_s
            self._end_turn(request_id, client)

    def _end_turn(self, request_id: str, client: _Client) -> None:
        turn = client.now
        answer = np.full(turn.output_tokens, GENERATED, np.int32)
        client.tokens = np.concatenate([client.tokens, answer])
        client.turn += 1
        if not self.setting.prefix_cache:
            pass  # then nothing is kept, and no order knows of pauses
        elif turn.tool:
            self.engine.pause(request_id, turn.tool, self._hint(turn))
        else:
            self.engine.end_task(request_id)
        if turn.pause_s is None:
            self._end(client)
        else:
            self._asks(client, self.clock.now + turn.pause_s)

    def _hint(self, turn: Turn) -> float | None:
        return turn.pause_s if self.setting.order.endswith(ORACLE) else None

    def _end(self, client: _Client) -> None:
        paused_s = sum(turn.pause_s or 0.0 for turn in client.session.turns)
        times = client.arrival_s, self.clock.now, paused_s, client.first_token_s, client.longest_wait_s
        self._done.append(SessionResult(*times))
        if len(self._done) % EVENTS_BEFORE_PROGRESS == 0:
            self.on_done(len(self._done))

    def _result(self, steps: int) -> Outcome:
        stats = self.engine.stats()
        return Outcome(
            sessions=tuple(self._done),
            first_tokens_s=tuple(self._first_tokens),
            waited_s=self._waited_s,
            decoded_s=self._decoded_s,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            computed_tokens=stats.computed_tokens,
            generated_tokens=stats.generated_tokens,
            num_returns=self._returns,
            num_resident=self._resident,
            num_preemptions=stats.num_preemptions,
            busy_s=self.worker.busy_s,
            end_s=self.clock.now,
            steps=steps,
            running_byte_s=self._byte_s,
        )


def _tokens(rng: np.random.Generator, count: int) -> TokenArray:
    """Tokens that no other conversation has."""
    return rng.integers(GENERATED + 1, 1 << 30, count, dtype=np.int32)
