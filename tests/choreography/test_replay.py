"""What an engine has had done, done again by another worker on other memory: the same bits, from integers alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from hybrid_cache.bench.exactness.mix import MIXED
from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.bench.exactness.rows import Ledger
from hybrid_cache.bench.exactness.traffic import Traffic
from hybrid_cache.cache.commands import Copy, KeepHidden
from hybrid_cache.choreography.commands import Compose, KeepEffect, Relocate
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.work import Work
from tests.models.checkpoints import CASES

NAMES = ("bamba", "qwen3 next", "mamba of one layer", "llama of one layer")
MODELS = [next(case for case in CASES if case.name.startswith(name)) for name in NAMES]
SEEDS = (0, 4)  # each with a policy of its own
BAMBA, DELTA, MAMBA, LLAMA = MODELS
QUICK = ((BAMBA, 0), (BAMBA, 4), (DELTA, 0), (MAMBA, 4), (LLAMA, 4))


def rows_of(hidden: Hidden) -> list[Tensor]:
    return [rows.clone() for rows in (*hidden.chunks, hidden.decodes, hidden.kept)]


@pytest.mark.parametrize(
    ("case", "seed"),
    [pytest.param(*run, marks=[] if run in QUICK else pytest.mark.slow) for run in product(MODELS, SEEDS)],
    ids=str,
)
def test_a_second_worker_gives_the_same_bits(case, seed, folder) -> None:
    """Random requests of all kinds in a budget so small that all the time something is evicted, moved or given up."""
    model = loading.load(folder(case), ops=dispatch.select())
    report = Report(str(case), "float32", 0)
    traffic = Traffic(model, replace(MIXED, budgets=(8,)), Ledger(report), report, random.Random(seed))
    worker, done = traffic.engine.worker, list[tuple[Work, list[Tensor]]]()
    run = worker.run
    worker.memory._arena._buffer.zero_()

    def recorded(work: Work, _pause: Callable[[], None]) -> Hidden:
        hidden = run(work)  # one after the other
        done.append((work, rows_of(hidden)))
        return hidden

    worker.run = recorded  # type: ignore[method-assign]
    for _ in range(2):
        traffic.round(14)
    kinds = {type(command) for work, _ in done for command in work.commands}
    assert kinds >= ({Copy, KeepHidden} if seed else {Copy})  # one of the two policies keeps the ends of prompts
    if model.cache_spec.slot_bytes and model.fidelities:
        assert kinds >= {Compose, KeepEffect}
    if model.cache_spec.page_bytes and model.fidelities:
        assert Relocate in kinds

    config = traffic.engine._config
    memory = CacheMemory(model.cache_spec, config.budget_bytes, host_bytes=config.host_bytes, verify=config.verify)
    memory._arena._buffer.zero_()  # items have bytes that nobody writes to
    second = Worker(model, memory)
    for work, rows in done:
        again = rows_of(second.run(work))
        assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    published = traffic.engine.cache.check()
    assert len(published) > 4
    for kind, item in published:
        assert memory._arena.digest(kind, item) == worker.memory._arena.digest(kind, item)
    memory.check(published)
