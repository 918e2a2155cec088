"""`hybrid-cache bench agents --live URL`: the sessions on a real server, and then what a simulation makes of them.

For the simulation the server is measured afterwards: its rates by `Probe`, with nobody else there; then other sessions
are played at the same rate, and the rates are scaled until a simulation of those waits and decodes for as long as they
did. So the sessions that are compared have no part in it.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_cache.bench.agents.live.client import ChatClient
from hybrid_cache.bench.agents.live.player import Played, Player
from hybrid_cache.bench.agents.live.probe import Probe
from hybrid_cache.bench.agents.machine import Machine
from hybrid_cache.bench.agents.outcome import Outcome, Served
from hybrid_cache.bench.agents.simulation import Setting, Simulation
from hybrid_cache.bench.agents.workload import AgentSession
from hybrid_cache.bench.common.http_client import first_model, open_client
from hybrid_cache.bench.serving.scenarios import ENGLISH, Conversation, Reply, calibrate
from hybrid_cache.models import loading
from hybrid_cache.spec import CacheSpec

LIVE = "live"  # the order that a row of a real server names
LENGTH = 8192  # of a prompt and its answer, where the server does not say
ROUNDS = 4  # of scaling

Arrivals = Sequence[tuple[float, AgentSession]]


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server, and how much of it is known."""

    url: str
    key: str | None = None
    folder: str | None = None  # of its model, or `embedded`: its rates are measured, for simulations
    memory_bytes: int = 0  # that it has for contexts; 0: nobody says
    host_bytes: int = 0
    hints: bool = False  # it is told how long each tool takes

    @property
    def spec(self) -> CacheSpec | None:
        """What its model keeps. Raises ModelError."""
        if self.folder is None:
            return None
        folder = loading.embedded_path() if self.folder == "embedded" else Path(self.folder)
        return loading.describe(loading.load_config(folder)).shape.cache_spec


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What came of sessions, and by which machine they can be simulated."""

    served: Served
    played: Played
    machine: Machine | None

    def simulated(self, order: str) -> tuple[Served, Outcome]:
        """The same sessions in an order of service."""
        assert self.machine is not None
        setting = _setting(self.served, self.machine, order)
        return setting.served, Simulation(setting, self.played.arrivals).run()


def run_live(
    server: LiveServer, arrivals: Arrivals, others: Arrivals, seed: int, order: str, on_done: Callable[[], None]
) -> LiveRun:
    """Raises ServerFailed, ModelError.

    others: the sessions by which the machine is measured   order: that the server has   on_done: a session has ended
    """
    return asyncio.run(_run_live(server, arrivals, others, seed, order, on_done))


async def _run_live(
    server: LiveServer, arrivals: Arrivals, others: Arrivals, seed: int, order: str, on_done: Callable[[], None]
) -> LiveRun:
    spec = server.spec
    async with open_client(server.url, server.key) as http:
        card = await first_model(http)
        client = ChatClient(http, card.id)

        async def ask(conversation: Conversation, max_tokens: int) -> Reply:
            messages = [message._asdict() for message in conversation]
            answer = await client.ask({"messages": messages, "max_tokens": max_tokens, "temperature": 0})
            times = answer.sent_s, answer.first_s, answer.last_s, answer.last_s
            return Reply(answer.content, *times, answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)

        words = await calibrate(ask, ENGLISH, str(seed))
        found = await Player(client, words, str(seed), hints=server.hints, on_done=on_done).play(arrivals)
        served = Served(card.id, LIVE, server.memory_bytes, server.host_bytes, True, seed)
        if spec is None:
            return LiveRun(served, found, None)
        probe = Probe(client, words, random.Random(f"{seed} probe"), card.max_model_len or LENGTH)
        machine = await probe.machine(card.id, spec)
        measured = await Player(client, words, f"{seed} others", hints=server.hints, on_done=on_done).play(others)
    return LiveRun(served, found, scaled(machine, served, measured, order))


def scaled(machine: Machine, served: Served, found: Played, order: str) -> Machine:
    """A machine on which sessions wait and decode for as long as they did."""
    for _ in range(ROUNDS):
        outcome = Simulation(_setting(served, machine, order), found.arrivals).run()
        decoding = found.outcome.decoded_s / max(outcome.decoded_s, 1e-9)
        waiting = found.outcome.waited_s / max(outcome.waited_s, 1e-9)
        machine = replace(
            machine,
            base_s=machine.base_s * decoding,
            row_s=machine.row_s * decoding,
            bytes_per_s=machine.bytes_per_s / decoding,
            token_s=machine.token_s * waiting,
            token_per_position_s=machine.token_per_position_s * waiting,
            request_s=machine.request_s * waiting,
        )
    return machine


def _setting(served: Served, machine: Machine, order: str) -> Setting:
    return Setting(machine, served.memory_bytes, order, seed=served.seed, host_bytes=served.host_bytes)
