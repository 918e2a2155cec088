"""`hybrid-cache bench kv-events`: what publishing KV events costs a server that is busy.

Conversations of several turns, in a budget too small for all of them, so that what comes in evicts as much. Rounds of
the same work alternate: with events, which another process reads, and without. What is compared is processor time of
the whole process; beside it stands what the publisher's threads took of that, which other work cannot disturb.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import typer

from hybrid_cache.api.server.kv_events.config import KVEventsConfig
from hybrid_cache.api.server.kv_events.publisher import NAME as PUBLISHER
from hybrid_cache.api.server.kv_events.publisher import Publisher
from hybrid_cache.api.server.kv_events.wire import Origin
from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.cache.journal import Nobody
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.sizes import parse_bytes
from hybrid_cache.tokens import Boundary, Prompt

ANY = "tcp://127.0.0.1:*"
TURNS, FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 4, 600, 150, 24
READER = """
import sys, zmq
reader = zmq.Context().socket(zmq.SUB)
reader.setsockopt(zmq.SUBSCRIBE, b"")
reader.connect(sys.argv[1])
while True:
    reader.recv_multipart()
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pair of rounds."""

    without_s: float  # processor time of a round
    with_s: float
    threads_s: float  # of the second one, what the publisher's threads took
    blocks: int  # that were published and withdrawn in it

    @property
    def ratio(self) -> float:
        return self.with_s / self.without_s

    @property
    def share(self) -> float:
        """Of the processor time of the round with events, what the publisher's threads took."""
        return self.threads_s / self.with_s


def kv_events(
    model: Annotated[str | None, typer.Option(help="As for `serve`; the embedded one if left out.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of rounds.")] = 20,
    talks: Annotated[int, typer.Option(min=1, help="Conversations in a round.")] = 6,
    budget: Annotated[str, typer.Option(help="Of the cache.")] = "24MiB",
    threads: Annotated[int, typer.Option(min=0, help="That compute; 0 for torch's choice.")] = 1,
    states: Annotated[bool, typer.Option("--states", help="Publish states, too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Compare rounds with KV events and without."""
    try:
        costs = measure(model, pairs, talks, parse_bytes(budget), threads, states, seed)
    except HybridCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    ratios, shares = [each.ratio for each in costs], [each.share for each in costs]
    low, _, high = quantiles(ratios, n=4)
    typer.echo(f"processor time with events / without: {median(ratios):.4f} (quartiles {low:.4f} to {high:.4f})")
    typer.echo(f"of it in the publisher's threads: {median(shares):.3%}, most {max(shares):.3%}")
    typer.echo(f"blocks published and withdrawn in a round: {median(each.blocks for each in costs):.0f}")
    if json_file is not None:
        json_file.write_text(json.dumps({"seed": seed, "pairs": [asdict(each) for each in costs]}, indent=2) + "\n")


def measure(
    model: str | None, pairs: int, talks: int, budget_bytes: int, threads: int, states: bool, seed: int
) -> list[Cost]:
    """Raises HybridCacheError."""
    loaded = load(LoadOptions(model, threads=threads))
    engine = Engine(loaded.model, EngineConfig(budget_bytes=budget_bytes, verify=False))
    rng = np.random.default_rng(seed)
    with _publishing(states, grouped=loaded.model.cache_spec.slot_bytes > 0) as publisher:
        for _ in range(2):  # until the budget is full, and all has been compiled
            _round(engine, rng, talks)
        costs = []
        for number in range(pairs):
            took = {}
            for on in (True, False) if number % 2 else (False, True):
                took[on] = _with_events(engine, publisher, rng, talks) if on else _without(engine, rng, talks)
            with_s, threads_s, blocks = took[True]
            costs.append(Cost(took[False][0], with_s, threads_s, blocks))
        return costs


def _with_events(
    engine: Engine, publisher: Publisher, rng: np.random.Generator, talks: int
) -> tuple[float, float, int]:
    engine.cache.pool.watch(publisher.journal)
    _wait(publisher)  # what is there already
    before, began_s, blocks = _threads_s(), time.process_time(), _blocks(publisher)
    _round(engine, rng, talks)
    _wait(publisher)
    took = time.process_time() - began_s, _threads_s() - before, _blocks(publisher) - blocks
    engine.cache.pool.watcher = Nobody()
    return took


def _without(engine: Engine, rng: np.random.Generator, talks: int) -> tuple[float, float, int]:
    began_s = time.process_time()
    _round(engine, rng, talks)
    return time.process_time() - began_s, 0.0, 0


def _round(engine: Engine, rng: np.random.Generator, talks: int) -> None:
    """Conversations side by side, a turn of each after the other."""
    tokens = [rng.integers(300, engine.model.vocab_size, FIRST_TOKENS).astype(np.int32) for _ in range(talks)]
    for turn in range(TURNS):
        for talk in range(talks):
            ends = (Boundary(len(tokens[talk]), role="user"),)
            params = SamplingParams(max_tokens=ANSWER_TOKENS, min_tokens=ANSWER_TOKENS, temperature=0.0)
            engine.submit(Request(f"{turn}-{talk}", Prompt(tokens[talk], ends), params))
        engine.run_until_idle()
        for talk in range(talks):
            more = rng.integers(300, engine.model.vocab_size, TURN_TOKENS).astype(np.int32)
            tokens[talk] = np.concatenate([tokens[talk], more])


@contextmanager
def _publishing(states: bool, *, grouped: bool) -> Iterator[Publisher]:
    """With a reader in another process."""
    config = KVEventsConfig(enable_kv_cache_events=True, endpoint=ANY, replay_endpoint=ANY, publish_states=states)
    publisher = Publisher(config)
    with subprocess.Popen([sys.executable, "-c", READER, publisher.endpoint]) as reader:
        try:
            publisher.start(lambda namespace: Origin(), grouped=grouped)
            yield publisher
        finally:
            reader.kill()
            publisher.stop()


def _wait(publisher: Publisher) -> None:
    while len(publisher.journal):
        time.sleep(0.002)
    time.sleep(0.01)


def _blocks(publisher: Publisher) -> int:
    return publisher.counts.stored + publisher.counts.removed


def _threads_s() -> float:
    """Processor time of the publisher's thread and of ZeroMQ's, up to now; of the last where the system tells."""
    ours = [each.ident for each in threading.enumerate() if each.name == PUBLISHER]
    total_s = sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in ours if ident is not None)
    for task in Path("/proc/self/task").glob("*"):
        if (task / "comm").read_text().startswith("ZMQbg"):
            total_s += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total_s
